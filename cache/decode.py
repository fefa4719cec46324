"""Decoding: how long audio is, from its header, and its samples as Whisper takes them. Through libsndfile."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from cache.errors import SourceError
from cache.header import SAMPLE_RATE
from cache.location import RemoteFile, RemotePath

UNKNOWN_LENGTH = 2**63 - 1
"""What libsndfile reports where a header does not say how long the audio is."""
CUT_SHORT = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""Of libsndfile's log of a WAV, AIFF or AU file: bytes of audio that the header claims, and that are there."""
UNKNOWN_BYTES = 0x7FFF0000
"""Programs that write WAV into a pipe claim this or more."""
MP3_LENGTH_TAGS = (b"Xing", b"Info", b"VBRI")
"""One of them is in the first frame of an MP3 file that says how long it is."""
MP3_FIRST_FRAME_BYTES = 2048
MP3_TAIL_BYTES = 2048
"""What may follow the last frame: an ID3v1 tag has 128."""
ROUNDING_SAMPLES = 2
"""A resampled clip may differ this much from the length computed from its header."""
LOUDEST = 1e9
"""Full scale is 1. Float files can hold any value, but the power spectrum of much larger ones overflows float32."""
RATES = (100, 10_000_000)
"""Hz. Outside is no audio, but a damaged header."""

HEADER_BYTES = 64 << 10
"""Of an object, fetched at once to read its header: most headers are shorter, and so are many files."""
WHOLE_BYTES = 4 << 20
"""An object that is not longer is fetched whole, in one request; of a longer one, the parts that a clip needs."""

File = str | Path | RemotePath | io.BytesIO


def header_samples(file: File) -> int:
    """Length in samples at 16 kHz, from the header alone; an MP3 file whose header lacks it is decoded to count.

    Of a file that was cut short it is the length that the header claims. Raises SourceError if it is no readable audio.
    """
    try:
        with _readable(file, HEADER_BYTES) as opened:
            info = soundfile.info(opened)
            if info.format != "MP3":
                n_frames = _claimed_frames(info)
            elif not isinstance(opened, str | Path):
                n_frames = _mp3_frames(opened, info)
            else:
                with open(opened, "rb") as binary:
                    n_frames = _mp3_frames(binary, info)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise SourceError(_why(error)) from error
    if n_frames >= UNKNOWN_LENGTH:
        raise SourceError("its header does not say how long it is")
    if not RATES[0] <= info.samplerate <= RATES[1]:
        raise SourceError(f"its header says {info.samplerate} samples a second")
    return n_frames * SAMPLE_RATE // info.samplerate


def decode(file: File, start_s: float, n_samples: int, tolerance: int = ROUNDING_SAMPLES) -> np.ndarray:
    """Decodes, mixes to mono, resamples: float32 [n_samples] at 16 kHz from `start_s`.

    tolerance: samples that may lack at the end and are filled with zeros.
    Raises SourceError if the audio is unreadable, shorter than asked for, or not finite.
    """
    try:
        with _readable(file, WHOLE_BYTES) as opened, soundfile.SoundFile(opened) as sound:
            rate = sound.samplerate
            sound.seek(min(round(start_s * rate), sound.frames))
            samples = sound.read(-(-n_samples * rate // SAMPLE_RATE), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise SourceError(_why(error)) from error
    mono = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if not np.isfinite(mono).all():
        raise SourceError("it has NaN or infinite samples")
    if np.abs(mono).max(initial=0) > LOUDEST:
        raise SourceError(f"it has samples of {np.abs(mono).max():.2g}, where full scale is 1")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if len(mono) < n_samples - tolerance:
        ends, should = start_s + len(mono) / SAMPLE_RATE, start_s + n_samples / SAMPLE_RATE
        raise SourceError(f"it ends after {ends:.2f} s; {should:.2f} s or more were announced")
    return np.pad(mono[:n_samples], (0, max(0, n_samples - len(mono))))


def _claimed_frames(info: Any) -> int:
    # Of a file that was cut short libsndfile gives what is left, and notes in its log what the header said.
    cut = CUT_SHORT.search(info.extra_info)
    claimed, held = map(int, cut.groups()) if cut else (0, 0)
    return info.frames if not held or claimed >= UNKNOWN_BYTES else info.frames * claimed // held


def _mp3_frames(file: BinaryIO, info: Any) -> int:
    """From the header, or counted where it gives none. Raises SourceError if libsndfile would stop before the end."""
    if _has_mp3_length(file):
        return info.frames
    # libsndfile estimates from the first frame's bitrate. Where that is too much, reading tells; where it is too little, bytes are left over.
    count = 0
    with soundfile.SoundFile(file) as sound:
        while len(block := sound.read(1 << 16, dtype="float32")):
            count += len(block)
    read = file.tell()
    if file.seek(0, os.SEEK_END) - read > MP3_TAIL_BYTES:
        raise SourceError("it is an MP3 file of varying bitrate that does not say its length: convert it to FLAC")
    return count


def _has_mp3_length(file: BinaryIO) -> bool:
    file.seek(0)
    tag = file.read(10)
    # An ID3v2 tag comes before the first frame; its length is in four bytes of 7 bits.
    file.seek(10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(tag[6:10])) if tag[:3] == b"ID3" else 0)
    first_frame = file.read(MP3_FIRST_FRAME_BYTES)
    file.seek(0)
    return any(name in first_frame for name in MP3_LENGTH_TAGS)


@contextmanager
def _readable(file: File, first: int) -> Iterator[Any]:
    """What soundfile takes. first: bytes fetched at once of an object in an object store.

    Raises SourceError if there is no such file, RemoteError where an object store fails.
    """
    if not isinstance(file, RemotePath):
        if not isinstance(file, io.BytesIO) and not os.path.isfile(file):  # opening a named pipe would wait for ever
            raise SourceError("it is a folder or a device, not a file" if os.path.exists(file) else "there is no such file")
        yield file
        return
    try:
        fetched = RemoteFile(file, first, raises=False)
    except FileNotFoundError:
        raise SourceError("there is no such file") from None
    try:
        yield fetched
    finally:
        if fetched.error:  # libsndfile took it for the end of the file
            raise fetched.error


def _why(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        return f"it can't be decoded ({error.error_string.removeprefix('Error : ').rstrip('.')})"
    if isinstance(error, OSError):
        return f"it can't be read ({error.strerror or error})"
    return "it can't be decoded (no format that libsndfile knows: convert it to FLAC)"
