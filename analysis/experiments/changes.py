"""Changes at one site of a Whisper, which can be sent to workers, and where in a clip they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.experiments.speech import Clip, worker_model
from analysis.interventions import word_frames
from analysis.steering import ChangeRows, Edit, Steerable, edit_rows, open_steerable
from cache.errors import HearsaeError
from cache.model import LoadedModel


class Change(Protocol):
    """What is done to the rows of a site. Can be pickled: what it needs is opened where the work is done."""

    @property
    def site(self) -> str: ...

    def open(self, model: LoadedModel) -> ChangeRows:
        """The change itself, for a model that is loaded."""


@lru_cache(maxsize=8)
def worker_steerable(spec: str, name: str, device: str, seed: int = 0) -> Steerable:
    """`open_steerable`, once in each process."""
    return open_steerable(spec, worker_model(name, device), seed)


@dataclass(frozen=True)
class Steered:
    """Features are edited."""

    site: str
    spec: str
    edits: tuple[Edit, ...]
    device: str
    """As the command names it."""
    seed: int = 0
    """Of a random basis."""

    def open(self, model: LoadedModel) -> ChangeRows:
        return edit_rows(worker_steerable(self.spec, model.name, self.device, self.seed), self.edits)


@dataclass(frozen=True, eq=False)
class Replaced:
    """Every row is replaced by one and the same."""

    site: str
    row: np.ndarray | None
    """float [d]; None: zeros."""

    def open(self, model: LoadedModel) -> ChangeRows:
        if self.row is None:
            return torch.zeros_like
        row = torch.from_numpy(self.row).float().to(model.device)
        return lambda rows: row.to(rows.dtype).expand(rows.shape)


@dataclass(frozen=True)
class SameSize:
    """The control of a change: each row moves as far as by the change, but along one random direction."""

    of: Change
    seed: int

    @property
    def site(self) -> str:
        return self.of.site

    def open(self, model: LoadedModel) -> ChangeRows:
        change, seed = self.of.open(model), self.seed

        def moved(rows: Tensor) -> Tensor:
            changed = change(rows)
            if changed is rows:
                return rows
            direction = F.normalize(torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed)), dim=0).to(rows)
            return rows + (changed - rows).norm(dim=1, keepdim=True) * direction

        return moved


# Where


@dataclass(frozen=True)
class Stretch:
    """Where in a clip a change holds: by default in the clip's own frames, without the padding after it."""

    start_s: float | None = None
    """Seconds within the clip."""
    end_s: float | None = None
    everywhere: bool = False
    """In the whole window, padding included."""

    def frames(self, clip: Clip, n_audio_ctx: int) -> tuple[int, int] | None:
        """[start, stop), empty in a clip that ends before; None: everywhere."""
        if self.everywhere:
            return None
        start, stop = word_frames(self.start_s or 0.0, clip.duration_s if self.end_s is None else self.end_s, n_audio_ctx=n_audio_ctx)
        stop = clip.n_frames if self.end_s is None else min(stop, clip.n_frames)
        return min(start, stop), stop

    def check(self, site: str, clips: Sequence[Clip]) -> None:
        """Raises HearsaeError for times that can't be, that no clip has, and where frames are not what the site has."""
        if self.start_s is None and self.end_s is None:
            return
        if self.everywhere:
            raise HearsaeError("--everywhere and --start or --end exclude each other")
        if not site.startswith("encoder."):
            raise HearsaeError(f"{site} is in the decoder, which has no frames: leave out --start and --end")
        start = self.start_s or 0.0
        if start < 0 or (self.end_s is not None and self.end_s <= start):
            raise HearsaeError(f"from {start:g} s to {'the end' if self.end_s is None else f'{self.end_s:g} s'} is no stretch of time")
        longest = max(clip.duration_s for clip in clips)
        if start >= longest:
            raise HearsaeError(f"--start {start:g} is after the end of every clip: the longest has {longest:.2f} s")

    def words(self) -> str:
        """For people."""
        if self.everywhere:
            return "in Whisper's whole window, padding included"
        if self.start_s is None and self.end_s is None:
            return "in the clips' own frames, not in the padding after them"
        return f"from {self.start_s or 0.0:g} s to {'the end' if self.end_s is None else f'{self.end_s:g} s'} of each clip"
