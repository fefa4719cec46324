"""`hearsae explore`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from analysis.explorer.export import export
from cache.location import Location
from cluster.commands import Output, size


@dataclass(frozen=True, kw_only=True)
class Explore(Output):
    """Write scans as a page that opens from the file system: every feature, its histogram, its moments to look at and listen to."""

    scans: Annotated[tuple[Location, ...], tyro.conf.Positional]
    """Folders of scans."""
    out: Path = Path("page")
    """Folder for the page."""
    features: str | None = None
    """Which features: '0-99,512'; default: all."""
    audio: Literal["vorbis", "flac", "none"] = "vorbis"
    """How the page carries sound."""
    context_s: float = 1.0
    """Seconds shown and played on either side of a moment."""
    store: Location | None = None
    """The store, if it moved since the scan."""

    def run(self) -> dict[str, Any]:
        return export(self.scans, self.out, features=self.features, audio=self.audio, context_s=self.context_s, store=self.store, progress=_Bars())

    def summary(self, result: dict[str, Any]) -> str:
        counts = f"{result['features']} features, {result['examples']} examples, {result['clips']} clips, {size(result['bytes'])}"
        silent = f"; {result['clips_without_audio']} clips have no audio any more" if result["clips_without_audio"] else ""
        return f"{counts}, {result['seconds']:.1f} s{silent}\nopen {Path(result['index']).resolve()}"


class _Bars:
    """A progress bar for each thing that the export goes through."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self._bars[what] = tqdm(total=total, desc=what, file=sys.stderr, disable=not sys.stderr.isatty())
        bar = self._bars[what]
        bar.update(done - bar.n)
        if done == total:
            bar.close()
