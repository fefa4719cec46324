"""Sound in which nobody speaks, made from seeds: what a speech model must stay silent on.

Every sound follows from its kind, its number and the seed alone. The kinds that make use of speech, `reversed` and `scrambled`, have nothing left in
them that anybody said, but sound like a voice: the hardest cases.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cache.errors import HearsaeError
from cache.header import SAMPLE_RATE

SHORTEST_S, LONGEST_S = 2.0, 8.0
"""Lengths of sounds, drawn evenly. Speech to compare them with is mostly of this length."""
QUIETEST, LOUDEST = 0.01, 0.3
"""Root mean square of sounds, drawn evenly in decibels. Full scale is 1; speech has about 0.1."""
FRAGMENT_S = 0.08
"""Length of what `scrambled` puts in another order: about a phone."""
SPEECH_KINDS = ("reversed", "scrambled")


class Sound(NamedTuple):
    """A sound without speech."""

    kind: str
    number: int
    audio: np.ndarray
    """float32 [n_samples], 16 kHz."""


def _coloured(random: np.random.Generator, n: int, slope: float) -> np.ndarray:
    """Noise whose power falls with the frequency to the power of `slope`: 0 white, 1 pink, 2 brown; nothing below 20 Hz."""
    spectrum = np.fft.rfft(random.standard_normal(n))
    frequency = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    return np.fft.irfft(np.where(frequency >= 20, spectrum / np.maximum(frequency, 20) ** (slope / 2), 0), n)


def _time(n: int) -> np.ndarray:
    return np.arange(n) / SAMPLE_RATE


def _hum(random: np.random.Generator, n: int) -> np.ndarray:
    """Mains: 50 or 60 Hz and its multiples, weaker and weaker."""
    base = random.choice([50, 60])
    return sum(np.sin(2 * np.pi * base * i * _time(n) + random.uniform(0, 2 * np.pi)) / i ** random.uniform(0.5, 2) for i in range(1, 9))


def _tones(random: np.random.Generator, n: int) -> np.ndarray:
    """Notes of a tenth of a second to a second, between 150 and 2,000 Hz, with overtones that fade."""
    sound = np.zeros(n)
    at = 0
    while at < n:
        length = min(int(random.uniform(0.1, 1.0) * SAMPLE_RATE), n - at)
        time, pitch = _time(length), np.exp(random.uniform(np.log(150), np.log(2000)))
        fade = np.exp(-time * random.uniform(0, 6)) * np.minimum(1, time / 0.01)
        sound[at : at + length] = fade * sum(np.sin(2 * np.pi * pitch * i * time) / i**2 for i in range(1, 5))
        at += length + int(random.uniform(0, 0.3) * SAMPLE_RATE)
    return sound


def _clicks(random: np.random.Generator, n: int) -> np.ndarray:
    """Some clicks or knocks a second, each a burst that fades within milliseconds."""
    sound = 1e-4 * random.standard_normal(n)
    for start in random.integers(0, n, max(2, int(n / SAMPLE_RATE * random.uniform(1, 10)))):
        length = min(int(random.uniform(0.002, 0.05) * SAMPLE_RATE), n - start)
        sound[start : start + length] += random.standard_normal(length) * np.exp(-6 * np.arange(length) / max(1, length))
    return sound


def _chirps(random: np.random.Generator, n: int) -> np.ndarray:
    """Sweeps between 300 and 6,000 Hz, as of birds and sirens."""
    sound = np.zeros(n)
    at = 0
    while at < n:
        length = min(int(random.uniform(0.05, 0.8) * SAMPLE_RATE), n - at)
        start, stop = np.exp(random.uniform(np.log(300), np.log(6000), 2))
        phase = np.cumsum(np.linspace(start, stop, length)) / SAMPLE_RATE
        sound[at : at + length] = np.sin(2 * np.pi * phase) * np.hanning(length)
        at += length + int(random.uniform(0, 0.4) * SAMPLE_RATE)
    return sound


def _modulated(random: np.random.Generator, n: int) -> np.ndarray:
    """Noise in a band, whose loudness goes up and down 2 to 8 times a second, as that of speech does."""
    spectrum = np.fft.rfft(random.standard_normal(n))
    frequency = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    low = np.exp(random.uniform(np.log(100), np.log(1500)))
    band = np.fft.irfft(np.where((frequency > low) & (frequency < low * random.uniform(1.5, 4)), spectrum, 0), n)
    return band * (0.5 + 0.5 * np.sin(2 * np.pi * random.uniform(2, 8) * _time(n) + random.uniform(0, 6))) ** 2


def _buzz(random: np.random.Generator, n: int) -> np.ndarray:
    """Pulses at the pitch of a voice through a resonance that wanders, as of engines and insects: voiced, and no vowel."""
    time = _time(n)
    pitch = random.uniform(80, 250) * (1 + 0.1 * np.sin(2 * np.pi * random.uniform(0.2, 3) * time))
    pulses = np.diff(np.floor(np.cumsum(pitch) / SAMPLE_RATE), prepend=0)
    ring = np.exp(-_time(400) * 300) * np.sin(2 * np.pi * random.uniform(300, 2500) * _time(400))
    return np.convolve(pulses, ring)[:n] * (0.6 + 0.4 * np.sin(2 * np.pi * random.uniform(0.5, 4) * time))


MADE: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "silence": lambda random, n: np.zeros(n),
    "white": lambda random, n: _coloured(random, n, 0.0),
    "pink": lambda random, n: _coloured(random, n, 1.0),
    "brown": lambda random, n: _coloured(random, n, 2.0),
    "hum": _hum,
    "tones": _tones,
    "clicks": _clicks,
    "chirps": _chirps,
    "modulated": _modulated,
    "buzz": _buzz,
}
KINDS = (*MADE, *SPEECH_KINDS)


def make_sound(kind: str, number: int, seed: int, speech: Callable[[int], np.ndarray] | None = None) -> Sound:
    """The sound of a kind and number. speech: number -> somebody's speech, float32 at 16 kHz, for the kinds that are made of it.

    Raises HearsaeError for a kind that is not there.
    """
    if kind not in KINDS:
        raise HearsaeError(f"there is no kind '{kind}' of sound without speech; there are: {', '.join(KINDS)}")
    random = np.random.default_rng([seed, KINDS.index(kind), number])
    if kind in SPEECH_KINDS:
        assert speech is not None
        sound = _reversed(speech(number)) if kind == "reversed" else _scrambled(speech(number), random)
    else:
        sound = MADE[kind](random, int(random.uniform(SHORTEST_S, LONGEST_S) * SAMPLE_RATE))
    loudness = np.exp(random.uniform(np.log(QUIETEST), np.log(LOUDEST)))
    power = float(np.sqrt(np.mean(np.square(sound)))) if len(sound) else 0.0
    return Sound(kind, number, np.clip(sound * (loudness / power if power else 0.0), -1, 1).astype(np.float32))


def _reversed(audio: np.ndarray) -> np.ndarray:
    return audio[::-1]


def _scrambled(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Fragments of a phone's length in random order, each backwards, faded into each other."""
    length = int(FRAGMENT_S * SAMPLE_RATE)
    pieces = [audio[i : i + length][::-1] * np.hanning(len(audio[i : i + length])) for i in range(0, len(audio), length)]
    return np.concatenate([pieces[i] for i in random.permutation(len(pieces))])
