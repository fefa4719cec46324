"""`python -m cache.micro.recipe`: makes micro again, from nothing."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from cache import micro
from cache.errors import HearsaeError
from cache.micro.recipe.corpus import write_corpus
from cache.micro.recipe.publish import publish
from cache.micro.recipe.train import Recipe, train
from cache.micro.recipe.training_set import write_training_set


@dataclass(frozen=True)
class Make:
    """Synthesise speech, train micro on it, and put checkpoint and corpus where the package keeps them (or elsewhere, with --into).

    Run again it goes on from where it was cut off. Needs libespeak-ng (Debian: apt-get install libespeak-ng1).
    """

    work: Path
    """Folder for what is made on the way: the training set (3 GB) and the state of the training."""
    into: Path = Path(micro.__file__).parent
    """Folder for micro.pt and speech/."""
    clips: int = 48_000
    processes: int = 2
    """One thread each."""
    device: str = "cpu"
    """cuda trains on one GPU, with one process."""
    recipe: Recipe = field(default_factory=Recipe)

    def run(self) -> None:
        start = time.perf_counter()
        write_training_set(self.work / "speech", self.clips, self.recipe.seed, self.processes)
        print(f"training set: {(time.perf_counter() - start) / 60:.0f} minutes", flush=True)
        trained = train(self.work / "speech", self.work, self.recipe, 1 if self.device.startswith("cuda") else self.processes, self.device)
        self.into.mkdir(parents=True, exist_ok=True)
        publish(trained, self.into / "micro.pt")
        write_corpus(self.into / "speech", {"train": 160, "test": 40}, seed=0)
        print(f"{self.into}: micro.pt and speech/, {(time.perf_counter() - start) / 60:.0f} minutes in all")


@dataclass(frozen=True)
class HeldOut:
    """Synthesise held-out speech (sentences and voices that training never has) as an audio folder, to measure on."""

    out: Path
    clips: int = 1001
    seed: int = 1

    def run(self) -> None:
        write_corpus(self.out, {"test": self.clips}, self.seed)


if __name__ == "__main__":
    try:
        tyro.cli(Make | HeldOut, prog="python -m cache.micro.recipe").run()
    except HearsaeError as error:
        sys.exit(f"hearsae: {error}")
