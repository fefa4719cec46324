"""Whether a page that was exported for serving can be served again as it is."""

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from analysis.evidence import AUC, RANGE_COUNTS, SCORES
from analysis.scan_folder import COACTIVATION, EXAMPLES, FEATURES, SCAN, Scan
from cache.header import software
from cache.location import Location, location
from cache.store import TIMINGS

MADE_OF = (SCAN, FEATURES, EXAMPLES, COACTIVATION, SCORES, AUC, RANGE_COUNTS)
"""Files of a scan that a page is made of; the last three only where the scan has phones."""
SERVED = "served.json"
"""Beside the page: what it was made from, in full."""


def made_from(scans: Sequence[Location], options: dict[str, Any], store: Location | None = None) -> dict[str, Any]:
    """All that a page depends on: the scans, by path and content, the times of their words and phones, the options of the export, the code.

    store: where the scans' activation store is now, if it moved.
    Raises HearsaeError where a scan is missing.
    """
    looks = hashlib.sha256()
    for asset in sorted(resources.files("analysis.explorer").iterdir(), key=lambda one: one.name):
        if asset.is_file():
            looks.update(asset.name.encode() + asset.read_bytes())
    return {
        "scans": [[str(scan.absolute()), *(_digest(file) for file in _files(Scan.open(scan), store))] for scan in scans],
        "options": options,
        "software": software(),
        "code": looks.hexdigest(),
    }


def is_current(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether the page in `out` is what `remember` saw there, made from what is wanted."""
    try:
        kept = json.loads((out / SERVED).read_bytes())
        return kept == {"index_ns": (out / "index.html").stat().st_mtime_ns, "made_from": json.loads(json.dumps(wanted))}
    except (OSError, ValueError):
        return False


def remember(out: Path, wanted: dict[str, Any]) -> None:
    """Notes what the page in `out` was made from."""
    (out / SERVED).write_text(json.dumps({"index_ns": (out / "index.html").stat().st_mtime_ns, "made_from": wanted}, indent=1), encoding="utf-8")


def _files(scan: Scan, moved_to: Location | None) -> list[Location]:
    """alignment.json, written last, holds the CRC32C of the timings' files."""
    store = location(moved_to if moved_to is not None else scan.info["store"])
    return [*(scan.path / name for name in MADE_OF), store / TIMINGS]


def _digest(file: Location) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""
