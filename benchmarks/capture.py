"""Capture on one thread, from FLAC files to activations on a disk, beside other ways to do it.

    python benchmarks/capture.py --assets DIR [--model FILE] [--clips 12] [--rounds 5] [--sites residual pair mlp] [--without transformers blog]

Windows (clips) a second, contenders in turn, medians; every one decodes the same files with soundfile, makes Whisper's log-mel of a 30 s window,
runs the encoder, and puts rows on the disk, synchronised, into a folder of --out:

- `hearsae`: `Worker.run` on all clips, as one shard: real frames as float16, checksums and commit records. `plain arithmetic` is the same without
  the kernels of `cache.amx` (where there are any).
- `openai-whisper`: its log-mel and its encoder with forward hooks; real frames of all clips as float16, one .npy a site.
- `transformers`: its feature extractor and its encoder with output_hidden_states, and hooks for MLP sites; the same files. Its weights are random,
  which takes as long.
- `blog`: as the repository of "Interpreting Whisper": `model.decode` for four clips at a time with hooks on the encoder, and one `torch.save` a
  clip and site, all 1,500 frames as float32. The checkpoint's decoder is random where it has none, and stops after as many tokens as the
  longest transcript of the four has.

`--floor` times the kernels alone, on the shapes of one window: what remains of a forward pass where nothing else takes time.
`--exact` gives, for every
encoder site, the largest relative difference over the clips (norm of the difference over norm) from openai-whisper in fp32, and of both from float64.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import whisper
from whisper.audio import log_mel_spectrogram, pad_or_trim
from whisper.model import LayerNorm, Whisper

from cache.capture import CaptureConfig, Worker, prepare
from cache.encoder import Arithmetic, Plain, best_arithmetic, encode
from cache.model import LoadedModel, capture, fast_matmul, load_model, log_mel
from cache.sites import match_sites

SITES = {
    "residual": ["encoder.blocks.?"],
    "pair": ["encoder.blocks.2", "encoder.blocks.2.mlp.1"],
    "mlp": ["encoder.blocks.*.mlp.1"],
}
BLOG_BATCH = 4


class Clips:
    """Files, their frames and their transcripts' lengths."""

    def __init__(self, assets: Path, count: int) -> None:
        folder = assets / "speech" / "test"
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        step = max(1, len(lines) // count)
        self.lines = lines[::step][:count]
        self.paths = [folder / line["file_name"] for line in self.lines]
        self.frames = [-(-soundfile.info(path).frames // 320) for path in self.paths]
        tokenizer = whisper.tokenizer.get_tokenizer(False)
        self.tokens = [len(tokenizer.encode(line["text"])) for line in self.lines]

    def manifest(self, path: Path) -> str:
        """A manifest of them for hearsae."""
        path.write_text("".join(json.dumps({"audio": str(file)}) + "\n" for file in self.paths))
        return str(path)


def samples_of(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


def keep(path: Path, arrays: list[np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.save(file, np.concatenate(arrays))
        file.flush()
        os.fsync(file.fileno())


def hooked(modules: dict[str, torch.nn.Module], found: dict[str, torch.Tensor]) -> list[Any]:
    def kept(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    return [module.register_forward_hook(kept(name)) for name, module in modules.items()]


def of_hearsae(model: str, clips: Clips, sites: list[str], out: Path, arithmetic: Arithmetic | None = None, **settings: Any) -> Callable[[], float]:
    """settings: of the capture. Measuring the deviation of trimmed windows is not part of the time."""
    out.mkdir(exist_ok=True)
    manifest, rounds = clips.manifest(out / "clips.jsonl"), itertools.count()
    rows = -(-sum(clips.frames) // 4096) * 4096
    kept = {"arithmetic": arithmetic} if arithmetic else {}

    def run() -> float:
        config = CaptureConfig(manifest, model, tuple(sites), out / f"{next(rounds)}.zarr", shard_rows=rows, device="cpu", **settings)
        prepared = prepare(config)
        worker = Worker(config, measures_deviation=False)
        worker.arithmetic = kept.setdefault("arithmetic", worker.arithmetic)  # weights are packed once a worker, not once a shard
        start = time.perf_counter()
        for shard in prepared.pending:
            worker.run(shard)
        return time.perf_counter() - start

    return run


def keep_rows(clips: Clips, sites: list[str], out: Path, outputs: Callable[[Path], dict[str, torch.Tensor]]) -> None:
    """Float16 rows of the real frames of all clips, one .npy a site. outputs: of a clip, site -> [1, positions, width] or without the 1."""
    rows = {name: list[np.ndarray]() for name in sites}
    with torch.inference_mode():
        for path, frames in zip(clips.paths, clips.frames, strict=True):
            found = outputs(path)
            for name in sites:
                rows[name].append(found[name].reshape(-1, found[name].shape[-1])[:frames].half().numpy())
    for name in sites:
        keep(out / f"{name}.npy", rows[name])


def take_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, after one that is not counted: it fills caches and compiles."""
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for turn in range(rounds + 1):
        for contender, run in contenders.items():
            took = run()
            if turn:
                seconds[contender].append(took)
    return seconds


def of_whisper(model: LoadedModel, clips: Clips, sites: list[str], out: Path) -> Callable[[], float]:
    encoder, found = model.module.get_submodule("encoder"), dict[str, torch.Tensor]()
    modules = {name: model.module.get_submodule(name) for name in sites}

    def outputs(path: Path) -> dict[str, torch.Tensor]:
        encoder(log_mel_spectrogram(pad_or_trim(samples_of(path)))[None])
        return found

    def run() -> float:
        start = time.perf_counter()
        handles = hooked(modules, found)
        keep_rows(clips, sites, out, outputs)
        for handle in handles:
            handle.remove()
        return time.perf_counter() - start

    return run


def of_transformers(model: LoadedModel, clips: Clips, sites: list[str], out: Path) -> Callable[[], float]:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    dims = model.dims
    config = WhisperConfig(
        d_model=dims.n_audio_state, encoder_layers=dims.n_audio_layer, encoder_attention_heads=dims.n_audio_head,
        encoder_ffn_dim=4 * dims.n_audio_state, decoder_layers=1, decoder_attention_heads=dims.n_audio_head, num_mel_bins=dims.n_mels,
    )  # fmt: skip
    encoder, extractor = WhisperModel(config).eval().get_encoder(), WhisperFeatureExtractor(dims.n_mels)
    found = dict[str, torch.Tensor]()
    numbers = {name: int(name.split(".")[2]) for name in sites}

    def keep_input(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any) -> None:
            found[name] = inputs[0]

        return hook

    def outputs(path: Path) -> dict[str, torch.Tensor]:
        features = extractor(samples_of(path), sampling_rate=16000, return_tensors="pt").input_features
        hidden = encoder(features, output_hidden_states=True).hidden_states
        return {name: found[name] if name.endswith(".mlp.1") else hidden[number + 1] for name, number in numbers.items()}

    def run() -> float:
        start = time.perf_counter()
        handles = [encoder.layers[numbers[name]].fc2.register_forward_pre_hook(keep_input(name)) for name in sites if name.endswith(".mlp.1")]
        keep_rows(clips, sites, out, outputs)
        for handle in handles:
            handle.remove()
        return time.perf_counter() - start

    return run


def of_blog(model: LoadedModel, clips: Clips, sites: list[str], out: Path) -> Callable[[], float]:
    whole = Whisper(model.dims).eval().requires_grad_(False)
    if model.has_decoder:
        whole.load_state_dict(model.module.state_dict())
    else:
        torch.manual_seed(0)
        whole.decoder.positional_embedding.normal_(std=0.02)
        whole.encoder.load_state_dict(model.module.get_submodule("encoder").state_dict())
    found = dict[str, torch.Tensor]()
    modules = {name: whole.get_submodule(name) for name in sites}
    folder = out / "blog"
    folder.mkdir(exist_ok=True)

    def run() -> float:
        start = time.perf_counter()
        handles = hooked(modules, found)
        for first in range(0, len(clips.paths), BLOG_BATCH):
            paths = clips.paths[first : first + BLOG_BATCH]
            mels = torch.stack([log_mel_spectrogram(pad_or_trim(samples_of(path))) for path in paths])
            options = whisper.DecodingOptions(language="en", fp16=False, sample_len=max(clips.tokens[first : first + BLOG_BATCH]))
            whole.decode(mels, options)
            for name in sites:
                for path, values in zip(paths, found[name], strict=True):
                    torch.save(values.clone(), folder / f"{name}-{path.stem}.pt")
        for handle in handles:
            handle.remove()
        os.sync()
        return time.perf_counter() - start

    return run


def floor(model: LoadedModel, arithmetic: Arithmetic, sites: list[str], frames: int) -> tuple[float, float]:
    """Seconds of a window's products and attention alone, and of its whole forward pass: each kernel hot, on numbers drawn at random."""
    encoder, generator = model.module.get_submodule("encoder"), torch.Generator().manual_seed(0)

    def drawn(n: int, width: int) -> torch.Tensor:
        return torch.randn(1, n, width, generator=generator)

    def of(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    block, d = encoder.blocks[0], model.dims.n_audio_state
    last = max(int(name.split(".")[2]) for name in sites)
    deepest_is_hidden = all(name.endswith(".mlp.1") for name in sites if name.startswith(f"encoder.blocks.{last}"))
    x, hidden = drawn(1500, d), drawn(1500, 4 * d)
    mel, drawn_twice = drawn(2 * frames, model.dims.n_mels), drawn(2 * frames, d)
    total = of(lambda: arithmetic.convolution(mel, encoder.conv1)) + of(lambda: arithmetic.convolution(drawn_twice, encoder.conv2))
    project, up, down = (
        of(lambda: arithmetic.linear(x, block.attn.query)),
        of(lambda: arithmetic.linear(x, block.mlp[0])),
        of(lambda: arithmetic.linear(hidden, block.mlp[2])),
    )
    attend = of(lambda: arithmetic.attention(x, x, x, block.attn.n_head))
    share = frames / 1500
    total += last * (4 * project + up + down + attend) + 2 * project + share * (2 * project + attend + up + (0 if deepest_is_hidden else down))
    whole = torch.randn(1, model.dims.n_mels, 3000, generator=generator)
    whole[:, :, 2 * frames :] = -1.0
    return total, of(lambda: encode(encoder, whole, sites, frames, arithmetic))


def exactness(model: LoadedModel, clips: Clips, best: Arithmetic) -> None:
    sites = match_sites(["encoder.*"], model.dims_dict, model.has_decoder)
    encoder = model.module.get_submodule("encoder")
    double = copy.deepcopy(encoder).double()
    for norm in double.modules():
        if isinstance(norm, LayerNorm):
            norm.forward = partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    found = {site.name: [0.0, 0.0, 0.0] for site in sites}
    for path, frames in zip(clips.paths, clips.frames, strict=True):
        mel = log_mel_spectrogram(pad_or_trim(samples_of(path)))[None]
        theirs, exact = capture(model, mel, sites), encode(double, mel.double(), list(found), frames)
        ours = encode(encoder, log_mel(samples_of(path), model)[None], list(found), frames, best)
        for name, largest in found.items():
            pairs = (ours[name], theirs[name][:, :frames]), (theirs[name][:, :frames], exact[name]), (ours[name], exact[name])
            for i, (one, other) in enumerate(pairs):
                largest[i] = max(largest[i], float((one.double() - other.double()).norm() / other.double().norm()))
    print(f"{'largest relative difference':34s} ours from theirs   theirs from float64   ours from float64")
    for name, (apart, of_theirs, of_ours) in found.items():
        print(f"{name:34s} {apart:16.1e}   {of_theirs:19.1e}   {of_ours:17.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", nargs="*", choices=list(SITES), default=list(SITES))
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="where files go; default: a folder that is removed at the end")
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = arguments.model or str(arguments.assets / "whisper" / "tiny.en.encoder.pt")
    model, clips = load_model(name, "cpu"), Clips(arguments.assets, arguments.clips)
    best = best_arithmetic(torch.device("cpu"))
    print(f"{asdict(model.dims)}\n{len(clips.paths)} clips, {np.mean(clips.frames) / 50:.1f} s on average; ours runs on {type(best).__name__}")
    if arguments.exact:
        with fast_matmul():
            exactness(model, clips, best)
    for which in arguments.sites:
        sites = [site.name for site in match_sites(SITES[which], model.dims_dict, model.has_decoder)]
        with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
            compare(which, sites, name, model, clips, best, Path(folder), arguments)
        if arguments.floor:
            with fast_matmul(), torch.inference_mode():
                kernels, forward = floor(model, best, sites, round(float(np.mean(clips.frames))))
            print(f"  forward pass {forward * 1e3:.0f} ms, its kernels alone {kernels * 1e3:.0f} ms: {kernels / forward:.0%}")


def compare(which: str, sites: list[str], name: str, model: LoadedModel, clips: Clips, best: Arithmetic, out: Path, arguments: Any) -> None:
    contenders: dict[str, Callable[[], float]] = {"hearsae": of_hearsae(name, clips, sites, out / "best")}
    if not isinstance(best, Plain):
        contenders["hearsae, plain arithmetic"] = of_hearsae(name, clips, sites, out / "plain", Plain())
    contenders["openai-whisper"] = of_whisper(model, clips, sites, out)
    if "transformers" not in arguments.without:
        contenders["transformers"] = of_transformers(model, clips, sites, out)
    if "blog" not in arguments.without:
        contenders["blog"] = of_blog(model, clips, sites, out)
    seconds = take_turns(contenders, arguments.rounds)
    ours = statistics.median(seconds["hearsae"])
    print(f"{which}: {', '.join(sites)}")
    for contender, times in seconds.items():
        median = statistics.median(times)
        each = statistics.median([one / mine for one, mine in zip(times, seconds["hearsae"], strict=True)])
        rate, each_ms = len(clips.paths) / median, median / len(clips.paths) * 1e3
        print(f"  {contender:26s} {rate:6.2f} windows/s {each_ms:7.1f} ms   hearsae is {median / ours:5.2f}x (by rounds {each:.2f}x)")


if __name__ == "__main__":
    main()
