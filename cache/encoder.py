"""Whisper's encoder as far as it is needed: up to the deepest site asked for, and in its block for the rows that are kept alone.

`cache.model.capture` is its plain twin: openai-whisper's own modules with hooks.
"""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EDGE = 8
"""Frames of 10 ms of padding, at least, that are convolved: the convolutions reach two to each side, and the last two come out otherwise."""


class Arithmetic(Protocol):
    """How the products of a forward pass are computed. Tensors are [batch, rows, width]."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """[batch, n, in] -> [batch, n, out]."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, n_head: int) -> Tensor:
        """Every head's, side by side: query [batch, rows, d], key and value [batch, n, d] -> [batch, rows, d]."""

    def convolution(self, x: Tensor, layer: nn.Conv1d) -> Tensor:
        """Three rows wide, with one of padding on both sides: [batch, n, in] -> [batch, n / stride, out]."""


class Plain:
    """PyTorch's own."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, n_head: int) -> Tensor:
        heads = (x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def convolution(self, x: Tensor, layer: nn.Conv1d) -> Tensor:
        return F.conv1d(x.transpose(1, 2), layer.weight, layer.bias, layer.stride, layer.padding).transpose(1, 2)


def best_arithmetic(device: torch.device) -> Arithmetic:
    """The fastest one here that is as exact as fp32."""
    if device.type == "cpu":
        from cache import amx  # numba, and several seconds of compiling when it is first used on a machine

        if amx.is_exact_here():
            return amx.Amx()
    return Plain()


@torch.inference_mode()
def encode(encoder: Any, mel: Tensor, sites: Collection[str], rows: int | None = None, arithmetic: Arithmetic | None = None) -> dict[str, Tensor]:
    """The outputs of encoder sites: site -> fp32 [batch, rows, width].

    encoder: a `whisper.model.AudioEncoder`. mel: [batch, n_mels, frames of 10 ms], at most as many as it has positions for; of fewer the positions
    beyond are left away. rows: how many to keep of each clip, from its start; default: all.
    """
    wanted, found = set(sites), dict[str, Tensor]()
    deepest = max(int(name.split(".")[2]) if name.startswith("encoder.blocks.") else len(encoder.blocks) for name in wanted)
    for name, value in _forward(encoder, mel, deepest, rows, arithmetic or Plain()):
        if name in wanted:
            found[name] = value[:, :rows]
            if len(found) == len(wanted):
                break
    return found


def _forward(encoder: Any, mel: Tensor, deepest: int, rows: int | None, arithmetic: Arithmetic) -> Iterator[tuple[str, Tensor]]:
    """Site after site, in order of computation. After the keys and values of block `deepest` the first `rows` rows alone."""
    x = _convolved(encoder, mel, arithmetic) + encoder.positional_embedding[: mel.shape[2] // 2]
    for number, block in enumerate(encoder.blocks):
        for site, value in _block(block, x, rows if number == deepest else None, arithmetic):
            yield f"encoder.blocks.{number}{site}", value
        x = value
    yield "encoder.ln_post", encoder.ln_post(x if rows is None else x[:, :rows])


def _convolved(encoder: Any, mel: Tensor, arithmetic: Arithmetic) -> Tensor:
    """What goes into the blocks, less positions: [batch, frames, d]. Of frames that are all like the last one, padding, only what lies at the edges
    is computed; the others come out all alike."""
    differs = (mel != mel[:, :, -1:]).any(1).any(0).nonzero()
    n_different = int(differs[-1]) + 1 if len(differs) else 0
    short = min(mel.shape[2], n_different + n_different % 2 + EDGE)
    x = F.gelu(arithmetic.convolution(mel[:, :, :short].transpose(1, 2), encoder.conv1))
    x = F.gelu(arithmetic.convolution(x, encoder.conv2))
    alike = x[:, -2:-1].expand(-1, (mel.shape[2] - short) // 2, -1)
    return torch.cat([x[:, :-1], alike, x[:, -1:]], dim=1)


def _block(block: Any, x: Tensor, rows: int | None, arithmetic: Arithmetic) -> Iterator[tuple[str, Tensor]]:
    normed = block.attn_ln(x)
    yield ".attn_ln", normed
    query = arithmetic.linear(normed[:, :rows], block.attn.query)
    yield ".attn.query", query
    key = arithmetic.linear(normed, block.attn.key)
    yield ".attn.key", key
    value = arithmetic.linear(normed, block.attn.value)
    yield ".attn.value", value
    attended = arithmetic.linear(arithmetic.attention(query, key, value, block.attn.n_head), block.attn.out)
    yield ".attn.out", attended
    yield ".attn", attended
    x = x[:, :rows] + attended
    normed = block.mlp_ln(x)
    yield ".mlp_ln", normed
    hidden = arithmetic.linear(normed, block.mlp[0])
    yield ".mlp.0", hidden
    hidden = F.gelu(hidden)
    yield ".mlp.1", hidden
    hidden = arithmetic.linear(hidden, block.mlp[2])
    yield ".mlp.2", hidden
    yield ".mlp", hidden
    yield "", x + hidden
