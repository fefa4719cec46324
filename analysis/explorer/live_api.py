"""What the live page asks for and is answered: JSON made of `live`'s arrays.

The last few sounds are kept, so that a question about one needs no new run of Whisper.
"""

import io
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import soundfile

from analysis.explorer.clip_pages import MILLISECONDS, said_in
from analysis.explorer.clips import clip_texts
from analysis.explorer.datafiles import numbers, pack
from analysis.explorer.live import Live, LiveScan, Sound, decode_upload, matches, unmatched
from analysis.explorer.traces import LEVELS
from cache.audio import load_clip
from cache.errors import HearsaeError
from cache.header import SAMPLE_RATE
from cache.store import ActivationStore
from cache.timings import Timings, has_timings, read_timings

STRIPS = 16
"""Features shown over time."""
MOST_PINNED = 64
MOMENT = 12
"""Features shown of a moment."""
CLIPS = 50
"""Clips of a store listed at once."""
KEPT_SOUNDS = 4
"""About 1.2 MB a site each."""
KEPT_BYTES = 512 << 20
"""Of values of scans over sounds: 30 s of 3,072 latents are 18 MB. The latest stay, whatever their size."""
DECIMAL_DIGITS = 9
"""Of a number in a question: more than any has."""


class Missing(HearsaeError):
    """Something asked for by name is not there, or not any more."""


class LiveApi:
    """Answers one question at a time; the caller sees to that. All answers are JSON's types."""

    def __init__(self, live: Live, linked: Callable[[LiveScan], set[int] | None] = lambda scan: None) -> None:
        """linked: the features of a scan that the static page shows; None for all."""
        self.live = live
        self.linked = {one.name: linked(one) for one in live.scans}
        self._stores = list(live.stores.values())
        self._sounds: OrderedDict[str, Sound] = OrderedDict()
        self._values: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._timings: dict[int, Timings] = {}
        """By store; read when one of its clips is first heard."""
        self._lock = threading.Lock()
        """Of `_sounds`: `wav` is answered beside a computation. What is computed, and its values, have the turn."""

    def index(self) -> dict[str, Any]:
        """The scans and stores, and what can't be heard live."""
        return {
            "scans": [
                {
                    "name": one.name,
                    "title": one.title,
                    "noun": one.noun,
                    "site": one.site,
                    "count": one.features.count,
                    "store": self._stores.index(one.store),
                }
                for one in self.live.scans
            ],
            "stores": [{"name": store.path.name, "clips": store.clips.num_rows} for store in self._stores],
            "left_out": self.live.left_out,
            "longest_s": self.live.longest_samples / SAMPLE_RATE,
            "frame_s": self._stores[0].header.frame_seconds,
        }

    def clips(self, question: Mapping[str, str]) -> dict[str, Any]:
        """The first clips of a store whose source, speaker or text holds the words searched for: `store`, `search`."""
        store = self._store(question)
        words = question.get("search", "").casefold()
        table = store.clips.select(["source", "speaker", "start_s", "duration_s"]).append_column("text", clip_texts(store))
        found, total = [], 0
        for batch in table.to_batches(max_chunksize=1024):
            for offset, row in enumerate(batch.to_pylist(), total):
                if words in " ".join(filter(None, (row["source"], row["speaker"], row["text"]))).casefold():
                    found.append({"clip": offset} | row)
                    if len(found) == CLIPS:
                        return {"clips": found, "more": True}
            total += batch.num_rows
        return {"clips": found, "more": False}

    def hear_upload(self, data: bytes) -> dict[str, Any]:
        """Runs the models over an audio file. Raises SourceError if it is none."""
        began = time.perf_counter()
        samples, duration_s = decode_upload(data, self.live.longest_samples)
        return self._hear(samples, duration_s, time.perf_counter() - began)

    def hear_clip(self, question: Mapping[str, str]) -> dict[str, Any]:
        """Runs the models over a clip of a store: `store`, `clip`. Raises SourceError if its audio is gone."""
        began = time.perf_counter()
        store = self._store(question)
        clip = _whole(question, "clip", store.clips.num_rows)
        samples = load_clip(store, clip)
        answer = self._hear(samples, len(samples) / SAMPLE_RATE, time.perf_counter() - began)
        source, speaker = (store.clips[name][clip].as_py() for name in ("source", "speaker"))
        known = {"clip": clip, "source": source, "speaker": speaker, "text": clip_texts(store)[clip].as_py()}
        return answer | {"known": known | {"said": self._said(store, clip)}}

    def _said(self, store: ActivationStore, clip: int) -> dict[str, list[dict[str, Any]]] | None:
        """`words` and `phones`, each a list of {label, start, end} in seconds from the clip's start; None where the store has no times."""
        which = self._stores.index(store)
        if which not in self._timings:
            if not has_timings(store):
                return None
            self._timings[which] = read_timings(store)
        answer = {}
        for tier, table in (("words", self._timings[which].words), ("phones", self._timings[which].phones)):
            said = said_in(table, np.array([clip]), store.clips["start_s"].to_numpy()[[clip]])
            times = (said.start_ms / MILLISECONDS).tolist(), (said.end_ms / MILLISECONDS).tolist()
            answer[tier] = [{"label": label, "start": start, "end": end} for label, start, end in zip(said.label, *times, strict=True)]
        return answer

    def _hear(self, samples: np.ndarray, duration_s: float, decode_s: float) -> dict[str, Any]:
        began = time.perf_counter()
        sound = self.live.hear(samples)
        name = secrets.token_urlsafe(12)
        with self._lock:
            self._sounds[name] = sound
            while len(self._sounds) > KEPT_SOUNDS:
                forgotten, _ = self._sounds.popitem(last=False)
                for key in [key for key in self._values if key[0] == forgotten]:
                    del self._values[key]
        return {
            "audio": name,
            "duration_s": len(sound.samples) / SAMPLE_RATE,
            "whole_s": duration_s,
            "n_frames": sound.n_frames,
            "text": sound.text,
            "no_text": sound.no_text,
            "seconds": {"decode": round(decode_s, 3), "whisper": round(time.perf_counter() - began, 3)},
        }

    def wav(self, question: Mapping[str, str]) -> bytes:
        """The samples as they were heard, 16 kHz, as a WAV file of 16 bits: `audio`."""
        file = io.BytesIO()
        soundfile.write(file, np.clip(self._sound(question).samples, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return file.getvalue()

    def strips(self, question: Mapping[str, str]) -> dict[str, Any]:
        """The pinned features and the strongest ones over the whole sound: `audio`, `scan`, `scale`, `pinned` (numbers with commas between)."""
        began = time.perf_counter()
        scan, scale = self._scan(question), question.get("scale", "z")
        pinned = [_number(piece, scan.features.count, f"{scan.noun}") for piece in question.get("pinned", "").split(",") if piece][:MOST_PINNED]
        values = self._of(question, scan)
        strongest = [feature for feature in scan.strongest(values, scale, STRIPS).tolist() if feature not in pinned]
        strips = scan.strips(values, scale, [*pinned, *strongest])
        levels, lo, hi = quantised(strips.values)
        peak = strips.values[np.arange(len(strips.frame)), strips.frame]
        return {
            "scan": scan.name,
            "rows": self._rows(scan, strips.feature, peak)
            | {"frame": strips.frame.tolist(), "lo": numbers(lo.tolist(), 7), "hi": numbers(hi.tolist(), 7), "pinned": len(pinned)},
            "levels": pack([levels]),
            "fvu": scan.fvu(self._sound(question)),
            "seconds": round(time.perf_counter() - began, 3),
        }

    def moment(self, question: Mapping[str, str]) -> dict[str, Any]:
        """The strongest features of one frame: `audio`, `scan`, `scale`, `frame`."""
        scan = self._scan(question)
        values = self._of(question, scan)
        frame = _whole(question, "frame", len(values))
        strongest = scan.strongest(values[frame : frame + 1], question.get("scale", "z"), MOMENT)
        return {"scan": scan.name, "frame": frame, "rows": self._rows(scan, strongest, values[frame, strongest])}

    def compare(self, question: Mapping[str, str]) -> dict[str, Any]:
        """For the strongest latents of one scan the nearest of another: `audio`, `a`, `b`, `scale`; `why` says why there are none."""
        a, b = (self._scan(question, name) for name in ("a", "b"))
        why = unmatched(a, b)
        if why:
            return {"why": why, "matches": None}
        of_a, of_b = (self._of(question, one) for one in (a, b))
        found = matches(a, b, of_a, of_b, a.strongest(of_a, question.get("scale", "z"), STRIPS).tolist())
        columns = {name: numbers([getattr(match, name) for match in found], 4) for name in ("cosine", "correlation")}
        return {"why": None, "matches": {"feature": [m.feature for m in found], "other": [m.other for m in found]} | columns}

    def _rows(self, scan: LiveScan, feature: np.ndarray, value: np.ndarray) -> dict[str, Any]:
        linked = self.linked[scan.name]
        return {
            "feature": feature.tolist(),
            "value": numbers(value.tolist()),
            "linked": [linked is None or one in linked for one in feature.tolist()],
        } | {
            name: numbers(found.tolist())
            for name, found in (
                ("z", scan.strength(value, "z", feature)),
                ("share", scan.strength(value, "share", feature)),
                *((name, scan.number(name)[feature]) for name in ("mean", "std", "max", "density")),
            )
        }

    def _store(self, question: Mapping[str, str]) -> ActivationStore:
        return self._stores[_whole(question, "store", len(self._stores))]

    def _scan(self, question: Mapping[str, str], name: str = "scan") -> LiveScan:
        try:
            return self.live.scan(question.get(name, ""))
        except HearsaeError as error:
            raise Missing(str(error)) from None

    def _sound(self, question: Mapping[str, str]) -> Sound:
        name = question.get("audio", "")
        with self._lock:
            if name not in self._sounds:
                raise Missing("this sound is not kept any more: send it again")
            self._sounds.move_to_end(name)
            return self._sounds[name]

    def _of(self, question: Mapping[str, str], scan: LiveScan) -> np.ndarray:
        sound, key = self._sound(question), (question["audio"], scan.name)
        if key not in self._values:
            self._values[key] = scan.values(sound)
            while len(self._values) > 1 and sum(values.nbytes for values in self._values.values()) > KEPT_BYTES:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


def quantised(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, frames] -> (uint8 [n, frames], lo [n], hi [n]): the value is `lo + (hi - lo) * level / 255`, as in the static page's traces."""
    lo, hi = values.min(axis=1), values.max(axis=1)
    spread = np.where(hi > lo, hi - lo, 1)[:, None]
    return np.rint((values - lo[:, None]) / spread * LEVELS).astype(np.uint8), lo, hi


def _whole(question: Mapping[str, str], name: str, stop: int) -> int:
    return _number(question.get(name, ""), stop, name)


def _number(text: str, stop: int, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= DECIMAL_DIGITS and int(text) < stop):
        raise Missing(f"there is no {what} '{text[:20]}': there are 0 to {stop - 1}")
    return int(text)
