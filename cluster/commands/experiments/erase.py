"""`hearsae experiment erase`."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.concepts import Pool
from analysis.experiments.erase import KS, SAMPLES, erase
from analysis.experiments.report import Report, check_folder, write_report
from analysis.experiments.speech import Mapper
from cache.location import Location
from cluster.commands import Output
from cluster.commands.experiments import mapper
from cluster.workers import WorkerOptions


@dataclass(frozen=True, kw_only=True)
class Erase(Output, WorkerOptions):
    """How many features carry a concept? Sparse probes, and how many features must go until no linear probe finds it, on held-out speakers."""

    store: Location
    """The store; for phones it needs their times (`hearsae align`)."""
    features: str
    """neurons:SITE, sae:DIR, pca:SITE or random:SITE."""
    concept: str = "phones"
    """phones (each of the frequent ones), phone:AA, class:vowel, or a column of the store's clips: COLUMN (each value) or COLUMN=VALUE."""
    k: tuple[int, ...] = KS
    """Features of the sparse probes."""
    pool: Pool | None = None
    """Of a column: mean or max of every feature over the frames of a clip, or none to take frames; default: mean. Phones are of frames."""
    samples: int = SAMPLES
    """Frames, or pooled clips, at most."""
    folds: int = 1
    """Groups of speakers that are held out in turn, of 4."""
    limit: int | None = None
    """Use the first so many clips of the store only; they are in random order."""
    no_baseline: bool = False
    """Leave out the neurons of the same site, which stand beside other features."""
    seed: int = 0
    """Of the samples, the split, the random order and the shuffled labels."""
    out: Path | None = None
    """Folder for the report; default: hearsae-erase. An earlier report there is replaced."""

    def report(self) -> Report:
        """Runs the experiment."""
        return erase(
            self.store.absolute(),
            self.features,
            self.concept,
            self.k,
            self.pool,
            self.samples,
            self.folds,
            self.limit,
            not self.no_baseline,
            self.seed,
            self.map_pieces,
        )

    @property
    def map_pieces(self) -> Mapper:
        return mapper(self, "erase")

    def run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        out = self.out or Path("hearsae-erase")
        check_folder(out)  # before there is work to lose
        self.check()
        report = self.report()
        index = write_report(report, out, asdict(self))
        numbers = {"dir": str(out), "index": str(index.resolve()), "seconds": time.perf_counter() - begin}
        return {"rows": list(report.rows), "summary": report.summary, "lines": list(report.lines), **numbers}

    def summary(self, result: dict[str, Any]) -> str:
        return "\n".join([*result["lines"], f"in {result['seconds']:.1f} s; the report: {result['index']}"])
