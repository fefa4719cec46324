"""The encoder's attention weights, and relevance propagated through them, in memory that does not grow with heads or blocks.

A Whisper window has 1,500 positions: the weights of one head are 9 MB in float32, those of all heads and blocks of large-v3 5.8 GB, and as much
again for their gradients. Nothing here holds more than a few matrices of [positions, positions] at once: weights are made head by head, and
gradients block by block, from the last to the first, out of the blocks' inputs.

Relevance is that of Chefer, Gur and Wolf (2103.15679, equations 5 and 6), as "Interpreting Whisper" used it on the encoder: with A the
attention weights of a block and dA the gradient of an objective with respect to them,

    C = mean over heads of relu(dA * A),    R <- R + C R,    from R = I, from the first block to the last.

R[i, j] says how much of what ended at position i came from position j. It equals the product (I + C_L) ... (I + C_1), so its rows can be made from
the last block to the first, L <- L + L C, beside the gradients: no C is kept.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from whisper.model import AudioEncoder, MultiHeadAttention, ResidualAttentionBlock, Whisper


@torch.no_grad()
def encoder_input(encoder: AudioEncoder, mel: Tensor) -> Tensor:
    """What the first block gets: [n, d] for a log-mel [n_mels, 2 * n] of the whole window."""
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None]))))
    return x[0].T + encoder.positional_embedding


@torch.no_grad()
def block_inputs(encoder: AudioEncoder, mel: Tensor) -> list[Tensor]:
    """The input of every block and, last, the output of the last: each [n, d]."""
    inputs = [encoder_input(encoder, mel)]
    for block in encoder.blocks:
        inputs.append(block(inputs[-1][None])[0])
    return inputs


# Weights


@torch.no_grad()
def attention_weights(block: ResidualAttentionBlock, x: Tensor, n_rows: int) -> Iterator[Tensor]:
    """The weights with which the first n_rows positions attend to all, head by head: each [n_rows, n], rows add up to 1.

    x: [n, d], the block's input.
    """
    attn, h = block.attn, block.attn_ln(x)
    queries, keys = _by_head(attn.query(h[:n_rows]), attn), _by_head(attn.key(h), attn)
    for q, k in zip(queries, keys, strict=True):
        yield _weights(q, k)


def _by_head(x: Tensor, attn: MultiHeadAttention) -> Tensor:
    """[n, d] -> [heads, n, d / heads]"""
    return x.unflatten(-1, (attn.n_head, -1)).transpose(0, 1)


def _weights(q: Tensor, k: Tensor, scores: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """[m, n] of a head's queries [m, d] and keys [n, d]. scores, out: matrices to work in and to write the weights to."""
    return torch.softmax(torch.mm(q, k.T, out=scores).mul_(q.shape[-1] ** -0.5), -1, out=out)


class Locality(NamedTuple):
    """How the weights of some rows are spread over distances. Those of several clips add up."""

    by_distance: Tensor
    """float64 [n]: the weight on positions that many frames away, on both sides together, summed over the rows."""
    on_padding: float
    """The weight on positions behind the clip's end, summed over the rows."""
    rows: int

    def __add__(self, other: "Locality") -> "Locality":  # type: ignore[override]
        return Locality(self.by_distance + other.by_distance, self.on_padding + other.on_padding, self.rows + other.rows)

    def within(self, k: int) -> float:
        """Mean share of a row's weight at most k frames away."""
        return float(self.by_distance[: k + 1].sum() / self.by_distance.sum())

    def half_width(self, share: float) -> int:
        """The smallest number of frames on either side that holds `share` of all weight."""
        cumulative = self.by_distance.cumsum(0) / self.by_distance.sum()
        return min(int((cumulative < share - 1e-12).sum()), len(cumulative) - 1)

    @property
    def mean_distance(self) -> float:
        """In frames."""
        distance = torch.arange(len(self.by_distance), dtype=torch.float64)
        return float((self.by_distance * distance).sum() / self.by_distance.sum())

    @property
    def padding_share(self) -> float:
        return float(self.on_padding / self.by_distance.sum())


def locality(weights: Tensor) -> Locality:
    """Of weights [m, n] of the m positions of a clip, from the first, over all n: what is behind column m is padding."""
    m, n = weights.shape
    position = torch.arange(n, device=weights.device)
    distance = (position[:m, None] - position).abs()
    by_distance = torch.bincount(distance.flatten(), weights.flatten().double(), minlength=n).cpu()
    return Locality(by_distance, float(weights[:, m:].sum(dtype=torch.float64)), m)


def uniform_locality(m: int, n: int) -> Locality:
    """Of m positions that attend to all n alike."""
    return locality(torch.full((m, n), 1 / n))


# Relevance


def relevance(encoder: AudioEncoder, inputs: list[Tensor], gradient: Tensor, rows: Tensor) -> Tensor:
    """Rows of R - I: how much of each of these positions' output came from each position through attention. [len(rows), n], nonnegative.

    inputs: of `block_inputs`. gradient: [n, d], of the objective with respect to the last block's output (`output_gradient`, for example).
    rows: int64, the positions asked for. The identity, by which a position is relevant to itself without any attention, is left out.
    Memory: a block's own activations, and about six matrices of [n, n].
    """
    n = len(gradient)
    left = torch.zeros(len(rows), n, device=gradient.device)
    left[torch.arange(len(rows)), rows] = 1
    for block, x in zip(reversed(list(encoder.blocks)), reversed(inputs[:-1]), strict=True):
        gradient, change = _block_backward(block, x, gradient)
        left += left @ change
    left[torch.arange(len(rows)), rows] -= 1
    return left.clamp_(min=0)  # rounding


def output_gradient(encoder: AudioEncoder, last: Tensor, positions: Tensor) -> Tensor:
    """[n, d]: the gradient, with respect to the last block's output, of what these positions put out.

    The objective is the sum over `positions` of log |y|, y the output as the decoder gets it, behind `ln_post`, whose standard deviation is
    held fixed. A layer norm makes all outputs nearly equally long: the gradient of their length through it would be next to nothing, while
    with the deviation fixed (as in 2202.07304) what adds to y along y counts. Of the length the logarithm: R is no linear function of the
    objective, so its unit matters, and this one is the share of a position's own output. Every position counts alike, whatever its length.
    """
    norm = encoder.ln_post
    centred = last - last.mean(-1, keepdim=True)
    deviation = (last.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
    y = centred / deviation * norm.weight + norm.bias
    gradient = torch.zeros_like(last)
    towards = (y / y.square().sum(-1, keepdim=True) * norm.weight / deviation)[positions]
    gradient[positions] = towards - towards.mean(-1, keepdim=True)
    return gradient


def _block_backward(block: ResidualAttentionBlock, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient at a block's output [n, d] that at its input x, and C [n, n]. Heads go one by one."""
    attn = block.attn
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        h = block.attn_ln(start)
        q, k, v = (_by_head(part(h), attn) for part in (attn.query, attn.key, attn.value))
    queries, keys, values = q.detach(), k.detach(), v.detach()
    # Matrices of [n, n] that serve every head: made anew for each, the C library's allocator keeps many of them.
    scores, weights, product, change = (torch.zeros(len(x), len(x), device=x.device) for _ in range(4))
    mixed = torch.cat([_weights(query, key, scores, weights) @ value for query, key, value in zip(queries, keys, values, strict=True)], dim=-1)
    with torch.enable_grad():
        middle = (x + attn.out(mixed)).detach().requires_grad_()
        out = middle + block.mlp(block.mlp_ln(middle))
    (to_middle,) = torch.autograd.grad(out, middle, gradient)
    to_heads = _by_head(to_middle @ attn.out.weight, attn)
    scale = queries.shape[-1] ** -0.5
    to_q, to_k, to_v = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    for head, to_head in enumerate(to_heads):
        _weights(queries[head], keys[head], scores, weights)
        to_v[head] = weights.T @ to_head
        torch.mm(to_head, values[head].T, out=product).mul_(weights)  # dA * A
        change += torch.clamp(product, min=0, out=scores)
        to_scores = product.sub_(weights.mul_(product.sum(-1, keepdim=True))).mul_(scale)
        to_q[head], to_k[head] = to_scores @ keys[head], to_scores.T @ queries[head]
    (to_start,) = torch.autograd.grad((q, k, v), start, (to_q, to_k, to_v))
    return to_middle + to_start, change.div_(attn.n_head)


def transcript_gradient(model: Whisper, last: Tensor, tokens: list[int], n_prompt: int) -> Tensor:
    """[n, d]: the gradient, with respect to the last block's output, of the decoder's log-probability of a transcript.

    tokens: the decoder's input and, last, the end of text. The first n_prompt of them are given, the others are what is scored.
    """
    with torch.enable_grad():
        start = last.detach().requires_grad_()
        given = torch.tensor([tokens[:-1]], device=last.device)
        logits = model.decoder(given, model.encoder.ln_post(start)[None])[0, n_prompt - 1 :]
        scored = torch.tensor(tokens[n_prompt:], device=last.device)
        score = logits.log_softmax(-1).gather(-1, scored[:, None]).sum()
    return torch.autograd.grad(score, start)[0]
