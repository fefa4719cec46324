"""`hearsae explore`."""

import signal
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from analysis.explorer.export import export, parse_features
from cache.location import Location
from cluster.commands import Output, size

PAGE = Path("page")


@dataclass(frozen=True, kw_only=True)
class Explore(Output):
    """Write scans as a page that opens from the file system: every feature, its histogram, its moments to look at and listen to."""

    scans: Annotated[tuple[Location, ...], tyro.conf.Positional]
    """Folders of scans."""
    out: Path | None = None
    """Folder for the page; default: page, with --serve one that is gone afterwards."""
    features: str | None = None
    """Which features: '0-99,512'; default: all."""
    audio: Literal["vorbis", "flac", "none"] = "vorbis"
    """How the page carries sound."""
    context_s: float = 1.0
    """Seconds shown and played on either side of a moment."""
    store: Location | None = None
    """The store, if it moved since the scan."""
    serve: bool = False
    """Serve the page, and beside it one that hears uploads and recordings live, until Ctrl-C."""
    host: str = "127.0.0.1"
    """With --serve: the address to listen on. On any other than loopback every request needs the token that the printed address has."""
    port: int | None = None
    """With --serve: the port; default: 8750, or any free one if that is taken."""
    model: tuple[str, ...] = ()
    """With --serve: checkpoint of the scans' model, or a name of openai-whisper, if it is not found where the store says."""

    def run(self) -> dict[str, Any] | Generator[dict[str, Any]]:
        return self._serve() if self.serve else self._export(self.out or PAGE)

    def _export(self, out: Path) -> dict[str, Any]:
        return export(self.scans, out, progress=_Bars(), store=self.store, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"features": self.features, "audio": self.audio, "context_s": self.context_s}

    def _serve(self) -> Generator[dict[str, Any]]:
        from analysis.explorer.live import Live, LiveScan
        from analysis.explorer.live_api import LiveApi
        from analysis.explorer.reuse import is_current, made_from, remember
        from analysis.explorer.server import LiveServer

        def shown(scan: LiveScan) -> set[int] | None:
            return None if self.features is None else set(parse_features(self.features, scan.features.count).tolist())

        with ExitStack() as stack, suppress(KeyboardInterrupt):
            with suppress(ValueError):  # outside of the main thread there are no signals
                before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does: the temporary folder goes
                stack.callback(signal.signal, signal.SIGTERM, before)
            live = Live.open(self.scans, self.model, self.store)  # before the export: what is missing is said at once
            out = self.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hearsae-page-")))
            server = stack.enter_context(LiveServer(out, LiveApi(live, shown), self.host, self.port))
            wanted = made_from(self.scans, self._options | {"store": str(self.store)}, self.store)
            if is_current(out, wanted):
                made: dict[str, Any] = {"out": str(out), "index": str(out / "index.html"), "reused": True}
            else:
                made = self._export(out) | {"reused": False}
                remember(out, wanted)
            yield made | {"address": server.address, "left_out": live.left_out}
            server.serve_forever(poll_interval=0.2)

    def summary(self, result: dict[str, Any]) -> str:
        if "address" not in result:
            return f"{_counts(result)}\nopen {Path(result['index']).resolve()}"
        made = f"the page in {result['out']} is as it should be" if result["reused"] else _counts(result)
        return "\n".join([made, *(f"not live: {reason}" for reason in result["left_out"]), f"open {result['address']} (Ctrl-C ends it)"])


def _counts(result: dict[str, Any]) -> str:
    counts = f"{result['features']} features, {result['examples']} examples, {result['clips']} clips, {size(result['bytes'])}"
    silent = f"; {result['clips_without_audio']} clips have no audio any more" if result["clips_without_audio"] else ""
    return f"{counts}, {result['seconds']:.1f} s{silent}"


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
