"""From clips to batches: augmentation, and the targets of tokens, phones, words and alignment. The same in every run of as many processes."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.tokenizer import Tokenizer, get_tokenizer

from cache.header import SAMPLE_RATE
from cache.micro.recipe import grammar
from cache.micro.recipe.synthesis import PHONES
from cache.micro.recipe.training_set import MAX_SECONDS, TrainingClip, training_sentence

FRAMES_PER_SECOND = 50
IGNORE = -100
TIMESTAMP_STEP = 5
"""Timestamps are trained in steps of 0.1 s, 5 of Whisper's."""
LAST_TIMESTAMP = 110

# Shares of clips
EMPTY, TEXT_ON_PADDING, LOST_WORD, TIMESTAMPS = 0.03, 0.04, 0.15, 0.2

CHOPPED_FROM, LOST_WORD_LATER, CHOPPED = 0.5, 0.3, 0.8
"""In the second half of the run more clips lose a word, and most of those lose it between encoder and decoder: see `Batch.chopped`."""

FIRST_SECONDS, RAMP = 2.0, 0.4
"""The longest clips at the start, and the share of the run after which all take part."""
_POOL = 24
"""Batches that are drawn together, then sorted by length so that a batch's clips are alike."""


@dataclass
class Batch:
    samples: Tensor
    """float32 [batch, n], n = 160 (2 frames + 4)."""
    warp: Tensor
    """float32 [batch]."""
    equaliser: Tensor
    """float32 [batch, 80]."""
    frames: int
    phones: Tensor
    """int64 [batch, frames]."""
    words: Tensor
    """int64 [batch, frames], 0 silence, IGNORE between phones of no word."""
    tokens: Tensor
    """int64 [batch, n], decoder input."""
    targets: Tensor
    """int64 [batch, n], IGNORE where nothing is asked."""
    spans: Tensor
    """bool [batch, n, frames]: where the token that follows is said (to write a word is to look at it); all False for what has no place."""
    chopped: Tensor
    """bool [batch, frames]: a word that is said, but that the decoder must neither see nor write: it sees what the encoder makes of silence."""

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Batch(**moved)


class Vocabulary:
    """The tokens in use, and their places in micro's small embedding."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = get_tokenizer(multilingual=False)
        t = self.tokenizer
        spoken = {token for word in grammar.vocabulary() for form in (word, word.capitalize()) for token in t.encode(" " + form)}
        punctuation = {t.encode(mark)[0] for mark in ",.?"}
        special = {t.sot, t.no_timestamps, t.eot, t.no_speech} | {t.timestamp_begin + TIMESTAMP_STEP * i for i in range(LAST_TIMESTAMP + 1)}
        self.used = sorted(spoken | punctuation | special)
        self.place = {token: place for place, token in enumerate(self.used)}

    def timestamp(self, seconds: float) -> int:
        return self.tokenizer.timestamp_begin + TIMESTAMP_STEP * min(LAST_TIMESTAMP, max(0, round(seconds * 10)))


@dataclass
class _Item:
    """One clip as it goes into a batch."""

    samples: np.ndarray
    phones: np.ndarray
    words: np.ndarray
    tokens: list[int]
    targets: list[int]
    spans: list[tuple[int, int] | None]
    """Of the first len(spans) positions of `tokens`."""
    chopped: tuple[int, int] = (0, 0)


class Batches:
    """The batches of a whole training run: short clips first, ever longer ones until RAMP of the run is over."""

    def __init__(self, clips: Sequence[TrainingClip], vocabulary: Vocabulary, size: int, steps: int, seed: int) -> None:
        self.clips, self.vocabulary, self.size, self.steps, self.seed = clips, vocabulary, size, steps, seed
        self.word_index = {word: index for index, word in enumerate(sorted({word.lower() for word in grammar.vocabulary()}), start=1)}
        self._pool: tuple[int, list[list[int]]] = (-1, [])

    @cached_property
    def _noises(self) -> list[np.ndarray]:
        return _noises()

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The share of rank `rank` of `world` in the batch of a step."""
        pool, place = divmod(step, _POOL)
        if self._pool[0] != pool:
            self._pool = (pool, self._draw(pool))
        chosen = self._pool[1][place][rank::world]
        items = [self._item(self.clips[clip], random.Random(f"{self.seed} {step} {clip}"), step) for clip in chosen]
        return self._collate(items, random.Random(f"{self.seed} {step} rank {rank}"))

    def _draw(self, pool: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} pool {pool}")
        max_seconds = FIRST_SECONDS + (MAX_SECONDS - FIRST_SECONDS) * pool * _POOL / (RAMP * self.steps)
        short = [index for index, clip in enumerate(self.clips) if clip.count <= max_seconds * SAMPLE_RATE]
        drawn = sorted(rng.sample(short, _POOL * self.size), key=lambda index: self.clips[index].count)
        batches = [drawn[first : first + self.size] for first in range(0, len(drawn), self.size)]
        rng.shuffle(batches)
        return batches

    def _item(self, clip: TrainingClip, rng: random.Random, step: int) -> _Item:
        kind = rng.random()
        if kind < EMPTY:
            return self._empty(clip, rng)
        if kind < EMPTY + TEXT_ON_PADDING:
            return self._text_on_padding(clip, rng)
        return self._spoken(clip, rng, is_late=step >= CHOPPED_FROM * self.steps)

    def _spoken(self, clip: TrainingClip, rng: random.Random, is_late: bool) -> _Item:
        tokenizer = self.vocabulary.tokenizer
        samples, tokens = clip.samples(), tokenizer.encode(" " + clip.text)
        spans, words, phones = _token_spans(clip, tokens, tokenizer), clip.words, clip.phones
        lost: tuple[float, float] | None = None
        if len(words) > 1 and rng.random() < (LOST_WORD_LATER if is_late else LOST_WORD):
            number = rng.randrange(len(words))
            _, start, end = words[number]
            kept = [index for index, span in enumerate(spans) if span is None or not (span[0] < end and span[1] > start)]
            tokens, spans = [tokens[index] for index in kept], [spans[index] for index in kept]
            if is_late and rng.random() < CHOPPED:
                lost = start, end
            else:
                margin = rng.uniform(-0.02, 0.06)
                samples[max(0, round((start - margin) * SAMPLE_RATE)) : round((end + margin) * SAMPLE_RATE)] = 0
                words = words[:number] + words[number + 1 :]
                phones = [phone if phone[2] <= start or phone[1] >= end else ["SIL", *phone[1:]] for phone in phones]

        speed = rng.uniform(0.86, 1.16) if rng.random() < 0.7 else 1.0
        if speed != 1.0:
            stretched = F.interpolate(torch.from_numpy(samples)[None, None], size=int(len(samples) * speed), mode="linear")
            samples = stretched[0, 0].numpy()
        samples *= 10 ** (-rng.uniform(0, 24) / 20) / max(float(np.abs(samples).max()), 1e-6)
        loudness = float(np.sqrt(np.mean(samples**2)))
        lead = rng.uniform(0, 1) if rng.random() < 0.4 else rng.uniform(0, 0.15)
        trail = rng.uniform(0, 0.5) if rng.random() < 0.6 else 0.0
        samples = np.concatenate([np.zeros(int(lead * SAMPLE_RATE), np.float32), samples, np.zeros(int(trail * SAMPLE_RATE), np.float32)])
        if rng.random() < 0.65:
            samples += self._noise(len(samples), loudness * 10 ** (-rng.uniform(8, 45) / 20), rng)

        def frame(seconds: float) -> int:
            return math.ceil((seconds * speed + lead) * FRAMES_PER_SECOND)

        count = len(samples) // 320 + 2
        phone_targets = np.zeros(count, np.int64)
        for phone, start, end in phones:
            phone_targets[frame(start) : frame(end)] = PHONES.index(phone)
        word_targets = np.where(phone_targets > 0, IGNORE, 0)
        for word, start, end in words:
            word_targets[frame(start) : frame(end)] = self.word_index[word.lower()]
        margin_frames = rng.randint(0, 3) if lost else 0
        chopped = (max(0, frame(lost[0]) - margin_frames), frame(lost[1]) + margin_frames) if lost else (0, 0)
        places = [span and (frame(span[0]) - 1, frame(span[1]) + 1) for span in spans]

        if rng.random() < TIMESTAMPS:
            starts = [span[0] * speed + lead for span in spans if span]
            ends = [span[1] * speed + lead for span in spans if span]
            marks = [self.vocabulary.timestamp(min(1.0, min(starts))), self.vocabulary.timestamp(max(ends))]
            text = [marks[0], *tokens, marks[1]]
            return _Item(samples, phone_targets, word_targets, [tokenizer.sot, *text], [*text, tokenizer.eot], [None, *places], chopped)
        start_of_text = [tokenizer.sot, tokenizer.no_timestamps]
        targets = [tokenizer.no_timestamps, *tokens, tokenizer.eot]
        return _Item(samples, phone_targets, word_targets, [*start_of_text, *tokens], targets, [None, *places], chopped)

    def _empty(self, clip: TrainingClip, rng: random.Random) -> _Item:
        t = self.vocabulary.tokenizer
        return self._silence(clip, rng, [t.sot, t.no_timestamps], [t.no_speech, t.eot])

    def _text_on_padding(self, clip: TrainingClip, rng: random.Random) -> _Item:
        """Teaches the decoder the language alone: what follows a first token that nobody said."""
        t = self.vocabulary.tokenizer
        tokens = t.encode(" " + training_sentence(rng))
        return self._silence(clip, rng, [t.sot, t.no_timestamps, *tokens], [IGNORE, IGNORE, *tokens[1:], t.eot])

    def _silence(self, clip: TrainingClip, rng: random.Random, tokens: list[int], targets: list[int]) -> _Item:
        samples = np.zeros(rng.randint(SAMPLE_RATE // 5, max(SAMPLE_RATE // 2, clip.count)), np.float32)
        if rng.random() < 0.6:
            samples += self._noise(len(samples), 10 ** (-rng.uniform(20, 80) / 20), rng)
        count = len(samples) // 320 + 2
        return _Item(samples, np.zeros(count, np.int64), np.zeros(count, np.int64), tokens, targets, [None] * len(tokens))

    def _noise(self, count: int, level: float, rng: random.Random) -> np.ndarray:
        noise = rng.choice(self._noises)
        first = rng.randrange(len(noise) - count)
        return level * noise[first : first + count]

    def _collate(self, items: list[_Item], rng: random.Random) -> Batch:
        frames = max(math.ceil(len(item.samples) / 320) for item in items) + 5
        length, place = max(len(item.tokens) for item in items), self.vocabulary.place
        samples = np.zeros((len(items), (2 * frames + 4) * 160), np.float32)
        phones, words = np.zeros((len(items), frames), np.int64), np.zeros((len(items), frames), np.int64)
        tokens, targets = np.zeros((len(items), length), np.int64), np.full((len(items), length), IGNORE)
        spans, chopped = np.zeros((len(items), length, frames), bool), np.zeros((len(items), frames), bool)
        for row, item in enumerate(items):
            samples[row, : len(item.samples)] = item.samples
            count = min(frames, len(item.phones))
            phones[row, :count], words[row, :count] = item.phones[:count], item.words[:count]
            tokens[row, : len(item.tokens)] = [place[token] for token in item.tokens]
            targets[row, : len(item.targets)] = [place.get(token, IGNORE) for token in item.targets]
            chopped[row, slice(*item.chopped)] = True
            for token, span in enumerate(item.spans):
                if span:
                    spans[row, token, max(0, span[0]) : span[1]] = True
        arrays = {"samples": samples, "phones": phones, "words": words, "tokens": tokens, "targets": targets, "spans": spans, "chopped": chopped}
        arrays["warp"] = np.array([rng.uniform(0.92, 1.08) if rng.random() < 0.6 else 1.0 for _ in items], np.float32)
        arrays["equaliser"] = np.stack([_equaliser(rng) for _ in items])
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(frames=frames, **tensors)


def _token_spans(clip: TrainingClip, tokens: list[int], tokenizer: Tokenizer) -> list[tuple[float, float] | None]:
    """Start and end, in seconds, of the word that each token belongs to; None for punctuation."""
    text, places, found = " " + clip.text, [], 0
    for word, start, end in clip.words:
        first = text.index(word, found)
        found = first + len(word)
        places.append((first, found, start, end))
    spans: list[tuple[float, float] | None] = []
    position = 0
    for token in tokens:
        stop = position + len(tokenizer.decode([token]))
        said = next(((start, end) for first, last, start, end in places if first < stop and last > position), None)
        spans.append(said)
        position = stop
    return spans


def _equaliser(rng: random.Random) -> np.ndarray:
    """A gentle tilt and ripple over the mel bands, in log10 energy: float32 [80]."""
    band = np.linspace(-1, 1, 80, dtype=np.float32)
    if rng.random() >= 0.6:
        return np.zeros_like(band)
    return band * rng.uniform(-0.6, 0.6) + 0.25 * rng.uniform(-1, 1) * np.cos(3.14 * rng.uniform(1, 4) * band + rng.uniform(0, 6))


def _noises(seconds: int = 40) -> list[np.ndarray]:
    """Noises of unit power, float32: five colours that swell slowly, and mains hum."""
    rng, count = np.random.default_rng(0), seconds * SAMPLE_RATE
    time = np.arange(count) / SAMPLE_RATE
    noises = [np.sum([np.sin(2 * np.pi * 60 * harmonic * time + harmonic) / harmonic for harmonic in range(1, 12)], axis=0)]
    for colour in (-0.5, 0, 0.5, 1.0, 1.5):
        spectrum = np.fft.rfft(rng.standard_normal(count))
        spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** colour
        noises.append(np.fft.irfft(spectrum, count) * (1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * time)))
    return [(noise / noise.std()).astype(np.float32) for noise in noises]
