"""`hearsae demo`."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.explorer.export import export
from analysis.scan import ScanOptions
from cache.capture import CaptureConfig
from cache.errors import HearsaeError
from cache.store import ActivationStore
from cluster.commands import Output, size
from cluster.commands.cache import run_capture
from cluster.commands.scan import run_scan
from cluster.workers import WorkerOptions, session
from sae.metrics import evaluate
from sae.models import load_dictionary
from sae.train import TrainConfig, train

RESIDUAL, NEURONS = "encoder.blocks.2", "encoder.blocks.2.mlp.1"


@dataclass(frozen=True)
class Demo(Output, WorkerOptions):
    """The whole story on real speech: capture, train an SAE, evaluate it, find what neurons and latents respond to, write a page.

    Needs the folder of assets (speech with transcripts, and the encoder of Whisper tiny.en) that HEARSAE_ASSETS names.
    """

    out: Path = Path("hearsae-demo")
    """Folder for everything that is made."""
    rows: int = 1_000_000
    """Rows to train the SAE on."""

    def run(self) -> dict[str, Any]:
        assets, start = find_assets(), time.perf_counter()
        with session(self):
            for split in ("train", "test"):
                self._say(f"capturing {RESIDUAL} and {NEURONS} of Whisper tiny.en on the {split} speech")
                capture = CaptureConfig(
                    dataset=str(assets / "speech"),
                    split=split,
                    model=str(assets / "whisper" / "tiny.en.encoder.pt"),
                    sites=(RESIDUAL, NEURONS),
                    out=self.out / f"{split}.zarr",
                )
                done = run_capture(capture, self)
                self._say(f"  {done['clips']} clips, {done['frames']} frames, {size(sum(site['bytes'] for site in done['sites'].values()))}")

            self._say(f"training an SAE of 3072 latents on {RESIDUAL}, {self.rows} rows")
            (trained,) = train(TrainConfig(store=(self.out / "train.zarr",), site=(RESIDUAL,), out=self.out / "sae", rows=self.rows))
            held_out = evaluate(load_dictionary(self.out / "sae"), ActivationStore.open(self.out / "test.zarr"))
            self._say(f"  on the held-out speech: FVU {held_out.fvu:.3f}, L0 {held_out.l0:.1f}, {held_out.dead_fraction:.1%} of the latents dead")

            scans = []
            for name, spec in (("neurons", f"neurons:{NEURONS}"), ("latents", f"sae:{self.out / 'sae'}")):
                self._say(f"finding the moments that drive the {name}")
                scans.append(run_scan(self.out / "train.zarr", spec, self.out / name, ScanOptions(), self))
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

    def summary(self, result: dict[str, Any]) -> str:
        return f"{result['features']} features in {result['seconds']:.0f} s; look and listen: {result['page']}"

    def _say(self, line: str) -> None:
        if not self.json:
            print(line, file=sys.stderr, flush=True)


def find_assets() -> Path:
    """The folder that HEARSAE_ASSETS names, or `../shared/assets` beside the project. Raises HearsaeError if it is not there."""
    folder = Path(os.environ.get("HEARSAE_ASSETS") or Path(__file__).parents[3] / "shared" / "assets")
    if not (folder / "speech").is_dir() or not (folder / "whisper" / "tiny.en.encoder.pt").is_file():
        raise HearsaeError(
            f"the demo needs speech/ (an audio folder with splits train and test) and whisper/tiny.en.encoder.pt in {folder}: "
            "set HEARSAE_ASSETS to a folder that has them (an embedded model and speech are not built yet)"
        )
    return folder
