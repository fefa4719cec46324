"""One module per command.

A command is a frozen dataclass: its fields are the flags, `run` returns what `--json` prints, `summary` says it to people.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from cache.header import PADDED, name_of_context

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


def context_text(context: dict[str, Any]) -> str:
    """What is said of a store's context: nothing where Whisper heard its whole window, as it does elsewhere."""
    return "" if context == PADDED else f", {name_of_context(context)}"


def deviation_text(deviation: dict[str, Any] | None) -> str:
    """What is said of a site of a trimmed store: `; 14.1 % from padded, mean cosine 0.991 (8 clips)`."""
    if not deviation:
        return ""
    return f"; {100 * deviation['relative']:.3g} % from padded, mean cosine {deviation['cosine']:.5f} ({deviation['clips']} clips)"
