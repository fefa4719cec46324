"""One module per experiment. `Experiment` is what they share: what to run on, where, and what is left behind."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from analysis.experiments.report import Report, check_folder, write_report
from analysis.experiments.speech import Mapper, Speech, in_this_process
from cluster.commands import Output
from cluster.shards import reduce_shards
from cluster.workers import WorkerOptions, session

NAMED = 5
"""Clips that could not be read that are named to people."""


@dataclass(frozen=True, kw_only=True)
class Experiment(Output, WorkerOptions):
    """An experiment on a Whisper."""

    NAME: ClassVar[str]

    dataset: str = "micro"
    """Speech, as in `hearsae cache`; or one audio file."""
    split: str | None = None
    """Split of the dataset."""
    limit: int | None = None
    """Use the first so many files or rows only."""
    model: str = "micro"
    """Whisper, as in `hearsae cache`."""
    device: str = "auto"
    """auto, cpu or cuda."""
    out: Path | None = None
    """Folder for the report; default: hearsae-NAME. An earlier report there is replaced."""

    def report(self) -> Report:
        """Runs the experiment."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return self.out or Path(f"hearsae-{self.NAME}")

    @cached_property
    def speech(self) -> Speech:
        return Speech(self.dataset, self.split, self.limit, decode_first=True)

    @property
    def map_pieces(self) -> Mapper:
        return mapper(self, self.NAME, self._kept)

    @cached_property
    def _kept(self) -> ExitStack:
        """Until the experiment ends: an embedded Ray, once one was needed."""
        return ExitStack()

    def run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        out = self.folder
        check_folder(out)  # before there is work to lose
        self.check()
        with self._kept:
            report = self.report()
        index = write_report(report, out, asdict(self))
        rows = report.rows.to_pylist() if hasattr(report.rows, "to_pylist") else list(report.rows)
        numbers = {"dir": str(out), "index": str(index.resolve()), "seconds": time.perf_counter() - begin}
        skipped = self.speech.skipped
        lines = [*report.lines, *([f"{len(skipped)} skipped:"] if skipped else []), *(f"  {reason}" for reason in skipped[:NAMED])]
        return {"rows": rows, "summary": report.summary, "lines": lines, "skipped": skipped, **numbers}

    def summary(self, result: dict[str, Any]) -> str:
        return "\n".join([*result["lines"], f"in {result['seconds']:.1f} s; the report: {result['index']}"])


def mapper(workers: WorkerOptions, what: str, kept: ExitStack | None = None) -> Mapper:
    """Shares pieces of work out over workers, with a bar. A single piece is not worth starting an embedded Ray for.

    kept: where such a Ray goes, so that it is there for the next pieces too; None stops it after these.
    """

    def map_pieces(function: Callable[[Any], Any], pieces: Sequence[Any]) -> list[Any]:
        with tqdm(total=len(pieces), desc=what, unit="piece", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

            def here(piece: Any) -> Any:
                result = function(piece)
                bar.update(1)
                return result

            if workers.no_ray or (len(pieces) < 2 and workers.address is None):
                return in_this_process(here, pieces)
            if kept is not None:
                kept.enter_context(session(workers))
            with session(workers):
                found = reduce_shards(Numbered(function, pieces), _joined, range(len(pieces)), workers, bar.update) or []
            return [result for _, result in sorted(found, key=lambda one: one[0])]

    return map_pieces


class Numbered:
    """Piece number -> [(number, result)]. A class, so that it can be sent to workers."""

    def __init__(self, function: Callable[[Any], Any], pieces: Sequence[Any]) -> None:
        self.function, self.pieces = function, pieces

    def __call__(self, number: int) -> list[tuple[int, Any]]:
        return [(number, self.function(self.pieces[number]))]


def _joined(a: list[Any], b: list[Any]) -> list[Any]:
    return a + b
