"""What excites a feature most: an input found by gradient ascent, made into sound, and heard again by the model."""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from analysis.ascent import AscentSettings, ascend, random_starts, window_rows
from analysis.ascent_targets import Latent, Negated, Neuron, Probe, open_probe, random_direction
from analysis.experiments.report import Report
from analysis.experiments.sonify_figures import Heard, feature_figure, gains_figure
from analysis.experiments.speech import Clip, Mapper, Speech, clip_mel, in_this_process, worker_model
from analysis.inversion import sound_of
from analysis.steering import site_of
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS, SAMPLE_RATE
from cache.model import LoadedModel, capture, fast_matmul, log_mel, random_twin
from cache.plan import SAMPLES_PER_FRAME

FEATURE, DIRECTION, WEIGHTS = "feature", "random direction", "random weights"
"""What is climbed: the feature, and the two controls."""
LEAST_ACTIVE = 0.01
"""Standard deviations of its score by which a feature's strongest moment must pass its mean for a gain to have a meaning: a GELU may be shut
throughout."""
SHORTEST_PADDING = 3
"""Frames behind the sound that a window must have: what a trimmed window keeps."""


class Climb(NamedTuple):
    """One thing to climb."""

    number: int
    kind: str
    """FEATURE, DIRECTION or WEIGHTS."""


class Real(NamedTuple):
    """What something to climb does on real speech."""

    frames: int
    score_sum: float
    score_squares: float
    value_sum: float
    strongest: float
    """The highest mean value over a span; -inf where no clip is as long."""
    score_there: float
    """The mean score there: of several spans with the same value the one with the highest."""
    clip: int
    frame: int
    """The span's first, within the clip."""
    ceiling: float
    """The loudest point of all log-mels."""

    def __add__(self, other: "Real") -> "Real":  # type: ignore[override]
        best = max(self, other, key=lambda one: (one.strongest, one.score_there, -one.clip))
        sums = (self.frames + other.frames, self.score_sum + other.score_sum, self.score_squares + other.score_squares)
        value_sum, ceiling = self.value_sum + other.value_sum, max(self.ceiling, other.ceiling)
        return Real(*sums, value_sum, best.strongest, best.score_there, best.clip, best.frame, ceiling)

    @property
    def mean_value(self) -> float:
        return self.value_sum / self.frames

    @property
    def spread(self) -> float:
        """Standard deviation of the score."""
        return max((self.score_squares / self.frames - (self.score_sum / self.frames) ** 2) ** 0.5, 1e-6)


class Climbed(NamedTuple):
    """An ascent's outcome; values are means over the span, all measured in the whole window."""

    optimised: float
    audio: float
    """Of the sound, heard through the real front end."""
    silence: float
    starts: list[dict[str, Any]]
    """From where each ascent began, the value there and in the end."""
    sound: bytes
    """FLAC."""
    loudness: float
    """What the sound was multiplied with to stay within full scale; 1 where it did."""
    heard: list[Heard]
    """For the picture: the optimised input, its sound, and the strongest real moment."""


def sonify(
    speech: Speech,
    model: str,
    features: str,
    numbers: Sequence[int],
    settings: AscentSettings | None = None,
    negate: bool = False,
    seed: int = 0,
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Climbs each of the features, a random direction of its site, and the same feature in the model with random weights.

    features: `neurons:SITE` or `sae:DIR`. numbers: which of them. negate: descend to the lowest value instead.
    speech: gives each feature's strongest real moment, where one ascent begins, and the scale of its values.
    Raises HearsaeError for features that can't be read or climbed, and a sound that does not fit the model's window.
    """
    settings = settings or AscentSettings()
    numbers = list(dict.fromkeys(numbers))
    if not numbers:
        raise HearsaeError("--feature: give the number of one feature or more")
    loaded = worker_model(model, device)
    probes = [open_probe(features, number, loaded) for number in numbers]
    if settings.frames > loaded.dims.n_audio_ctx - SHORTEST_PADDING:
        raise HearsaeError(
            f"--seconds {settings.seconds:g} is too long: {model} hears {loaded.dims.n_audio_ctx * FRAME_SECONDS:g} s, padding included"
        )
    control = random_twin(model, seed)
    climbs = [Climb(number, kind) for number in numbers for kind in (FEATURE, DIRECTION, WEIGHTS)]
    work = Work(speech, model, control, features, settings, negate, seed, device)
    parts = map_pieces(partial(_listen, work, climbs), speech.pieces())
    real = [sum(of_climb[1:], of_climb[0]) for of_climb in zip(*parts, strict=True)]
    if real[0].clip < 0:
        raise HearsaeError(f"no clip of {speech.dataset} has the {settings.span} frames of --span: take a shorter span, or other speech")
    done = map_pieces(partial(_climb, work), list(zip(climbs, real, strict=True)))
    return _report(work, probes, climbs, real, done)


class Work(NamedTuple):
    """What every worker must know."""

    speech: Speech
    model: str
    control: str
    """The model with random weights."""
    features: str
    settings: AscentSettings
    negate: bool
    seed: int
    device: str

    def open(self, climb: Climb) -> tuple[LoadedModel, Probe]:
        model = worker_model(self.control if climb.kind == WEIGHTS else self.model, self.device)
        probe: Probe = self._direction(climb, model) if climb.kind == DIRECTION else open_probe(self.features, climb.number, model, False)
        return model, Negated(probe) if self.negate else probe

    def _direction(self, climb: Climb, model: LoadedModel) -> Probe:
        probe, site = open_probe(self.features, climb.number, model), self.features.partition(":")[2]
        width = site_of(site, model).width if isinstance(probe, Neuron) else 0
        return random_direction(probe, site, width, self.seed + climb.number)


# On real speech


def _listen(work: Work, climbs: Sequence[Climb], clips: Sequence[Clip]) -> list[Real]:
    """What each does on these clips."""
    opened = [work.open(climb) for climb in climbs]
    totals: list[Real | None] = [None] * len(climbs)
    for name in {model.name: model for model, _ in opened}.values():
        mine = [(at, probe) for at, (model, probe) in enumerate(opened) if model is name]
        sites = list({probe.site: site_of(probe.site, name) for _, probe in mine}.values())
        for clip in clips:
            mel = clip_mel(name, work.speech, clip)
            with fast_matmul():
                found = capture(name, mel[None], sites)
            for at, probe in mine:
                one = _real(probe, found[probe.site][0, : clip.n_frames].clone(), clip, float(mel.max()), work.settings)
                before = totals[at]
                totals[at] = one if before is None else before + one
    return [one for one in totals if one is not None]


@torch.no_grad()
def _real(probe: Probe, rows: Tensor, clip: Clip, ceiling: float, settings: AscentSettings) -> Real:
    score, value = probe.score(rows).double(), probe.value(rows).double()
    sums = (len(rows), float(score.sum()), float(score.square().sum()), float(value.sum()))
    if len(rows) < settings.span:
        return Real(*sums, -np.inf, -np.inf, -1, -1, ceiling)
    values, scores = (of.unfold(0, settings.span, 1).mean(-1) for of in (value, score))
    best = int(torch.where(values == values.max(), scores, -torch.inf).argmax())
    return Real(*sums, float(values[best]), float(scores[best]), clip.clip, best, ceiling)


def _moment(work: Work, model: LoadedModel, real: Real) -> tuple[Tensor, int]:
    """The whole log-mel of the clip with the strongest real moment, and where in it, in frames, a stretch begins whose span is that moment.

    Below 0 where the moment is earlier in its clip than the span in its stretch.
    """
    clip = next(clip for clip in work.speech.clips if clip.clip == real.clip)
    return clip_mel(model, work.speech, clip), real.frame - work.settings.first


def _stretch(of: Tensor, first: int, length: int, beyond: float) -> Tensor:
    """[..., n] -> [..., length] from `first` on; `beyond` where there is nothing."""
    out = torch.full((*of.shape[:-1], length), beyond, device=of.device)
    start, stop = max(first, 0), min(first + length, of.shape[-1])
    out[..., start - first : stop - first] = of[..., start:stop]
    return out


# The ascent


def _climb(work: Work, piece: tuple[Climb, Real]) -> Climbed:
    (climb, real), settings = piece, work.settings
    model, probe = work.open(climb)
    site = site_of(probe.site, model)
    sign = -1 if work.negate else 1
    generator = torch.Generator().manual_seed(work.seed)

    @torch.no_grad()
    def values(mel: Tensor) -> Tensor:
        return probe.value(window_rows(model, mel, site)).cpu()

    clip, first = _moment(work, model, real)
    moment = _stretch(clip, 2 * first, 2 * settings.frames, float(clip.min()))
    noise = random_starts(settings.starts, model.dims.n_mels, settings.frames, real.ceiling, generator)
    starts = torch.cat([noise.to(model.device), moment[None]])
    found = ascend(model, probe, starts, real.ceiling, real.spread, settings, generator)
    ends = torch.stack([settings.mean(values(mel)) for mel in found.mel])
    best = int(ends.argmax())
    names = [f"noise {number}" for number in range(settings.starts)] + ["strongest real moment"]
    begins = [float(settings.mean(values(mel))) for mel in starts]
    table = [{"start": name, "before": sign * a, "after": sign * float(b)} for name, a, b in zip(names, begins, ends, strict=True)]

    mel = found.mel[best]
    sound, loudness = _flac(sound_of(mel, work.seed).numpy())
    again = log_mel(soundfile.read(io.BytesIO(sound), dtype="float32")[0], model)
    silent = log_mel(np.zeros(settings.frames * SAMPLES_PER_FRAME, np.float32), model)
    over_time = [values(mel), values(again)[: settings.frames], _stretch(values(clip), first, settings.frames, torch.nan)]
    seen = [mel, again[:, : mel.shape[1]], moment]
    names = ["the input found", "its sound, heard again", "strongest real moment"]
    heard = [Heard(name, one.cpu().numpy(), (sign * value).numpy()) for name, one, value in zip(names, seen, over_time, strict=True)]
    optimised, audio, silence = (sign * float(settings.mean(of[: settings.frames])) for of in (over_time[0], over_time[1], values(silent)))
    return Climbed(optimised, audio, silence, table, sound, loudness, heard)


def _flac(samples: np.ndarray) -> tuple[bytes, float]:
    """Within full scale, as 16 bits keep it; and what that took."""
    loudness = min(1.0, 0.99 / max(float(np.abs(samples).max()), 1e-9))
    data = io.BytesIO()
    soundfile.write(data, samples * loudness, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return data.getvalue(), loudness


# The report


def _report(work: Work, probes: Sequence[Neuron | Latent], climbs: Sequence[Climb], real: Sequence[Real], done: Sequence[Climbed]) -> Report:
    sign = -1 if work.negate else 1
    rows = [_row(work, *one, sign) for one in zip(climbs, real, done, strict=True)]
    word = "neuron" if isinstance(probes[0], Neuron) else "latent"
    figures: dict[str, Any] = {"gains": gains_figure(rows, word)}
    captions = {"gains": "How far each input goes, in steps from the mean on real speech (0) to the strongest real moment (1)."}
    sounds: dict[str, bytes] = {}
    for climb, one, row in zip(climbs, done, rows, strict=True):
        name = f"{word}-{climb.number}" + {FEATURE: "", DIRECTION: "-random-direction", WEIGHTS: "-random-weights"}[climb.kind]
        sounds[f"{name}.flac"] = one.sound
        if climb.kind == FEATURE:
            figures[name] = feature_figure(one.heard, work.settings.first, work.settings.span)
            captions[name] = (
                f"{word} {climb.number}: the input found ({row['optimised']:.3g}), its sound as the model hears it ({row['audio']:.3g}), and the "
                f"strongest real moment, in its own clip ({row['strongest']:.3g}; clip {row['clip']}, {row['start_s']:.2f} s)."
            )
    summary = {
        "features": work.features,
        "negate": work.negate,
        "by_feature": {str(row["feature"]): _numbers(row) for row in rows if row["of"] == FEATURE},
        "control": {kind: {str(row["feature"]): _numbers(row) for row in rows if row["of"] == kind} for kind in (DIRECTION, WEIGHTS)},
        "clips": len(work.speech.clips),
        "frames": real[0].frames,
    }
    columns = ("feature", "of", "optimised", "audio", "strongest", "silence", "real_mean", "gain", "gain_audio")
    return Report(
        title="Sonify",
        what=_what(work, word),
        rows=rows,
        summary=summary,
        figures=figures,
        captions=captions,
        tables={
            "Values": [{name: row[name] for name in columns} for row in rows],
            "Starts": [{"feature": row["feature"], "of": row["of"], **start} for row in rows for start in row["starts"]],
        },
        sounds=sounds,
        lines=_lines(rows, word, len(work.speech.clips)),
    )


def _row(work: Work, climb: Climb, real: Real, done: Climbed, sign: int) -> dict[str, Any]:
    mean, strongest = sign * real.mean_value, sign * real.strongest

    def gain(value: float) -> float | None:
        is_ever_active = abs(strongest - mean) > LEAST_ACTIVE * real.spread
        return (value - mean) / (strongest - mean) if is_ever_active else None

    clip = next(clip for clip in work.speech.clips if clip.clip == real.clip)
    return {
        "feature": climb.number, "of": climb.kind, "optimised": done.optimised, "audio": done.audio, "strongest": strongest,
        "silence": done.silence, "real_mean": mean, "gain": gain(done.optimised), "gain_audio": gain(done.audio),
        "gain_silence": gain(done.silence), "clip": clip.clip, "source": clip.source, "start_s": clip.start_s + real.frame * FRAME_SECONDS,
        "loudness": done.loudness, "starts": done.starts,
    }  # fmt: skip


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("optimised", "audio", "strongest", "silence", "real_mean", "gain", "gain_audio")}


def _what(work: Work, word: str) -> str:
    settings = work.settings
    goal = "lowest" if work.negate else "highest"
    return (
        f"For each {word} the log-mel spectrogram of {settings.seconds:g} s that makes its value {goal} in the middle, on the mean over "
        f"{settings.span} frames of 20 ms: gradient ascent from noise and from the strongest moment of the speech, kept smooth, quiet and within the "
        "range of Whisper's front end. Then a sound with about that spectrogram, which goes through the real front end and the model again. All "
        "values are measured in Whisper's whole window.\n\n"
        "A gain says how far a value is on the way from the feature's mean on the speech (0) to its strongest moment there (1). That an input can be "
        "found that goes beyond is no evidence that the feature means anything: the controls, climbed in the same way, are a random direction of "
        "the same site and the same feature in the model with random weights. What the sound keeps of the value is what a loudspeaker could play; "
        "the rest was in a spectrogram that no sound has."
    )


def _lines(rows: Sequence[dict[str, Any]], word: str, clips: int) -> list[str]:
    def gain(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    lines = [f"{clips} clips; gain: 0 is the mean on them, 1 the strongest moment"]
    for row in rows:
        name = f"{word} {row['feature']}" if row["of"] == FEATURE else f"  control, {row['of']}"
        lines.append(
            f"{name}: optimised {row['optimised']:.3g} (gain {gain(row['gain'])}), its sound {row['audio']:.3g} (gain {gain(row['gain_audio'])}), "
            f"strongest real {row['strongest']:.3g}, silence {row['silence']:.3g}"
        )
    return lines
