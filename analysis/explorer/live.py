"""What the features of scans do on sound that no store holds: an upload, a recording, or a clip heard again.

`Live.open(scans)` loads each scan's features and the Whisper that they belong to. `Live.hear(samples)` runs it once, as capture does: rows are
rounded to the store's type, so that a clip of a store gives the values that its scan saw. All else is a function of what was heard.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from analysis.explorer.export import NOUNS
from analysis.features import Features, SaeLatents, open_features
from analysis.scan_folder import Scan
from cache.decode import RATES, UNKNOWN_LENGTH, decode
from cache.errors import HearsaeError, ModelError, SourceError
from cache.header import PADDED, SAMPLE_RATE, name_of_context
from cache.location import Location, location
from cache.model import LoadedModel, capture, fast_matmul, load_model, log_mel, name_of_checkpoint
from cache.plan import SAMPLES_PER_FRAME
from cache.sites import match_sites
from cache.store import ActivationStore

SCALES = ("z", "share")
"""How strong a value is: standard deviations above the mean of all rows of the scan, or its share of the largest value in the scan."""
ENCODED = "encoder.ln_post"
"""What the decoder attends to."""
MOST_SAMPLES_PER_S = 2_000_000
"""Rate times channels: 10 channels of studio sound. Some bytes of a crafted header can claim hundreds of times more, which would fill the memory."""


class Sound(NamedTuple):
    """What the models made of at most 30 s of audio."""

    samples: np.ndarray
    """float32 [n_samples] at 16 kHz, as they were heard."""
    n_frames: int
    rows: dict[tuple[str, str], np.ndarray]
    """(SHA-256 of the model, site) -> [n_frames, width], in the type of the store."""
    text: str | None
    """The first model's transcript."""
    no_text: str | None
    """Why there is none."""


class Strips(NamedTuple):
    """Some features over the whole of a sound."""

    feature: np.ndarray
    """int64 [n]"""
    values: np.ndarray
    """float32 [n, n_frames]"""
    strength: np.ndarray
    """float64 [n]: the largest on the scale that was asked for; NaN for a feature that has none on it."""
    frame: np.ndarray
    """int64 [n]: where it is."""


class Match(NamedTuple):
    """A latent of one SAE and the one of another that writes most nearly the same."""

    feature: int
    other: int
    cosine: float
    """Of their decoder rows."""
    correlation: float | None
    """Pearson's, of their values over the frames of a sound; None where either does not change."""


@dataclass(frozen=True)
class LiveScan:
    """A scan whose features can be evaluated on new sound."""

    name: str
    """`scan0`, ..., as the static page names it."""
    scan: Scan
    store: ActivationStore
    features: Features

    @property
    def site(self) -> str:
        return self.features.site

    @property
    def noun(self) -> str:
        """neuron, latent or direction."""
        return NOUNS.get(self.features.spec.partition(":")[0], "feature")

    @property
    def title(self) -> str:
        """As the static page has it."""
        kind, _, name = self.features.spec.partition(":")
        source = f"{location(name).name}, " if kind == "sae" else ""
        return f"{self.noun.capitalize()}s of {source}{self.site}"

    @property
    def model_sha256(self) -> str:
        return self.store.header.model["sha256"]

    @property
    def sites(self) -> list[str]:
        """The site that it reads and, of a transcoder, the one that it reconstructs."""
        return list(dict.fromkeys([self.site, *(self.features.dictionary.config.targets if isinstance(self.features, SaeLatents) else ())]))

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        return {name: self.scan.features[name].to_numpy().astype(np.float64) for name in ("mean", "std", "max", "density")}

    def number(self, name: str) -> np.ndarray:
        """float64 [count]: `mean`, `std`, `max` or `density` of each feature over the scan."""
        return self._numbers[name]

    def values(self, sound: Sound) -> np.ndarray:
        """Every feature at every frame: float32 [n_frames, count]."""
        return self.features.dense(sound.rows[self.model_sha256, self.site])

    def strength(self, values: np.ndarray, scale: str, feature: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Values [..., features] on a scale of `SCALES`, float64; NaN for a feature that never varied, or was never above zero, in the scan."""
        if scale not in SCALES:
            raise HearsaeError(f"there is no scale '{scale}': use {' or '.join(SCALES)}")
        mean, std, most = (self.number(name)[feature] for name in ("mean", "std", "max"))
        offset, unit = (mean, std) if scale == "z" else (0.0, most)
        return np.divide(values - offset, unit, out=np.full(values.shape, np.nan), where=unit > 0)

    def strongest(self, values: np.ndarray, scale: str, n: int) -> np.ndarray:
        """The features that reach highest on a scale, strongest first: int64 [at most n].

        values: [frames, count]; only features that are above zero in one of them.
        """
        most = values.max(axis=0)
        strength = np.where(most > 0, self.strength(most, scale), np.nan)
        order = np.argsort(-strength, kind="stable")[:n]  # NaN comes last
        return order[~np.isnan(strength[order])]

    def strips(self, values: np.ndarray, scale: str, feature: Iterable[int]) -> Strips:
        """These features, in this order, over the sound. Raises HearsaeError for one that does not exist."""
        wanted = np.array(list(feature), np.int64)
        for number in wanted.tolist():
            self.scan.check(number)
        own = values[:, wanted].T
        return Strips(wanted, np.ascontiguousarray(own), self.strength(own.max(axis=1), scale, wanted), own.argmax(axis=1))

    def fvu(self, sound: Sound) -> float | None:
        """Sum of ||x - x_hat||^2 over sum of ||x - mean||^2 over the frames of this sound, where mean is that of the store's rows.

        None where there is no SAE, or where a transcoder's target is not in the store.
        """
        if not isinstance(self.features, SaeLatents) or self._mean is None:
            return None
        (target,) = self.features.dictionary.config.targets
        rows, wanted = (torch.from_numpy(sound.rows[self.model_sha256, site].astype(np.float32)) for site in (self.site, target))
        with fast_matmul():
            error = (wanted - self.features.dictionary.reconstruct(rows)[0]).double().square().sum()
        return float(error / (wanted.double() - self._mean).square().sum())

    @cached_property
    def _mean(self) -> torch.Tensor | None:
        """float64 [d], of the rows that the SAE reconstructs; one read of all commit records."""
        target = self.sites[-1]
        return torch.from_numpy(self.store.stats(target).mean) if target in self.store.sites else None


class Live:
    """Scans, and the models that their stores were made with."""

    def __init__(self, scans: Sequence[LiveScan], models: dict[str, LoadedModel], left_out: Sequence[str] = ()) -> None:
        """models: by SHA-256. left_out: why scans are missing. Use `open`."""
        self.scans, self.models, self.left_out = list(scans), models, list(left_out)
        self.stores = {str(one.store.path): one.store for one in scans}
        self._wanted: dict[str, dict[str, str]] = {}
        for one in scans:
            for site in one.sites:
                self._wanted.setdefault(one.model_sha256, {})[site] = one.store.header.dtype

    @classmethod
    def open(cls, folders: Sequence[str | Location], models: Sequence[str] = (), store: str | Location | None = None, device: str = "auto") -> "Live":
        """Opens scans, their features and their models.

        models: checkpoints, or names of models, to look among first; then the model is looked for where the store's header says it was.
        store: where the scans' store is now, if it moved.
        Scans of decoder sites are left out: their rows depend on a text that new sound does not have; and those of trimmed windows.
        Raises HearsaeError where nothing is left, or a scan, a store, an SAE or a model is missing.
        """
        scans, left_out, opened = [], [], dict[str, ActivationStore]()
        for i, folder in enumerate(folders):
            scan = Scan.open(folder)
            if scan.info["site"].startswith("decoder."):
                left_out.append(f"{scan.info['features']} is of a decoder site, whose rows depend on a text: it can't be heard live")
                continue
            place = location(store if store is not None else scan.info["store"]).absolute()
            path = str(place)
            if path not in opened:
                opened[path] = ActivationStore.open(place)
            of_scan = opened[path]
            if of_scan.header.model["sha256"] != scan.info["model"]["sha256"] or scan.info["site"] not in of_scan.sites:
                raise HearsaeError(
                    f"{path} is not the store of the scan {scan.path}: it was made with another model, or has no site {scan.info['site']}"
                )
            if of_scan.header.context != PADDED:
                told = name_of_context(of_scan.header.context)
                left_out.append(f"{scan.info['features']} is of a store that is {told}: live, sound is heard in whole windows")
                continue
            features = open_features(scan.info["features"], of_scan, seed=scan.info["options"]["seed"])
            scans.append(LiveScan(f"scan{i}", scan, of_scan, features))
        if not scans:
            raise HearsaeError(f"none of these scans can be heard live: {'; '.join(left_out)}; name one of an encoder site, of whole windows")
        return cls(scans, _load_models([one.store for one in scans], models, device), left_out)

    def scan(self, name: str) -> LiveScan:
        """By its name, `scan0`, ... Raises HearsaeError if there is none."""
        for one in self.scans:
            if one.name == name:
                return one
        raise HearsaeError(f"there is no scan '{name}': there are {', '.join(one.name for one in self.scans)}")

    def hear(self, samples: np.ndarray) -> Sound:
        """Runs each model over float32 [n_samples] at 16 kHz, of which what is beyond its window (30 s) is left out.

        Raises HearsaeError where there is nothing to hear, or where a model gives what its store could not hold.
        """
        samples = np.ascontiguousarray(samples[: self.longest_samples], np.float32)
        if not len(samples):
            raise SourceError("there is no sound in it")
        n_frames = -(-len(samples) // SAMPLES_PER_FRAME)
        rows: dict[tuple[str, str], np.ndarray] = {}
        text, no_text = None, None
        for number, (sha256, wanted) in enumerate(self._wanted.items()):
            model = self.models[sha256]
            transcribed = number == 0 and model.has_decoder
            sites = match_sites([*wanted, *([ENCODED] if transcribed else [])], model.dims_dict, model.has_decoder)
            with fast_matmul():
                found = capture(model, log_mel(samples, model)[None], sites)
            for site, dtype in wanted.items():
                rows[sha256, site] = _as_stored(site, found[site][0, :n_frames].cpu().numpy(), dtype)
            if transcribed:
                text = transcribe(model, found[ENCODED])
            elif number == 0:
                no_text = "this checkpoint has the encoder alone, so there is no transcript"
        return Sound(samples, n_frames, rows, text, no_text)

    @property
    def longest_samples(self) -> int:
        """Of the shortest window of the models: 30 s of every Whisper."""
        return min(model.dims.n_audio_ctx for model in self.models.values()) * SAMPLES_PER_FRAME


def _load_models(stores: Sequence[ActivationStore], given: Sequence[str], device: str) -> dict[str, LoadedModel]:
    found: dict[str, LoadedModel] = {}
    for name in given:
        model = load_model(name, device)
        found[model.sha256] = model
    for store in stores:
        name, sha256 = str(store.header.model["name"]), store.header.model["sha256"]
        if sha256 in found:
            continue
        known, reason = name_of_checkpoint(sha256), "it is another one now"
        try:
            model = load_model(known or name, device)
        except ModelError as error:
            reason = str(error)
        else:
            if model.sha256 == sha256:
                found[sha256] = model
                continue
        raise ModelError(f"the model {sha256[:12]} ({name}) of {store.path} is not found: name its checkpoint with --model ({reason})")
    return found


def _as_stored(site: str, rows: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # looked for below
        kept = rows.astype(dtype)
    if not np.isfinite(kept).all():
        raise ModelError(f"{site} has values on this sound that {dtype} can't hold, so its store could not either")
    return kept


def transcribe(model: LoadedModel, encoded: torch.Tensor) -> str:
    """Whisper's own greedy transcript of an encoded window [1, n_audio_ctx, n_audio_state], without timestamps."""
    import whisper

    language = None if model.is_multilingual else "en"
    options = whisper.DecodingOptions(without_timestamps=True, fp16=False, language=language)
    with torch.inference_mode():
        return whisper.decode(model.module, encoded, options)[0].text.strip()


def matches(a: LiveScan, b: LiveScan, of_a: np.ndarray, of_b: np.ndarray, feature: Iterable[int]) -> list[Match]:
    """For some latents of one SAE the latent of another with the largest decoder cosine (2501.16615), and how alike the two are on a sound.

    of_a, of_b: what `values` gave, [n_frames, count] each. Raises HearsaeError with the reason where two scans can't be matched.
    """
    reason = unmatched(a, b)
    if reason:
        raise HearsaeError(reason)
    assert isinstance(a.features, SaeLatents) and isinstance(b.features, SaeLatents)
    wanted = np.array(list(feature), np.int64)
    rows_a, rows_b = (F.normalize(part, dim=1) for part in (a.features.dictionary.W_dec[wanted], b.features.dictionary.W_dec))
    with fast_matmul():
        cosine, other = (rows_a @ rows_b.t()).max(dim=1)
    return [
        Match(int(i), int(j), float(c), _correlation(of_a[:, i], of_b[:, j])) for i, j, c in zip(wanted, other.tolist(), cosine.tolist(), strict=True)
    ]


def unmatched(a: LiveScan, b: LiveScan) -> str | None:
    """Why the features of two scans have no matches; None if they have."""
    if not (isinstance(a.features, SaeLatents) and isinstance(b.features, SaeLatents)):
        return "only latents of two SAEs are matched, by their decoder rows"
    if a.model_sha256 != b.model_sha256:
        return "the two SAEs are of different models"
    if a.features.dictionary.config.targets != b.features.dictionary.config.targets:
        return "the two SAEs write to different sites"
    return None


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = (part.astype(np.float64) - part.mean(dtype=np.float64) for part in (x, y))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else None


def decode_upload(data: bytes, longest_samples: int) -> tuple[np.ndarray, float]:
    """An audio file -> (float32 [at most longest_samples] at 16 kHz, the whole file's duration in seconds). Through libsndfile, in memory.

    Raises SourceError for what is no audio, has none, or claims channels and samples a second that nobody records.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.samplerate < RATES[0] or file.samplerate * file.channels > MOST_SAMPLES_PER_S:
                raise SourceError(f"it claims {file.channels} channels at {file.samplerate} Hz, which nobody records")
            # Counted, not believed: headers of MP3 only estimate, and to count all of an hour takes a minute.
            n_heard = len(file.read(-(-longest_samples * file.samplerate // SAMPLE_RATE), dtype="float32"))
            duration_s = max(n_heard, file.frames if file.frames < UNKNOWN_LENGTH else 0) / file.samplerate
            n_samples = min(longest_samples, n_heard * SAMPLE_RATE // file.samplerate)
    except (soundfile.LibsndfileError, OSError, TypeError):
        raise SourceError("it is no audio file that libsndfile can read: WAV, FLAC, OGG or MP3") from None
    if not n_samples:
        raise SourceError("there is no sound in it")
    return decode(io.BytesIO(data), 0.0, n_samples), duration_s
