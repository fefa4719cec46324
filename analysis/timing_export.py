"""A store's times of words and phones as files for other programs: TextGrid, CTM or JSONL."""

import json
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from analysis.textgrid import Interval, textgrid
from analysis.timing_files import CTM_DECIMALS, source_names
from cache.errors import HearsaeError
from cache.location import Location, names_in, put
from cache.store import ActivationStore
from cache.timings import Timings

Format = Literal["textgrid", "ctm", "jsonl"]


class _Source(NamedTuple):
    """What is known of a source."""

    words: list[Interval]
    phones: list[Interval]
    end_s: float


def export_times(store: ActivationStore, timings: Timings, folder: Location, form: Format) -> int:
    """Writes files that `import_times` reads again; returns of how many sources. Sources without times are left out.

    textgrid: a file for each source, at its path below the folder. ctm: words.ctm and phones.ctm. jsonl: times.jsonl.
    Raises HearsaeError where the folder has files, and for names that the format can't tell apart.
    """
    refuse_full(folder)
    sources = {name: source for name, source in _by_source(store, timings).items() if source.words or source.phones}
    if form == "textgrid":
        for name, path in _paths(sources).items():
            put(folder / path, textgrid(*sources[name]).encode())
    elif form == "ctm":
        put(folder / "words.ctm", _ctm({name: source.words for name, source in sources.items()}))
        put(folder / "phones.ctm", _ctm({name: source.phones for name, source in sources.items()}))
    else:
        rows = [json.dumps({"file_name": name, "words": source.words, "phones": source.phones}) + "\n" for name, source in sources.items()]
        put(folder / "times.jsonl", "".join(rows).encode())
    return len(sources)


def refuse_full(folder: Location) -> None:
    """Raises HearsaeError where a folder has files."""
    if names_in(folder):
        raise HearsaeError(f"{folder} is not empty: name a new folder")


def _by_source(store: ActivationStore, timings: Timings) -> dict[str, _Source]:
    names = source_names(store.clips)
    starts, lengths = store.clips["start_s"].to_numpy(), store.clips["duration_s"].to_numpy()
    found: dict[str, _Source] = {}
    words, phones = _by_clip(timings.words, len(names)), _by_clip(timings.phones, len(names))
    for clip in np.argsort(starts, kind="stable"):
        words_before, phones_before, end_s = found.get(names[clip], _Source([], [], 0.0))
        end = max(end_s, float(starts[clip] + lengths[clip]))
        found[names[clip]] = _Source(_joined(words_before, words[clip]), _joined(phones_before, phones[clip]), end)
    return dict(sorted(found.items()))


def _by_clip(table: pa.Table, clips: int) -> list[list[Interval]]:
    found: list[list[Interval]] = [[] for _ in range(clips)]
    columns = (table[name].to_pylist() for name in ("clip", "start_s", "end_s", "label"))
    for clip, start, end, label in zip(*columns, strict=True):
        found[clip].append((start, end, label))
    return found


def _joined(before: list[Interval], after: list[Interval]) -> list[Interval]:
    """Both; what was cut where one clip ends and the next begins is whole again."""
    if before and after and before[-1][1] == after[0][0] and before[-1][2] == after[0][2]:
        return [*before[:-1], (before[-1][0], *after[0][1:]), *after[1:]]
    return before + after


def _paths(names: dict[str, _Source]) -> dict[str, str]:
    """Where each source's TextGrid goes: never outside the folder, whatever the names are."""
    paths: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        inside = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".", "..") and "\0" not in part]
        path = PurePosixPath(*inside).with_suffix(".TextGrid").as_posix() if inside else ""
        if not path or path in taken:
            raise HearsaeError(f"{name!r} and {taken.get(path, '')!r} can't have a TextGrid each: use --format jsonl")
        taken[path] = name
        paths[name] = path
    return paths


def _ctm(intervals: dict[str, list[Interval]]) -> bytes:
    lines = []
    for name, rows in intervals.items():
        for start, end, label in rows:
            fields = (name, "1", f"{start:.{CTM_DECIMALS}f}", f"{end - start:.{CTM_DECIMALS}f}", label)
            if any(len(field.split()) != 1 for field in (name, label)):
                raise HearsaeError(f"{name!r}, {label!r} can't be a line of CTM, whose fields have no spaces: use --format jsonl")
            lines.append(" ".join(fields) + "\n")
    return "".join(lines).encode()
