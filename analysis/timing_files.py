"""Times of words and phones that others made, as JSONL: `file_name`, `words` and `phones` as [start, end, label] in seconds within the file."""

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from analysis.align import Aligned, Interval
from cache.errors import HearsaeError
from cache.store import ActivationStore


class Imported(NamedTuple):
    """A file's times, given to a store's clips."""

    aligned: Aligned
    strangers: list[str]
    """Names in the file that no clip has."""


def import_jsonl(store: ActivationStore, path: Path) -> Imported:
    """Gives each clip the times of its source, cut to the clip. Raises HearsaeError naming file and line for what is malformed."""
    times: dict[str, tuple[list[Interval], list[Interval]]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    name, words, phones = _row(f"{path}:{number}", line)
                    times[name] = (words, phones)
    except (OSError, UnicodeDecodeError) as error:
        raise HearsaeError(f"{path} can't be read: {error}") from error
    found, used = Aligned.nothing(), set()
    for row in store.clips.select(["clip", "source", "start_s", "duration_s"]).to_pylist():
        name = PurePosixPath(row["source"]).as_posix()
        if name not in times:
            found.failures.append((row["clip"], f"{path.name} has no times of it"))
            continue
        used.add(name)
        start, end = row["start_s"], row["start_s"] + row["duration_s"]
        found.give(row["clip"], start, end, *times[name])
    return Imported(found, sorted(times.keys() - used))


def _row(where: str, line: str) -> tuple[str, list[Interval], list[Interval]]:
    try:
        row = json.loads(line)
        return str(row["file_name"]), _intervals(row["words"]), _intervals(row["phones"], strip_stress=True)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise HearsaeError(f"{where}: not a line of times (file_name, words, phones as [start, end, label]): {error}") from error


def _intervals(rows: Any, strip_stress: bool = False) -> list[Interval]:
    found = []
    for start, end, label in rows:
        if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end):
            raise ValueError(f"[{start}, {end}] is no stretch of time")
        text = str(label)
        found.append((float(start), float(end), text.upper().rstrip("012") if strip_stress else text))
    return found
