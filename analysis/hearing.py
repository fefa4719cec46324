"""What a Whisper hears in speech and in sounds without speech: the text it writes, whether that counts as silence, and what its features do."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.experiments.changes import worker_steerable
from analysis.experiments.effects import Tail
from analysis.experiments.errors import TextErrors, text_errors
from analysis.experiments.speech import Speech, worker_model
from analysis.interventions import decode_encoded, edit_site
from analysis.nonspeech import SPEECH_KINDS, make_sound
from analysis.steering import Edit, at_positions, edit_rows
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS, SAMPLE_RATE
from cache.model import LoadedModel, fast_matmul, log_mel
from cache.plan import SAMPLES_PER_FRAME

SPEECH = "speech"
RECORDED = "recorded"


class Rule(NamedTuple):
    """When a transcript counts as silence: that of `whisper.transcribe`, whose two thresholds these are."""

    no_speech: float = 0.6
    """Probability of the no-speech token above which a clip may be silent."""
    logprob: float = -1.0
    """It is silent if the mean log probability of its text lies below. At 0 the no-speech token alone decides."""

    def is_silent(self, text: str, no_speech: float, logprob: float) -> bool:
        """A text without a letter or digit is silence too: punctuation alone says nothing."""
        return not any(letter.isalnum() for letter in text) or (no_speech > self.no_speech and logprob < self.logprob)


class Item(NamedTuple):
    """A clip of speech, or a sound without."""

    kind: str
    number: int
    """Of speech and recordings the clip, else the number of the sound."""
    held_out: bool
    text: str | None
    """What is said; None in a sound without speech."""

    @property
    def is_speech(self) -> bool:
        return self.kind == SPEECH


class Heard(NamedTuple):
    """What Whisper makes of an item."""

    text: str
    no_speech: float
    logprob: float
    is_silent: bool
    duration_s: float
    """Of the item itself, without the padding."""

    @property
    def written(self) -> str:
        """The text, or nothing where it counts as silence."""
        return "" if self.is_silent else self.text


class Means(NamedTuple):
    """What a site has in an item."""

    values: np.ndarray
    """float32 [features]: means over the item's frames."""
    activations: np.ndarray
    """float32 [width]: the same of the site's activations."""


class Steer(NamedTuple):
    """A way of steering."""

    basis: str
    """`features`, `random` or `vector`."""
    spec: str
    """Whose features the edits name, as `analysis.steering` takes it."""
    how: str
    """`add` or `scale`."""
    n: int
    """Features that are edited; of a vector its width."""
    amount: float
    """Of `add` in differences of means, of `scale` the factor."""
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Sounds:
    """Speech, and sounds without speech: recordings, or made ones of some kinds. Opens nothing until asked."""

    speech: Speech
    nonspeech: Speech | None
    kinds: tuple[str, ...]
    per_kind: int
    seed: int

    @cached_property
    def _halves(self) -> tuple[list[int], list[int]]:
        """Clips of speech for training, and those held out: by speaker where there are four or more, else by clip."""
        clips = self.speech.clips
        by_speaker = len({clip.speaker for clip in clips}) >= 4 and all(clip.speaker for clip in clips)
        units = [clip.speaker if by_speaker else clip.clip for clip in clips]
        ordered = sorted(set(units), key=str)
        drawn = np.random.default_rng(self.seed).permutation(len(ordered))
        held_out = {ordered[i] for i in drawn[: len(ordered) // 2]}
        halves = [[clip.clip for clip, unit in zip(clips, units, strict=True) if (unit in held_out) == half] for half in (False, True)]
        if not all(halves):
            raise HearsaeError(f"{self.speech.dataset} has {len(clips)} clips, and at least 2 are needed: half of them are held out")
        return halves[0], halves[1]

    def items(self) -> list[Item]:
        """All of them; of every kind the sounds with odd numbers are held out."""
        found = []
        for held_out, clips in zip((False, True), self._halves, strict=True):
            found += [Item(SPEECH, clip, held_out, self.speech.clips[clip].text) for clip in clips]
        if self.nonspeech is not None:
            if len(self.nonspeech.clips) < 2:
                raise HearsaeError(f"{self.nonspeech.dataset} has one clip, and at least 2 are needed: half of them are held out")
            return found + [Item(RECORDED, clip.clip, clip.clip % 2 == 1, None) for clip in self.nonspeech.clips]
        return found + [Item(kind, number, number % 2 == 1, None) for kind in self.kinds for number in range(self.per_kind)]

    def audio(self, item: Item) -> np.ndarray:
        """float32 [n_samples], 16 kHz. Sounds that are made of speech are made of that of their half."""
        if item.is_speech:
            return self.speech.read(self.speech.clips[item.number])
        if item.kind == RECORDED and self.nonspeech is not None:
            return self.nonspeech.read(self.nonspeech.clips[item.number])
        own = self._halves[item.held_out]

        def of_half(number: int) -> np.ndarray:
            return self.speech.read(self.speech.clips[own[number // 2 % len(own)]])

        return make_sound(item.kind, item.number, self.seed, of_half if item.kind in SPEECH_KINDS else None).audio


@torch.no_grad()
def means(sounds: Sounds, name: str, device: str, spec: str, seed: int, items: Sequence[Item]) -> list[Means]:
    """What the features of `spec`, and their site, have in items. seed: of a random basis."""
    model = worker_model(name, device)
    steerable = worker_steerable(spec, name, device, seed)
    encoder = model.module.get_submodule("encoder")
    found: list[Means] = []
    for item in items:
        audio = sounds.audio(item)
        n = frames_of(audio, model, item)

        def keep(x: Tensor, n: int = n) -> Tensor:
            rows = x[0, :n].float()
            found.append(Means(*(part.mean(0).cpu().numpy() for part in (steerable.values(rows, range(steerable.count)), rows))))
            return x

        with fast_matmul(), edit_site(model.module, steerable.site, keep):
            encoder(log_mel(audio, model)[None])
    return found


@torch.no_grad()
def hear(
    sounds: Sounds, name: str, device: str, rule: Rule, site: str, seed: int, steers: Sequence[Steer | None], items: Sequence[Item]
) -> list[list[Heard]]:
    """For each item what Whisper makes of it under each way of steering, in the item's own frames. None: without.

    All steer the same encoder site. What comes before it is computed once. seed: of a random basis.
    """
    model = worker_model(name, device)
    tail = Tail(model, site)
    encoder = model.module.get_submodule("encoder")
    audio = [sounds.audio(item) for item in items]
    lengths = [frames_of(one, model, item) for one, item in zip(audio, items, strict=True)]
    with fast_matmul(), tail.remember():
        plain = [encoder(log_mel(one, model)[None])[0] for one in audio]
    columns = []
    for steer in steers:
        encoded = plain
        if steer is not None:
            change = edit_rows(worker_steerable(steer.spec, name, device, seed), steer.edits)
            encoded = [tail.encode(number, at_positions(change, [(0, n)])) for number, n in enumerate(lengths)]
        durations = [len(one) / SAMPLE_RATE for one in audio]
        columns.append([
            Heard(one.text, one.no_speech_prob, one.avg_logprob, rule.is_silent(one.text, one.no_speech_prob, one.avg_logprob), duration_s)
            for one, duration_s in zip(decode_encoded(model.module, encoded), durations, strict=True)
        ])  # fmt: skip
    return [list(of_item) for of_item in zip(*columns, strict=True)]


def frames_of(audio: np.ndarray, model: LoadedModel, item: Item) -> int:
    """Frames that an item's samples [n_samples] take. Raises HearsaeError where they are more than the model's window has."""
    n = -(-len(audio) // SAMPLES_PER_FRAME)
    if n > model.dims.n_audio_ctx:
        window_s = model.dims.n_audio_ctx * FRAME_SECONDS
        raise HearsaeError(f"{item.kind} {item.number} is {len(audio) / SAMPLE_RATE:.1f} s long, and {model.name} hears {window_s:.0f} s at once")
    return n


def false_detections(items: Sequence[Item], heard: Sequence[Heard]) -> float:
    """Share of the sounds without speech for which Whisper writes something."""
    return float(np.mean([not one.is_silent for item, one in zip(items, heard, strict=True) if not item.is_speech]))


def errors_of(items: Sequence[Item], heard: Sequence[Heard]) -> TextErrors:
    """Of the speech among the items. What counts as silence is not written."""
    both = [(item.text or "", one.written) for item, one in zip(items, heard, strict=True) if item.is_speech]
    return text_errors([said for said, _ in both], [written for _, written in both])
