"""Loads a Whisper, safely, and runs the capture forward: as far as the deepest site asked for, and no further."""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from torch import Tensor, nn
from whisper.audio import HOP_LENGTH, N_FFT, log_mel_spectrogram
from whisper.model import AudioEncoder, ModelDimensions, Whisper
from whisper.tokenizer import Tokenizer, get_tokenizer

from cache import micro
from cache.errors import ModelError
from cache.location import Location, local_copy, location
from cache.plan import SAMPLES_PER_FRAME
from cache.sites import Site

MATMUL_TOLERANCE = 1e-5
"""Largest relative error against plain fp32 at which a faster matrix multiplication counts as exact."""


POSITIONS = "encoder.positional_embedding"


@dataclass
class LoadedModel:
    """A Whisper, or the encoder of one."""

    name: str
    """As asked for: a name of `model_names()` or a path, with `random:SEED:` before it where the weights were drawn anew."""
    sha256: str
    """Of the checkpoint file; where the weights were drawn anew, of these."""
    dims: ModelDimensions
    module: nn.Module
    """Has `encoder`, and `decoder` if the checkpoint has one (then it is a whole `whisper.model.Whisper`). fp32, in eval mode."""
    device: torch.device

    @property
    def has_decoder(self) -> bool:
        return isinstance(self.module, Whisper)

    @property
    def dims_dict(self) -> dict[str, int]:
        return asdict(self.dims)

    @property
    def is_multilingual(self) -> bool:
        return self.dims.n_vocab >= 51865

    @cached_property
    def _tokenizers(self) -> dict[str | None, Tokenizer]:
        return {}

    def decoder_input(self, text: str, language: str | None = None) -> list[int]:
        """Token ids of a teacher-forced decoder: start-of-transcript sequence without timestamps, then the text.

        At most n_text_ctx of them. Raises ModelError for a language that Whisper does not know.
        """
        tokenizer = self.tokenizer(language)
        # What looks like a special token is the dataset's text, not ours to obey.
        ids = tokenizer.encode(" " + text.strip(), disallowed_special=())
        return [*tokenizer.sot_sequence_including_notimestamps, *ids][: self.dims.n_text_ctx]

    def tokenizer(self, language: str | None = None) -> Tokenizer:
        """For transcripts in a language, as Whisper or a dataset names it; an English-only model has one for all.

        Raises ModelError for a language that Whisper does not know.
        """
        spoken = language if self.is_multilingual else None
        if spoken not in self._tokenizers:
            self._tokenizers[spoken] = self._tokenizer(spoken)
        return self._tokenizers[spoken]

    def _tokenizer(self, language: str | None) -> Tokenizer:
        known = self.dims.n_vocab - 51765 - int(self.is_multilingual)
        spellings = [language] if language is None else [language, re.split("[-_]", language)[0]]  # datasets name locales too: pt-BR
        for spelling in spellings:
            try:
                return get_tokenizer(self.is_multilingual, num_languages=known, language=spelling, task="transcribe")
            except ValueError:
                continue
        raise ModelError(f"Whisper does not know the language '{language}' that the dataset names")

    def header(self) -> dict[str, Any]:
        """What a store's header says of the model."""
        return {"name": self.name, "sha256": self.sha256, "dims": self.dims_dict, "has_decoder": self.has_decoder}


def load_model(name: str, device: str = "auto") -> LoadedModel:
    """Loads a model by name (`micro` comes with hearsae, others are downloaded and checked by openai-whisper) or a checkpoint file.

    A file has openai-whisper's format and may hold the encoder alone. Nothing is unpickled but tensors and plain values. A name goes before
    a file of that name in the working directory: `./micro` is the file. `random:SEED:MODEL` is the model with weights drawn anew, a control
    (`redrawn`); it is another model, with a sha256 of its own.
    Raises ModelError if there is no such model or the file is not such a checkpoint.
    """
    target = choose_device(device)
    seed, source = split_random(name)
    path = _checkpoint_path(source)
    try:
        with local_copy(path) as file:
            return _load(name, path, file, target, seed)
    except FileNotFoundError:
        raise ModelError(f"there is no checkpoint file at {path}") from None


def split_random(name: str) -> tuple[int | None, str]:
    """`random:7:tiny.en` -> (7, tiny.en); of another name (None, that name)."""
    spelled = re.fullmatch(r"random:(\d{1,18}):(.+)", name, re.DOTALL)
    return (int(spelled[1]), spelled[2]) if spelled else (None, name)


def random_twin(name: str, seed: int | None = None) -> str:
    """The control of a model: the same with weights drawn anew, `random:SEED:MODEL`.

    seed: default: 0, or, of a model whose own weights were drawn, the next one after its own.
    """
    drawn, source = split_random(name)
    if seed is None:
        seed = 0 if drawn is None else drawn + 1
    return f"random:{seed}:{source}"


def redrawn(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every weight drawn anew from a normal distribution with the mean and the standard deviation of its tensor (as in 2501.17727).

    Nothing that was learnt is left but the sizes of the weights. The encoder's positions are sines, not learnt, and stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Tensor) -> Tensor:
        plain = value.numpy().astype(np.float64)  # torch's sums depend on its threads, and workers have other numbers of them
        return torch.randn(value.shape, generator=generator) * float(plain.std()) + float(plain.mean())

    return {name: value if name == POSITIONS else drawn(value) for name, value in sorted(weights.items())}


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.hexdigest()


def _load(name: str, path: Location, local: Path, target: torch.device, seed: int | None) -> LoadedModel:
    with open(local, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles: what can't be read is refused below
            checkpoint = torch.load(local, map_location="cpu", weights_only=True)
        dims = ModelDimensions(**checkpoint["dims"])
        weights = {key: value.float() for key, value in checkpoint["model_state_dict"].items()}
    except Exception as error:  # a damaged file makes the reader fail in any way: IndexError, OSError, UnpicklingError, ...
        raise ModelError(f"{path} is not a checkpoint in openai-whisper's format ('dims' and 'model_state_dict')") from error
    module = _build(dims, weights, path)
    if seed is not None:
        weights = redrawn(weights, seed)
        module.load_state_dict(weights)
        sha256 = _digest(weights)  # of what came out: another PyTorch may draw other numbers
    return LoadedModel(name, sha256, dims, module.eval().requires_grad_(False).to(target), target)


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ModelError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ModelError(f"--device {device} is none of auto, cpu, cuda")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"there is no CUDA device for --device {device}: use --device cpu")
    return chosen


def model_names() -> list[str]:
    """What `load_model` knows by name."""
    return [micro.NAME, *whisper.available_models()]


def name_of_checkpoint(sha256: str) -> str:
    """Which of `model_names()` the checkpoint with this SHA-256 is; empty for any other."""
    for name, url in whisper._MODELS.items():
        if url.split("/")[-2] == sha256:  # where openai-whisper has it from too
            return name
    return micro.NAME if micro.MODEL.is_file() and hashlib.sha256(micro.MODEL.read_bytes()).hexdigest() == sha256 else ""


def _checkpoint_path(name: str) -> Location:
    if name == micro.NAME:
        if not micro.MODEL.is_file():
            raise ModelError(f"this installation of hearsae lacks the model micro ({micro.MODEL}): install it again, or give a checkpoint file")
        return micro.MODEL
    if name in whisper.available_models():
        return _download(name)
    if "://" in name:
        return location(name)
    if not Path(name).is_file():
        raise ModelError(f"there is no model '{name}': give a checkpoint file or one of {', '.join(model_names())}")
    return Path(name)


def _download(name: str) -> Path:
    folder = Path.home() / ".cache" / "whisper"
    try:
        return Path(whisper._download(whisper._MODELS[name], str(folder), in_memory=False))
    except (OSError, RuntimeError) as error:
        offline = f"--model {micro.NAME} comes with hearsae"
        raise ModelError(f"the model '{name}' can't be downloaded ({error}): give a checkpoint file with --model; {offline}") from error


def _build(dims: ModelDimensions, weights: dict[str, Tensor], path: Location) -> nn.Module:
    sizes = asdict(dims)
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()) or dims.n_audio_state % dims.n_audio_head:
        raise ModelError(f"{path} has dims that no Whisper can have: {sizes}")
    is_whole = any(key.startswith("decoder.") for key in weights)
    for key, shape in _telling_shapes(dims, is_whole).items():  # before there is a module: damaged dims may name any size
        found = list(weights[key].shape) if key in weights else None
        if found != shape:
            raise ModelError(f"the weights in {path} do not fit its dims: {key} is {found or 'missing'}, and {shape} by its dims")
    module: nn.Module
    if is_whole:
        module = Whisper(dims)
    else:
        module = nn.Module()
        module.encoder = AudioEncoder(dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ModelError(f"the weights in {path} do not fit its dims: {reason if len(reason) < 200 else reason[:200] + ' ...'}") from error
    return module


def _telling_shapes(dims: ModelDimensions, is_whole: bool) -> dict[str, list[int]]:
    """The weights whose shapes, taken together, confirm all of `dims` but the numbers of heads."""
    audio, text = dims.n_audio_state, dims.n_text_state
    shapes = {
        "encoder.conv1.weight": [audio, dims.n_mels, 3],
        POSITIONS: [dims.n_audio_ctx, audio],
        f"encoder.blocks.{dims.n_audio_layer - 1}.attn.query.weight": [audio, audio],
    }
    if is_whole:
        shapes |= {
            "decoder.token_embedding.weight": [dims.n_vocab, text],
            "decoder.positional_embedding": [dims.n_text_ctx, text],
            f"decoder.blocks.{dims.n_text_layer - 1}.attn.query.weight": [text, text],
        }
    return shapes


def log_mel(audio: np.ndarray, model: LoadedModel) -> Tensor:
    """Whisper's input for one clip: [n_mels, 2 * n_audio_ctx], padded with silence as `whisper.pad_or_trim` does (30 s: [n_mels, 3000]).

    audio: float32 [n_samples] at 16 kHz, no longer than the model's window.
    """
    return log_mel_of(audio, model.dims.n_audio_ctx, model)


def log_mel_of(audio: np.ndarray, n_frames: int, model: LoadedModel) -> Tensor:
    """The same for a window of n_frames frames of 20 ms: [n_mels, 2 * n_frames].

    Only what is not padding is transformed: frames of silence are all alike.
    """
    total = n_frames * SAMPLES_PER_FRAME
    heard = -(-(len(audio) + N_FFT) // (2 * HOP_LENGTH)) * 2 * HOP_LENGTH  # and one frame of silence
    padded = torch.zeros(min(total, heard))
    padded[: len(audio)] = torch.from_numpy(audio)
    mel = log_mel_spectrogram(padded, n_mels=model.dims.n_mels, device=model.device)
    return F.pad(mel[None], (0, 2 * n_frames - mel.shape[1]), mode="replicate")[0]


@torch.inference_mode()
def capture(model: LoadedModel, mel: Tensor, sites: Sequence[Site], tokens: Sequence[Sequence[int]] = ()) -> dict[str, Tensor]:
    """The outputs of `sites` for a batch: site -> fp32 [batch, positions, width], padding included. openai-whisper's own modules with hooks.

    mel: [batch, n_mels, 2 * n_audio_ctx]. tokens: decoder input of each clip, needed for decoder sites; shorter ones are filled up at the end,
    which a causal decoder does not see. An attention module gives its output, not its weights. `cache.encoder.encode` is the quicker way.
    Raises ModelError for decoder sites without a decoder or without tokens.
    """
    _refuse_missing_decoder(model, sites, tokens)
    with _kept(model, sites) as found:
        encoded = model.module.get_submodule("encoder")(mel)
        model.module.get_submodule("decoder")(_filled_up(tokens, model.device), encoded)
    return found


@torch.inference_mode()
def capture_decoder(model: LoadedModel, encoded: Tensor, sites: Sequence[Site], tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The same for decoder sites alone, from the encoder's output, [batch, n_audio_ctx, width]."""
    _refuse_missing_decoder(model, sites, tokens)
    with _kept(model, sites) as found:
        model.module.get_submodule("decoder")(_filled_up(tokens, model.device), encoded)
    return found


def _refuse_missing_decoder(model: LoadedModel, sites: Sequence[Site], tokens: Sequence[Sequence[int]]) -> None:
    for site in sites:
        if site.needs_decoder and not (model.has_decoder and tokens):
            raise ModelError(f"{site.name} needs a checkpoint with a decoder, and clips with text")


def _filled_up(tokens: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, tokens))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in tokens], device=device)


class _DeepestReached(Exception):
    """Ends the forward pass: what was asked for has been seen."""


@contextmanager
def _kept(model: LoadedModel, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """Within it, what `sites` put out is kept, and the forward pass ends after the deepest one, and with it the body of the `with`."""
    deepest = max(sites, key=lambda site: site.order)
    found: dict[str, Tensor] = {}
    modules = dict(model.module.named_modules())

    def keep(site: Site) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[site.name] = output[0] if isinstance(output, tuple) else output
            if site is deepest:
                raise _DeepestReached

        return hook

    handles = [modules[site.name].register_forward_hook(keep(site)) for site in sites]
    try:
        with suppress(_DeepestReached):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fast_matmul() -> Iterator[str]:
    """Multiplies fp32 matrices on the CPU through oneDNN where that is exact on this machine, about twice as fast as torch's default.

    The switch allows oneDNN to round to bf16 on CPUs with bf16 matrix units, so it is tried first: if the result differs from plain
    fp32 by more than MATMUL_TOLERANCE it stays off. Yields the precision in force.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if _onednn_is_exact() else before)
    try:
        yield torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)


def _onednn_is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 384, generator=generator), torch.randn(384, 512, generator=generator)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = a @ b
        torch.set_float32_matmul_precision("medium")
        return bool((a @ b - exact).norm() / exact.norm() < MATMUL_TOLERANCE)
    finally:
        torch.set_float32_matmul_precision(before)
