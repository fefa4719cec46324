"""The folder that the page is written to."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from cache.errors import HearsaeError

MARKER = "explorer.json"
"""Says that a folder is ours."""
STAGING = ".export-"


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` whose contents take the place of an earlier export when all is written; until then that one stays as it is."""
    staging = out / f"{STAGING}{uuid.uuid4().hex}"
    try:
        _refuse_foreign(out)
        staging.mkdir(parents=True)
        try:
            yield staging
            _publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise HearsaeError(f"can't write the page to {out}: {error.strerror or error}") from error


def _refuse_foreign(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise HearsaeError(f"{out} is not a folder: choose another --out")
    entries = [entry for entry in out.iterdir() if not entry.name.startswith(STAGING)]
    if not entries:
        return
    try:
        ours = "hearsae" in json.loads((out / MARKER).read_bytes())
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise HearsaeError(f"{out} holds other things and no page of ours: choose an empty or new folder")


def _publish(staging: Path, out: Path) -> None:
    """Puts the new files in place, `index.html` last: while it is there, all that it needs is."""
    (out / "index.html").unlink(missing_ok=True)
    for name in (MARKER, "assets", "data", "index.html"):
        place = out / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        (staging / name).replace(place)
    for stale in out.glob(f"{STAGING}*"):
        if stale != staging:
            shutil.rmtree(stale, ignore_errors=True)


def copy_assets(staging: Path) -> None:
    """The page itself, which is the same whatever it shows."""
    (staging / "assets").mkdir()
    for asset in resources.files("analysis.explorer").iterdir():
        if asset.name.startswith("live"):  # for the server, which takes them from here
            continue
        if asset.name.endswith((".js", ".css")):
            (staging / "assets" / asset.name).write_bytes(asset.read_bytes())
        elif asset.name.endswith(".html"):
            (staging / asset.name).write_bytes(asset.read_bytes())
