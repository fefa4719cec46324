"""The sound that excites a feature most: gradient ascent on the log-mel spectrogram that Whisper gets.

What is climbed is the mean score of a feature (`analysis.ascent_targets`) over a short span in the middle of a stretch of sound, in units of the
score's standard deviation on real speech, less what makes a spectrogram unlike sound: its total variation over time and over frequency, and its
distance from silence. Every step shifts the sound a little in time, so that nothing hangs on one alignment with the window.

The input stays one that Whisper's front end could make. Its log-mels span 8 decades of power below their loudest point, 2 units of Whisper's
scale; ours stay within 2 units below the loudest point of real speech, and the padding around them is 2 below their own loudest.

Running the whole window for a second of sound wastes most of the work on padding. `trimmed` runs the sound and a few of the padding's
positions, drawn anew at every step, whose attention counts for all of them (as micro was trained, docs/micro.md). That is an approximation, so
what is reported is always measured in the whole window.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from whisper.model import AudioEncoder, disable_sdpa

from analysis.ascent_targets import Probe
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS
from cache.model import LoadedModel, capture, fast_matmul
from cache.sites import Site

DECADES = 2.0
"""What a log-mel spans below its loudest point: 8 decades of power, 4 to a unit."""
KEPT_PADDING = 24
"""Padding positions that a trimmed window keeps."""
CONTEXTS = ("trimmed", "padded")


@dataclass(frozen=True)
class AscentSettings:
    """How a feature is climbed."""

    seconds: float = 1.0
    """Length of the sound."""
    span: int = 5
    """Frames of 20 ms in its middle over which the feature is to be high."""
    steps: int = 200
    """Steps of gradient ascent."""
    rate: float = 0.03
    """Step size of Adam, in units of Whisper's log-mel scale, of which a spectrogram spans 2."""
    smooth_time: float = 12.0
    """Weight of the mean difference between neighbours in time. All weights are against standard deviations of the feature's score."""
    smooth_mel: float = 8.0
    """Weight of the mean difference between neighbouring mel bands."""
    quiet: float = 2.0
    """Weight of the mean squared distance from silence."""
    jitter: int = 3
    """The sound is shifted at random by up to this many frames at every step."""
    starts: int = 2
    """Random beginnings; the strongest real moment is one more."""
    context: str = "trimmed"
    """trimmed: climb with a few positions of the padding, which is fast; padded: with all of them. Results are measured with all."""

    def __post_init__(self) -> None:
        if not 1 <= self.span <= self.frames:
            raise HearsaeError(f"--span {self.span} must be between 1 frame and the {self.frames} frames of --seconds {self.seconds:g}")
        if self.steps < 1 or self.starts < 0 or self.jitter < 0 or not 0 < self.rate < math.inf:
            raise HearsaeError("--steps and --rate must be positive, --starts and --jitter at least 0")
        if not all(0 <= weight < math.inf for weight in (self.smooth_time, self.smooth_mel, self.quiet)):
            raise HearsaeError("--smooth-time, --smooth-mel and --quiet must be at least 0")
        if 2 * self.jitter + self.span > self.frames:
            raise HearsaeError(f"--jitter {self.jitter} would shift the span out of the {self.frames} frames of --seconds {self.seconds:g}")
        if self.context not in CONTEXTS:
            raise HearsaeError(f"--context {self.context} is none of {', '.join(CONTEXTS)}")

    @property
    def frames(self) -> int:
        return round(self.seconds / FRAME_SECONDS) if 0 < self.seconds < 1e6 else 0

    @property
    def first(self) -> int:
        """The first frame of the span."""
        return (self.frames - self.span) // 2

    def mean(self, values: Tensor) -> Tensor:
        """Over the span: [..., frames] -> [...]."""
        return values[..., self.first : self.first + self.span].mean(-1)


class Ascended(NamedTuple):
    """Where an ascent led."""

    mel: Tensor
    """[starts, n_mels, 2 * frames], in Whisper's log-mel scale."""
    scores: Tensor
    """[steps, starts]: the mean score over the span, at every step, as it was climbed."""


# The window


def whole_window(mel: Tensor, n_audio_ctx: int) -> Tensor:
    """[..., n_mels, 2 * frames] -> [..., n_mels, 2 * n_audio_ctx]: the sound at the window's beginning, and silence as Whisper's front end has it."""
    silence = mel.detach().amax((-2, -1), keepdim=True) - DECADES
    padding = silence.expand(*mel.shape[:-1], 2 * n_audio_ctx - mel.shape[-1])
    return torch.cat([mel, padding], dim=-1)


def window_rows(model: LoadedModel, mel: Tensor, site: Site) -> Tensor:
    """The site's rows at the sound's frames, in Whisper's whole window: [frames, d] for [n_mels, 2 * frames]. Without gradients."""
    with fast_matmul():
        found = capture(model, whole_window(mel, model.dims.n_audio_ctx)[None], [site])[site.name][0]
    return found[: mel.shape[-1] // 2].clone()


class _Reached(Exception):
    """Ends the forward pass at the site."""


@contextmanager
def _until(model: nn.Module, site: str) -> Iterator[list[Tensor]]:
    """While it lasts, a forward pass ends at the site, and what the site gave is in the list."""
    found: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = model.get_submodule(site).register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def padded_rows(module: nn.Module, mel: Tensor, site: str) -> Tensor:
    """[batch, frames, d] of the site, for the sound in the whole window; differentiable. mel: [batch, n_mels, 2 * frames]."""
    encoder: AudioEncoder = module.get_submodule("encoder")
    with _until(module, site) as found, suppress(_Reached):
        encoder(whole_window(mel, len(encoder.positional_embedding)))
    return found[0][:, : mel.shape[-1] // 2]


def trimmed_rows(module: nn.Module, mel: Tensor, site: str, kept: Tensor) -> Tensor:
    """About the same, with the padding's positions `kept` alone (`spread_padding`), each counting for its share of them all."""
    encoder: AudioEncoder = module.get_submodule("encoder")
    n, frames = len(encoder.positional_embedding), mel.shape[-1] // 2
    # Behind the sound one position still hears its end, the others padding alone, but for the last, which has the window's edge in view.
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(whole_window(mel, frames + 3))))).transpose(1, 2)
    near, padding, edge = x[:, : frames + 1], x[:, frames + 1, None], x[:, frames + 2, None]
    positions = torch.cat([torch.arange(frames + 1, device=kept.device), kept, torch.tensor([n - 1], device=kept.device)])
    x = torch.cat([near, padding.expand(-1, len(kept), -1), edge], dim=1) + encoder.positional_embedding[positions]
    weight = torch.zeros(len(positions), device=x.device)
    weight[frames + 1 : -1] = math.log((n - frames - 2) / len(kept))
    with _until(module, site) as found, suppress(_Reached), disable_sdpa():  # which takes no mask of ours
        for block in encoder.blocks:
            x = block(x, mask=weight.expand(len(positions), -1))
        encoder.ln_post(x)
    return found[0][:, :frames]


def spread_padding(frames: int, n: int, generator: torch.Generator) -> Tensor:
    """Which positions of the padding are kept, int64: one at random out of each of KEPT_PADDING equal parts, or all where there are no more.

    Of those between the first behind the sound and the window's last, which are always kept.
    """
    first, count = frames + 1, min(KEPT_PADDING, n - frames - 2)
    edges = torch.linspace(first, n - 1, count + 1, dtype=torch.float64).long()
    return edges[:-1] + (torch.rand(count, generator=generator, dtype=torch.float64) * edges.diff()).long()


# The ascent


def random_starts(count: int, n_mels: int, frames: int, ceiling: float, generator: torch.Generator) -> Tensor:
    """[count, n_mels, 2 * frames]: noise in the lower half of the range."""
    return ceiling - DECADES + DECADES / 2 * torch.rand(count, n_mels, 2 * frames, generator=generator)


def ascend(
    model: LoadedModel, probe: Probe, starts: Tensor, ceiling: float, spread: float, settings: AscentSettings, generator: torch.Generator
) -> Ascended:
    """Climbs the probe from every start.

    starts: [starts, n_mels, 2 * frames]. ceiling: the loudest that a log-mel may be. spread: standard deviation of the probe's score on real
    speech. generator: on the CPU; the shifts and the kept padding are drawn from it.
    """
    n = model.dims.n_audio_ctx
    mel = starts.to(model.device).clamp(ceiling - DECADES, ceiling).requires_grad_()
    optimiser = torch.optim.Adam([mel], lr=settings.rate)
    history = []
    for _ in range(settings.steps):
        shift = int(torch.randint(-settings.jitter, settings.jitter + 1, (), generator=generator))
        kept = spread_padding(settings.frames, n, generator).to(model.device)
        moved = mel.roll(2 * shift, dims=-1)
        rows = trimmed_rows(model.module, moved, probe.site, kept) if settings.context == "trimmed" else padded_rows(model.module, moved, probe.site)
        score = settings.mean(probe.score(rows).roll(-shift, dims=-1))
        objective = score / spread - _unlikeness(mel, ceiling, settings)
        optimiser.zero_grad()
        (-objective.sum()).backward()  # the optimiser descends; the starts are independent of each other
        optimiser.step()
        with torch.no_grad():
            mel.clamp_(ceiling - DECADES, ceiling)
        history.append(score.detach().cpu())
    return Ascended(mel.detach(), torch.stack(history))


def _unlikeness(mel: Tensor, ceiling: float, settings: AscentSettings) -> Tensor:
    """[starts]: by how much a log-mel is unlike sound."""
    over_time = mel.diff(dim=-1).abs().mean((-2, -1))
    over_mel = mel.diff(dim=-2).abs().mean((-2, -1))
    loudness = (mel - (ceiling - DECADES)).square().mean((-2, -1))
    return settings.smooth_time * over_time + settings.smooth_mel * over_mel + settings.quiet * loudness
