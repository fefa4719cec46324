"""Times of words and phones that others made: TextGrids, CTM and JSONL, given to clips by the names of their sources."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from analysis.align import Aligned, Interval
from analysis.arpabet import PHONES, plain
from analysis.textgrid import decoded, read_textgrid
from cache.errors import HearsaeError
from cache.location import Location, location, names_below
from cache.timings import SILENCE

METHODS = {".textgrid": "textgrid", ".ctm": "ctm", ".jsonl": "jsonl"}
"""What a file's name ends in, in any case -> the method that is kept of it."""
SILENCES = frozenset(("", "sil", "sp", "spn", "<eps>"))
"""Labels, in lower case, that mean silence as a phone, and nothing as a word."""
MOST_INTERVALS = 50_000_000
"""Of all files together: they are in memory at once."""
CTM_DECIMALS = 6
"""Of seconds: what is below is the rounding of a sum."""
_POSITION = re.compile(r"_[BIES]$")
"""Kaldi's: where in its word a phone is."""


class Imported(NamedTuple):
    """Times of files, given to clips."""

    aligned: Aligned
    method: str
    phone_set: str
    """arpabet where every phone is one of ARPAbet's, which then are in upper case and without stress; other: labels as they were."""
    strangers: list[str]
    """Names in the files that are no source of the clips."""


class _Times(NamedTuple):
    words: list[Interval]
    phones: list[Interval]


def import_times(clips: pa.Table, paths: list[str]) -> Imported:
    """Gives each clip the times of its source, cut to the clip.

    clips: as a store's; its columns source, source_row, start_s and duration_s are looked at. A clip's number is its row.
    paths: .TextGrid files or folders of them, .ctm files (phones where the file's name has `phone` in it or `phones:` stands before the path, else
    words), .jsonl files (`file_name`, `words` and `phones` as [start, end, label]); one kind at a time. Seconds are within the source's file.
    A name belongs to the source that it equals. What follows the last dot may differ, and folders at the beginning of either may be missing.
    Raises HearsaeError naming file and line for what is malformed, and for a name that fits several sources, or a source that several names fit.
    """
    times: dict[str, _Times] = {}
    methods, count = set(), 0
    for spec in paths:
        for method, name, words, phones in _read(spec):
            methods.add(method)
            if len(methods) > 1:
                raise HearsaeError(f"--import takes files of one kind at a time, not {' and '.join(sorted(methods))}")
            into = times.setdefault(name, _Times([], []))
            into.words.extend(words)
            into.phones.extend(phones)
            count += len(words) + len(phones)
            if count > MOST_INTERVALS:
                raise HearsaeError(f"there are more than {MOST_INTERVALS:,} intervals in {' '.join(paths)}")
    if not methods:
        raise HearsaeError(f"there are no times in {' '.join(paths)}: give .TextGrid, .ctm or .jsonl files, or a folder of TextGrids")
    names, strangers = _matched(source_names(clips), times)
    phone_set, spelled = _spelling({label for name in names.values() for _, _, label in times[name].phones})
    return Imported(_given(clips, times, names, spelled), methods.pop(), phone_set, strangers)


def source_names(clips: pa.Table) -> list[str]:
    """Of each clip, its source's name in files of times: `source`; with `/row` where several rows have that."""
    sources, rows = clips["source"].to_pylist(), clips["source_row"].to_pylist()
    first: dict[str, int] = {}
    several = {source for source, row in zip(sources, rows, strict=True) if first.setdefault(source, row) != row}
    return [f"{source}/{row}" if source in several else source for source, row in zip(sources, rows, strict=True)]


def _given(clips: pa.Table, times: dict[str, _Times], names: dict[str, str], spelled: dict[str, str]) -> Aligned:
    found = Aligned.nothing()
    starts, lengths = clips["start_s"].to_pylist(), clips["duration_s"].to_pylist()
    ready: dict[str, _Times] = {}
    for clip, (source, start, length) in enumerate(zip(source_names(clips), starts, lengths, strict=True)):
        if source not in names:
            found.failures.append((clip, "the files have no times of its source"))
            continue
        if source not in ready:
            words, phones = times[names[source]]
            ready[source] = _Times([w for w in words if w[2].strip().lower() not in SILENCES], [(a, b, spelled[label]) for a, b, label in phones])
        before = len(found.words) + len(found.phones)
        found.give(clip, start, start + length, *ready[source])
        if len(found.words) + len(found.phones) == before:
            found.failures.append((clip, "its source has times, but none within it"))
    return found


def _spelling(labels: set[str]) -> tuple[str, dict[str, str]]:
    """The phone set, and how each label is spelled in it."""
    arpabet = {label: plain(_POSITION.sub("", label.strip()).upper()) for label in labels}
    silent = {label for label in labels if _POSITION.sub("", label.strip()).lower() in SILENCES}
    known = all(arpabet[label] in PHONES for label in labels - silent)
    spelled = arpabet if known else {label: label.strip() for label in labels}
    return "arpabet" if known else "other", spelled | dict.fromkeys(silent, SILENCE)


def _matched(names: list[str], times: dict[str, _Times]) -> tuple[dict[str, str], list[str]]:
    """Source -> the name in the files that is its own; and the names that belong to none."""
    sources = set(names)
    by_stem: dict[str, list[str]] = {}
    for source in sorted(sources):
        by_stem.setdefault(_parts(source)[-1], []).append(source)
    matched: dict[str, str] = {}
    strangers = []
    for name in sorted(times):
        fitting = [name] if name in sources else _fitting(name, by_stem)
        if not fitting:
            strangers.append(name)
            continue
        if len(fitting) > 1:
            raise HearsaeError(f"times of {name!r} fit several sources, {fitting[0]!r} and {fitting[1]!r}: name them as the dataset does")
        if fitting[0] in matched:
            raise HearsaeError(f"{matched[fitting[0]]!r} and {name!r} both have times of {fitting[0]!r}: give one of them")
        matched[fitting[0]] = name
    return matched, strangers


def _fitting(name: str, by_stem: dict[str, list[str]]) -> list[str]:
    """The sources that a name may mean: it may lack what follows a source's last dot, or have another."""
    for parts in ((*_parts(name)[:-1], PurePosixPath(name).name), _parts(name)):
        fitting = [source for source in by_stem.get(parts[-1], ()) if all(a == b for a, b in zip(_parts(source)[::-1], parts[::-1], strict=False))]
        whole = [source for source in fitting if len(_parts(source)) == len(parts)]
        if fitting:
            return whole if len(whole) == 1 else fitting
    return []


def _parts(name: str) -> tuple[str, ...]:
    """Of a path, without what follows the last dot."""
    path = PurePosixPath(name.replace("\\", "/"))
    return (*(part for part in path.parent.parts if part not in ("/", "..")), path.stem)


def _read(spec: str) -> Iterator[tuple[str, str, list[Interval], list[Interval]]]:
    """Method, name, words and phones of everything at a path."""
    kind, _, rest = spec.partition(":")
    given = kind if kind in ("words", "phones") and rest else None
    path = location(rest if given else spec)
    if path.is_dir():
        for name in sorted(name for name in names_below(path) if name.lower().endswith(".textgrid")):
            yield "textgrid", PurePosixPath(name).with_suffix("").as_posix(), *read_textgrid(_bytes(path / name), str(path / name))
        return
    method = METHODS.get(path.suffix.lower())
    if method is None:
        raise HearsaeError(f"'{spec}' can't be imported: give .TextGrid, .ctm or .jsonl files, or a folder of TextGrids")
    if given and method != "ctm":
        raise HearsaeError(f"'{spec}': only .ctm files need to be told as words or phones")
    data = _bytes(path)
    if method == "textgrid":
        yield method, path.stem, *read_textgrid(data, str(path))
    elif method == "jsonl":
        yield from ((method, *row) for row in _jsonl(decoded(data, str(path)), str(path)))
    else:
        phones = (given or ("phones" if "phone" in path.name.lower() else "words")) == "phones"
        for name, interval in _ctm(decoded(data, str(path)), str(path)):
            yield (method, name, [], [interval]) if phones else (method, name, [interval], [])


def _bytes(path: Location) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HearsaeError(f"{path} can't be read: {error.strerror or error}") from error


def _ctm(text: str, name: str) -> Iterator[tuple[str, Interval]]:
    """File and interval of each line: file, channel, start, duration, label and perhaps a confidence; comments begin with ;;."""
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or line.startswith(";;"):
            continue
        try:
            if len(fields) not in (5, 6):
                raise ValueError("5 or 6 fields are needed")
            start, duration = float(fields[2]), float(fields[3])
            yield fields[0], _interval(start, round(start + duration, CTM_DECIMALS), fields[4])
        except ValueError as error:
            raise HearsaeError(f"{name}:{number}: not a line of CTM (file channel start duration label [confidence]): {error}") from error


def _jsonl(text: str, name: str) -> Iterator[tuple[str, list[Interval], list[Interval]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield str(row["file_name"]), _intervals(row["words"]), _intervals(row["phones"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            what = "not a line of times (file_name, words, phones as [start, end, label])"
            raise HearsaeError(f"{name}:{number}: {what}: {error}") from error


def _intervals(rows: Any) -> list[Interval]:
    return [_interval(float(start), float(end), str(label)) for start, end, label in rows]


def _interval(start: float, end: float, label: str) -> Interval:
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end):
        raise ValueError(f"[{start}, {end}] is no stretch of time")
    return start, end, label
