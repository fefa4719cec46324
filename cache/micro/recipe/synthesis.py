"""Clips of speech with the exact times of their words and phones."""

import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import soxr

from cache.header import SAMPLE_RATE
from cache.micro.recipe import espeak
from cache.micro.recipe.voices import Voice, draw_voice

PHONES = ("SIL AA AE AH AO AW AX AY B CH D DH DX EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH").split()
"""ARPAbet, with AX (schwa), DX (flap and glottal stop) and SIL."""
VOWELS = set("AA AE AH AO AW AX AY EH ER EY IH IY OW OY UH UW".split())

# espeak-ng's mnemonics of the English voices
_ARPABET = {
    mnemonic: phone
    for phone, mnemonics in {
        "AA": "A: A@ A 0 0#", "AE": "a aa", "AH": "V", "AO": "O: O@ o@ O O2", "AW": "aU aU@", "AX": "@ @2 @5 a#", "AY": "aI aI@ aI3 aI2",
        "B": "b", "CH": "tS", "D": "d", "DH": "D", "DX": "t# ?", "EH": "E E2 e@", "ER": "3: 3 VR IR", "EY": "eI e:", "F": "f", "G": "g", "HH": "h",
        "IH": "I I# I2 i@ i@3", "IY": "i i:", "JH": "dZ", "K": "k", "L": "l l# @L", "M": "m m-", "N": "n n-", "NG": "N", "OW": "oU o:", "OY": "OI",
        "P": "p", "R": "r r- R2", "S": "s", "SH": "S", "T": "t t2 t[", "TH": "T", "UH": "U U@", "UW": "u u:", "V": "v", "W": "w w#", "Y": "j ;",
        "Z": "z z#", "ZH": "Z",
    }.items()
    for mnemonic in mnemonics.split()
}  # fmt: skip

_TAIL_SECONDS = 0.06
"""Kept after the last phone."""

Timed = tuple[str, float, float]
"""(word or phone, start, end), seconds."""


@dataclass
class Clip:
    text: str
    voice: Voice
    samples: np.ndarray
    """int16 [n] at 16 kHz."""
    words: list[Timed]
    """In the order and the spelling of the text, without punctuation; silence between them belongs to none."""
    phones: list[Timed]
    """Without gaps; SIL between and within words where nothing is said."""

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def synthesise(text: str, voice: Voice, words_per_minute: int, pitch: int, pitch_range: int) -> Clip | None:
    """One clip, or None where espeak-ng gives no time of a word's own (it runs some short words together)."""
    spoken = espeak.speak(text, voice.name, words_per_minute, pitch, pitch_range)
    end = len(spoken.samples) / espeak.RATE
    phones = _phones(spoken.phonemes, end)
    sounds = [phone for phone in phones if phone[0] != "SIL"]
    if not sounds:
        return None
    end = min(end, sounds[-1][2] + _TAIL_SECONDS)
    words = _words(text, spoken.words, sounds)
    if words is None:
        return None
    samples = soxr.resample(spoken.samples[: int(end * espeak.RATE)].astype(np.float32), espeak.RATE, SAMPLE_RATE)
    rounded = [(phone, round(start, 3), round(min(stop, end), 3)) for phone, start, stop in phones]
    phones = [(phone, start, stop) for phone, start, stop in rounded if start < stop]
    return Clip(text, voice, np.clip(samples.round(), -32768, 32767).astype(np.int16), words, phones)


def draw_clips(seed: str, count: int, write_text: Callable[[random.Random], str], variants: Collection[str], max_seconds: float) -> list[Clip]:
    """`count` clips; each voice says twelve of them, at rates and pitches of its own. The same for the same arguments in a fresh process."""
    rng = random.Random(seed)
    clips: list[Clip] = []
    while len(clips) < count:
        voice = draw_voice(rng, list(variants))
        for _ in range(12):
            clip = synthesise(write_text(rng), voice, rng.randint(120, 200), rng.randint(20, 80), rng.randint(30, 70))
            if clip is not None and clip.seconds <= max_seconds:
                clips.append(clip)
    return clips[:count]


def _phones(phonemes: list[tuple[str, float]], end: float) -> list[Timed]:
    starts = [start for _, start in phonemes] + [end]
    names = ["SIL" if mnemonic.startswith("_") else _ARPABET[mnemonic] for mnemonic, _ in phonemes]
    return [(name, start, stop) for name, start, stop in zip(names, starts, starts[1:], strict=False) if stop > start]


def _words(text: str, events: list[tuple[int, float]], sounds: list[Timed]) -> list[Timed] | None:
    """Times of the text's words from espeak's word events, first phone to last.

    espeak-ng says "of the", "there is" and the like as one word, with one event: the second starts at its DH or its vowel.
    """
    start_of = dict(events)
    spelled = [(match.start(), match.group()) for match in re.finditer(r"[A-Za-z']+", text)]
    groups: list[tuple[float, list[str]]] = []
    for position, word in spelled:
        if position in start_of:
            groups.append((start_of[position], [word]))
        elif groups:
            groups[-1][1].append(word)
        else:
            return None
    words: list[Timed] = []
    for (start, names), stop in zip(groups, [start for start, _ in groups[1:]] + [np.inf], strict=True):
        inside = [phone for phone in sounds if start - 1e-6 <= phone[1] < stop - 1e-6]
        if not inside:
            return None
        first, last = inside[0][1], min(stop, inside[-1][2])
        if len(names) == 1:
            words.append((names[0], first, last))
            continue
        onsets = {"DH"} if names[1].startswith("th") else VOWELS if names[1][0] in "aeio" else set()
        splits = [phone[1] for phone in inside[1:] if phone[0] in onsets]
        if len(names) > 2 or not splits:
            return None
        words += [(names[0], first, splits[-1]), (names[1], splits[-1], last)]
    return [(word, round(start, 3), round(stop, 3)) for word, start, stop in words]
