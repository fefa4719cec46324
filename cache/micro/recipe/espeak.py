"""libespeak-ng through ctypes: text in, samples with the times of words and phonemes out. Needs Debian's `libespeak-ng1`."""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cache.errors import HearsaeError

RATE = 22050
"""Samples per second of what espeak-ng synthesises."""

# From speak_lib.h
_RETRIEVAL, _WORD, _PHONEME = 1, 1, 7
_CHARS_UTF8, _POSITION_CHARACTER, _INITIALIZE_PHONEME_EVENTS = 1, 1, 1
_SPEED, _PITCH, _PITCH_RANGE = 1, 3, 4


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass
class Utterance:
    samples: np.ndarray
    """int16 [n] at RATE."""
    words: list[tuple[int, float]]
    """(index of the first character, start in seconds) of each word event."""
    phonemes: list[tuple[str, float]]
    """(espeak's mnemonic, start in seconds)."""


class _Espeak:
    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError as error:
            raise HearsaeError("libespeak-ng.so.1 is not there: install espeak-ng (Debian: apt-get install libespeak-ng1)") from error
        if self.library.espeak_Initialize(_RETRIEVAL, 500, None, _INITIALIZE_PHONEME_EVENTS) != RATE:
            raise HearsaeError("espeak-ng does not start: is its data installed (Debian: espeak-ng-data)?")
        self.heard: list[np.ndarray] = []
        self.words: list[tuple[int, float]] = []
        self.phonemes: list[tuple[str, float]] = []
        self.voice = ""
        self._callback = _Callback(self._receive)  # kept: the library does not hold on to it
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type:
            event = events[index]
            if event.type == _WORD and event.length > 0:
                self.words.append((event.text_position - 1, event.audio_position / 1000))
            elif event.type == _PHONEME:
                self.phonemes.append((event.id.string.decode("latin1"), event.audio_position / 1000))
            index += 1
        return 0


@cache
def _espeak() -> _Espeak:
    return _Espeak()


def speak(text: str, voice: str, words_per_minute: int, pitch: int, pitch_range: int) -> Utterance:
    """Synthesises ASCII text. voice: a language, or `language+variant`. pitch and pitch_range: 0 to 100, 50 is usual.

    Raises HearsaeError if espeak-ng or the voice is not installed. Not for several threads: the library has one state.
    """
    engine = _espeak()
    if voice != engine.voice:
        if engine.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise HearsaeError(f"espeak-ng has no voice '{voice}'")
        engine.voice = voice
    engine.heard, engine.words, engine.phonemes = [], [], []
    for parameter, value in ((_SPEED, words_per_minute), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
        engine.library.espeak_SetParameter(parameter, value, 0)
    data = text.encode("ascii")
    engine.library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
    engine.library.espeak_Synchronize()
    samples = np.concatenate(engine.heard) if engine.heard else np.zeros(0, np.int16)
    return Utterance(samples, engine.words, engine.phonemes)
