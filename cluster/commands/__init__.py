"""One module per command.

A command is a frozen dataclass: its fields are the flags, `run` returns what `--json` prints, `summary` says it to people.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Output:
    """What every command offers."""

    json: bool = False
    """Print one JSON object on stdout and nothing else there."""


def progress(items: Iterable[Item], total: int, what: str, unit: str) -> Iterator[Item]:
    """`items`, with a bar on stderr that shows rate and time left where that is a terminal."""
    yield from tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())


def size(n_bytes: float) -> str:
    """1234567 -> `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}" if unit != "bytes" else f"{n_bytes:.0f} bytes"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """4000 -> `1 h 7 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
