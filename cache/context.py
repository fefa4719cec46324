"""How much silence the encoder hears behind a clip: all of Whisper's window, or a margin of it.

Whisper pads a clip with silence to its window of 30 s, and every position attends to all of that. In a trimmed window only `margin` seconds of
it are left, which is far less work for short clips, and another computation: its activations are other ones (`cache.deviation`).
"""

import json
import math
from typing import Any, Literal, NamedTuple

from cache.errors import HearsaeError, StoreError
from cache.header import FRAME_SECONDS, PADDED

DEFAULT_MARGIN_S = 1.0
"""With the real tiny.en it takes away a fifth to two fifths of what 2 s clips differ by without one (docs/capture.md); a second more gains little."""


class Context(NamedTuple):
    """Of a store, or of a run."""

    margin_s: float | None
    """Seconds of padding that are left behind a clip; None: all of it."""

    @property
    def is_trimmed(self) -> bool:
        return self.margin_s is not None

    def window(self, n_frames: int, n_audio_ctx: int) -> int:
        """Positions, of 20 ms, that the encoder computes for a clip of so many frames; at most `n_audio_ctx`, the model's own."""
        if self.margin_s is None:
            return n_audio_ctx
        margin = min(self.margin_s, n_audio_ctx * FRAME_SECONDS)
        return min(n_audio_ctx, n_frames + round(margin / FRAME_SECONDS))

    def to_json(self) -> dict[str, Any]:
        """`context` of a store's header."""
        return {"mode": "trimmed", "margin_s": self.margin_s} if self.is_trimmed else dict(PADDED)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Context":
        """Raises StoreError for one that this hearsae does not know."""
        if data == PADDED:
            return cls(None)
        if data.keys() == {"mode", "margin_s"} and data["mode"] == "trimmed" and isinstance(data["margin_s"], int | float):
            return cls(float(data["margin_s"]))
        raise StoreError(f"this hearsae does not know the context {json.dumps(data)}: it was made by a later one")


def chosen_context(context: Literal["padded", "trimmed"], margin: float | None) -> Context:
    """What --context and --margin ask for. Raises HearsaeError where they contradict each other, or the margin is no length of time."""
    if context == "padded":
        if margin is not None:
            raise HearsaeError(f"--margin {margin:g} is of --context trimmed: padded keeps all of Whisper's window")
        return Context(None)
    if margin is None:
        return Context(DEFAULT_MARGIN_S)
    if not (math.isfinite(margin) and margin >= 0):
        raise HearsaeError(f"--margin {margin:g} is not a number of seconds from 0 on")
    return Context(float(margin))
