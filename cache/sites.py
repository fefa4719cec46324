"""Activation sites: the modules of a Whisper whose outputs can be captured, by name and pattern.

A site is spelled as `model.named_modules()` spells it. The list follows from the model's dimensions alone, in the order in
which a forward pass computes the sites, so the deepest of several is the one with the highest `order`.
"""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from cache.errors import HearsaeError


class Site(NamedTuple):
    """One capturable module."""

    name: str
    """As `model.named_modules()` spells it: `encoder.blocks.2.mlp.1`."""
    axis: str
    """`frame` (20 ms of audio) or `token` (one decoder position)."""
    width: int
    """Length of one activation row."""
    order: int
    """Rank in the order of computation."""

    @property
    def needs_decoder(self) -> bool:
        return self.name.startswith("decoder.")


def _block(prefix: str, axis: str, width: int, cross: bool) -> Iterator[tuple[str, str, int]]:
    yield f"{prefix}.attn_ln", axis, width
    for part in ("query", "key", "value", "out"):
        yield f"{prefix}.attn.{part}", axis, width
    yield f"{prefix}.attn", axis, width
    if cross:
        yield f"{prefix}.cross_attn_ln", axis, width
        yield f"{prefix}.cross_attn.query", axis, width
        yield f"{prefix}.cross_attn.key", "frame", width
        yield f"{prefix}.cross_attn.value", "frame", width
        yield f"{prefix}.cross_attn.out", axis, width
        yield f"{prefix}.cross_attn", axis, width
    yield f"{prefix}.mlp_ln", axis, width
    yield f"{prefix}.mlp.0", axis, 4 * width
    yield f"{prefix}.mlp.1", axis, 4 * width
    yield f"{prefix}.mlp.2", axis, width
    yield f"{prefix}.mlp", axis, width
    yield prefix, axis, width


def _names(dims: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    for i in range(dims["n_audio_layer"]):
        yield from _block(f"encoder.blocks.{i}", "frame", dims["n_audio_state"], cross=False)
    yield "encoder.ln_post", "frame", dims["n_audio_state"]
    yield "decoder.token_embedding", "token", dims["n_text_state"]
    for i in range(dims["n_text_layer"]):
        yield from _block(f"decoder.blocks.{i}", "token", dims["n_text_state"], cross=True)
    yield "decoder.ln", "token", dims["n_text_state"]


def all_sites(dims: dict[str, int]) -> list[Site]:
    """Every site of a Whisper with these dimensions (the fields of `whisper.ModelDimensions`), in order of computation."""
    return [Site(name, axis, width, order) for order, (name, axis, width) in enumerate(_names(dims))]


def match_sites(patterns: Iterable[str], dims: dict[str, int], has_decoder: bool = True) -> list[Site]:
    """The sites that the fnmatch `patterns` name, each once, in order of computation.

    Raises HearsaeError for a pattern that matches nothing, with the names that come close, and for one that matches
    decoder sites only when the checkpoint has no decoder.
    """
    patterns = list(patterns)
    if not patterns:
        raise HearsaeError("--sites names no site: give at least one site or pattern")
    every = all_sites(dims)
    chosen: set[Site] = set()
    for pattern in patterns:
        matched = [site for site in every if fnmatch.fnmatchcase(site.name, pattern)]
        if not matched:
            raise HearsaeError(f"no site matches '{pattern}'{_close(pattern, every)}")
        usable = [site for site in matched if has_decoder or not site.needs_decoder]
        if not usable:
            raise HearsaeError(f"'{pattern}' names decoder sites, but this checkpoint has no decoder: choose encoder sites or a whole checkpoint")
        chosen.update(usable)
    return sorted(chosen, key=lambda site: site.order)


def _close(pattern: str, sites: Sequence[Site]) -> str:
    names = [site.name for site in sites]
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.6)
    if close:
        return "; close to it: " + ", ".join(close)
    return "; there are, for example: " + ", ".join(
        names[-1:] + [n for n in names if n.endswith("mlp.1")][:2] + [n for n in names if n.count(".") == 2][:2]
    )
