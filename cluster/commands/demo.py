"""`hearsae demo`."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.explorer.export import export
from analysis.scan import ScanOptions
from cache import micro
from cache.capture import CaptureConfig
from cache.store import ActivationStore
from cache.timings import has_timings
from cluster.commands import Output, size
from cluster.commands.align import Align
from cluster.commands.cache import run_capture
from cluster.commands.scan import run_scan
from cluster.pipeline import PoolOptions
from cluster.workers import WorkerOptions, session
from sae.metrics import evaluate
from sae.models import load_dictionary
from sae.train import train
from sae.train_config import TrainConfig

RESIDUAL, NEURONS = "encoder.blocks.2", "encoder.blocks.2.mlp.1"
EXPANSION = 8
"""Latents per dimension of the residual stream."""


@dataclass(frozen=True)
class Demo(Output, WorkerOptions):
    """The whole story: capture, train an SAE, evaluate it, find what neurons and latents respond to, write a page to look at and
    listen to.

    Offline, on the toy Whisper and the synthesised speech that come with hearsae; or on any other that has the site encoder.blocks.2.
    """

    out: Path = Path("hearsae-demo")
    """Folder for everything that is made."""
    dataset: str = "micro"
    """Speech, as in `hearsae cache`."""
    model: str = "micro"
    """Whisper, as in `hearsae cache`."""
    train_split: str = "train"
    """Split to train on, and to find moments in."""
    test_split: str = "test"
    """Split of other speakers, to evaluate the SAE on."""
    rows: int = 1_000_000
    """Rows to train the SAE on."""
    k: int = 32
    """Latents of the SAE kept per row, on average."""

    def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        with session(self):
            train_store, test_store = (self._capture(split) for split in (self.train_split, self.test_split))
            self._align(train_store)

            d_sae = EXPANSION * train_store.sites[RESIDUAL]["width"]
            self._say(f"training an SAE of {d_sae} latents on {RESIDUAL}, {self.rows} rows")
            recipe = TrainConfig(store=(train_store.path,), site=(RESIDUAL,), out=self.out / "sae", d_sae=(d_sae,), k=(self.k,), rows=self.rows)
            (trained,) = train(recipe)
            held_out = evaluate(load_dictionary(self.out / "sae"), test_store)
            self._say(f"  on the held-out speech: FVU {held_out.fvu:.3f}, L0 {held_out.l0:.1f}, {held_out.dead_fraction:.1%} of the latents dead")

            scans = []
            for name, spec in (("neurons", f"neurons:{NEURONS}"), ("latents", f"sae:{self.out / 'sae'}")):
                self._say(f"finding the moments that drive the {name}")
                scans.append(run_scan(train_store.path, spec, self.out / name, ScanOptions(), self))
        self._say("writing the page")
        page = export([self.out / "neurons", self.out / "latents"], self.out / "page")
        return {
            "page": str(Path(page["index"]).resolve()),
            "fvu": held_out.fvu,
            "l0": held_out.l0,
            "dead_fraction": held_out.dead_fraction,
            "rows_per_s": trained.rows_per_s,
            "features": sum(scan["features"] for scan in scans),
            "seconds": time.perf_counter() - start,
        }

    def _capture(self, split: str) -> ActivationStore:
        self._say(f"capturing {RESIDUAL} and {NEURONS} of {self.model} on the {split} speech")
        config = CaptureConfig(dataset=self.dataset, split=split, model=self.model, sites=(RESIDUAL, NEURONS), out=self.out / f"{split}.zarr")
        done = run_capture(config, PoolOptions(self.address, self.no_ray, self.workers, self.gpus_per_worker))
        self._say(f"  {done['clips']} clips, {done['frames']} frames, {size(sum(site['bytes'] for site in done['sites'].values()))}")
        return ActivationStore.open(done["store"])

    def _align(self, store: ActivationStore) -> None:
        if has_timings(store):
            return
        known = (micro.NAME,) if self.dataset == micro.NAME else ()
        self._say("taking the times of words and phones that come with the speech" if known else "finding when words and phones are said")
        done = Align(store=store.path, import_=known, no_ray=self.no_ray, address=self.address, workers=self.workers).run()
        self._say(f"  {done['words']} words, {done['phones']} phones; {done['failed']} clips without")

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['features']} features in {result['seconds']:.0f} s; look and listen: {result['page']}"

    def _say(self, line: str) -> None:
        if not self.json:
            print(line, file=sys.stderr, flush=True)
