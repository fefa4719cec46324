"""The sparse parts of a training step on a GPU: everything after the encoder's matrix product.

After that product only the selection still looks at all [rows, d_sae] pre-activations; decoding, the gradients and the optimiser touch `k`
latents a row, or the parameters once. The programs themselves stand in `sae/triton_programs.py`, which is imported at the first launch:
this module can be imported where there is no Triton.

Tested: every function against a plain PyTorch twin in Triton's interpreter, on the CPU, and every program compiled for compute
capability 9.0 (`tests/sae/test_triton_kernels.py`). Not tested: no GPU has run them, so the block sizes below are reasoned, not measured.

Apart from the selections, which must know how many entries there are, nothing here waits for the device.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.selection import BOUND_SAMPLE_ROWS, BOUND_SLACK, DIGITS, SparseRows

TILE = 256
"""Columns that are counted together in a selection: at d_sae 49152 and k 32 five of six tiles keep nothing and are read once only."""
TILES = 8
"""Tiles of a program: 16 values for each of its 128 threads."""
DIGIT_BLOCK = 4096
"""Values of which a program makes one histogram: twice as many as it has bins."""
CUT_BLOCK = 1024
"""Candidates of a program that cuts them down to the n largest."""
COLUMNS = 128
"""Columns of a program that reads rows of matrices: 16 bytes for each thread of its one warp, and a divisor of every width of Whisper."""
ENTRIES = 8
"""Rows that such a program reads at once: their latencies overlap."""
PIECE = 128
"""Entries of one latent that a single program sums up; a latent with more is summed up in pieces, for one that fires in every row would
keep all others waiting."""
FLAT_BLOCK = 1024
"""Elements of a program where rows don't matter."""
THREAD_VALUES = 16
"""Values of a row for each thread of the optimiser: there are four tensors of them in its registers."""


class Residuals(NamedTuple):
    """What `forward_error` gives."""

    errors: Tensor
    """float64 [groups]: ||e_g||^2, summed over all rows."""
    e_last: Tensor
    """float32 [rows, d_out]: y less the reconstruction of the whole dictionary."""
    E: Tensor
    """float32 [groups, rows, d_out]: E_g = sum over g' >= g of weights[g'] * e_g'."""
    d_value: Tensor
    """float32 [nnz]: gradient of the weighted sum of `errors` with respect to the values."""


class WeightGradients(NamedTuple):
    """What `weight_gradients` gives."""

    d_W_dec: Tensor
    """float32 [d_sae, d_out]"""
    d_W_enc_T: Tensor
    """float32 [d_sae, d_in]: of the transposed encoder."""
    d_b_enc: Tensor
    """float32 [d_sae]"""


def is_available() -> bool:
    """Whether these functions can run: there is a CUDA device, and Triton can be imported."""
    return torch.cuda.is_available() and find_spec("triton") is not None


# Which values are kept


def select_above(pre: Tensor, threshold: Tensor) -> SparseRows:
    """The values greater than max(threshold, 0). Twin: `sae.selection.select_plain` with `Above`.

    pre: float32 or bfloat16 [rows, d_sae], with columns side by side in memory. threshold: float32 [], [d_sae] or [rows, 1], on the same device.
    Counts in tiles, sums up, writes: `pre` is read once, and again where something is kept.
    """
    from sae import triton_programs as programs

    rows, d_sae = pre.shape
    assert pre.stride(1) == 1 and threshold.is_contiguous(), "the columns of pre-activations, and thresholds, must lie side by side"
    n_tiles = -(-d_sae // TILE)
    grid = (rows, -(-n_tiles // TILES))
    shape = {"PER_ROW": threshold.dim() == 2, "PER_LATENT": threshold.dim() == 1, "TILE": TILE, "TILES": TILES}
    counts = torch.empty(rows, n_tiles, dtype=torch.int32, device=pre.device)
    with _device_of(pre):
        programs.count_above[grid](pre, pre.stride(0), d_sae, threshold, counts, n_tiles, **shape)
        ends = counts.flatten().cumsum(0, dtype=torch.int32).view(rows, n_tiles)
        start = F.pad(ends[:, -1], (1, 0))
        nnz = int(start[-1])
        latent = torch.empty(nnz, dtype=torch.int32, device=pre.device)
        value = torch.empty(nnz, dtype=torch.float32, device=pre.device)
        programs.write_above[grid](pre, pre.stride(0), d_sae, threshold, counts, ends, n_tiles, latent, value, **shape)
    return SparseRows(start, latent, value)


def select_topk(pre: Tensor, k: int) -> SparseRows:
    """The k largest positive values of each row; of equal values at the cut those of the first latents.

    Twin: `select_plain` with `TopK`. pre: as in `select_above`. PyTorch finds the k-th value; where others equal it, the last ones are dropped.
    """
    cut = pre.topk(k, sorted=False).values.float().amin(1, keepdim=True)
    codes = select_above(pre, (cut.view(torch.int32).clamp(min=1) - 1).view(torch.float32))  # above the next smaller value
    number = codes.start.diff()
    if not len(number) or int(number.max()) <= k:
        return codes
    equal = codes.value == cut[:, 0].repeat_interleave(number, output_size=len(codes.value))
    equal_before = F.pad(equal.cumsum(0, dtype=torch.int32), (1, 0))
    of_rows = equal_before[codes.start.long()]
    allowed = k - (number - of_rows.diff()) + of_rows[:-1]  # how many equal ones may stand before the end of each row, with those of earlier rows
    kept = ~equal | (equal_before[1:] <= allowed.repeat_interleave(number, output_size=len(equal)))
    start = F.pad(kept.cumsum(0, dtype=torch.int32), (1, 0))[codes.start.long()]
    return SparseRows(start, codes.latent[kept], codes.value[kept])


def select_batch_topk(pre: Tensor, n: int) -> SparseRows:
    """The n largest positive values of the batch; of equal values at the cut those of the first rows and latents.

    Twin: `select_plain` with `BatchTopK`. pre: as in `select_above`.
    A histogram of the highest digit in a sample of the rows gives a bound that is probably low enough; where it was not, that of all rows
    gives one that surely is. What lies above it, little more than n values, is then cut down by all digits.
    """
    for every in dict.fromkeys((max(1, len(pre) // BOUND_SAMPLE_ROWS), 1)):
        sample = pre[::every]
        wanted = n if every == 1 else int(n * len(sample) / len(pre) * BOUND_SLACK) + 1
        state = _search(wanted, pre.device)
        _refine(sample, state, *DIGITS[0])
        below = (state[:1] << DIGITS[0][0]) - 1  # the bits of the largest value that is smaller than any with this digit
        codes = select_above(pre, below.clamp(min=0).view(torch.float32)[0])
        if len(codes.value) >= n:
            break
    return codes if len(codes.value) <= n else _cut(codes, n)


def _search(wanted: int, device: torch.device) -> Tensor:
    """The state of a search for the `wanted`-th largest value: int32 (its digits so far, its place among the values that have them)."""
    state = torch.zeros(2, dtype=torch.int32, device=device)
    state[1:].fill_(wanted)  # a tensor made from a list would be copied to the device, and waited for
    return state


def _refine(values: Tensor, state: Tensor, shift: int, width: int) -> None:
    """Appends the next digit of the wanted value to the state of its search. values: [rows, columns]."""
    from sae import triton_programs as programs

    counts = torch.zeros(1 << width, dtype=torch.int32, device=values.device)
    rows, columns = values.shape
    with _device_of(values):
        grid = (rows, -(-columns // DIGIT_BLOCK))
        programs.count_digits[grid](values, values.stride(0), columns, state, counts, SHIFT=shift, WIDTH=width, BLOCK=DIGIT_BLOCK)
        programs.choose_digit[(1,)](counts, state, WIDTH=width)


def _cut(codes: SparseRows, n: int) -> SparseRows:
    """The n largest of more than n entries."""
    from sae import triton_programs as programs

    nnz, device = len(codes.value), codes.value.device
    state = _search(n, device)
    for shift, width in DIGITS:
        _refine(codes.value[None], state, shift, width)
    blocks = nnz // CUT_BLOCK + 1  # of nnz + 1 places: the last one says how many there are
    larger, equal = (torch.empty(blocks, dtype=torch.int32, device=device) for _ in range(2))
    latent = torch.empty(n, dtype=torch.int32, device=device)
    value = torch.empty(n, dtype=torch.float32, device=device)
    before = torch.empty(nnz + 1, dtype=torch.int32, device=device)
    with _device_of(value):
        programs.count_at_cut[(blocks,)](codes.value, nnz, state, larger, equal, BLOCK=CUT_BLOCK)
        ends = [counts.cumsum(0, dtype=torch.int32) for counts in (larger, equal)]
        programs.write_to_cut[(blocks,)](
            codes.latent, codes.value, nnz, state, larger, ends[0], equal, ends[1], latent, value, before, BLOCK=CUT_BLOCK
        )
    return SparseRows(before[codes.start.long()], latent, value)


# Decoding and gradients


def forward_error(codes: SparseRows, W_dec: Tensor, b_dec: Tensor, y: Tensor, bounds: Tensor, weights: Tensor) -> Residuals:
    """Decodes, and goes back as far as the values of the codes. The loss is sum over g of weights[g] * sum over rows of ||e_g||^2, where

        e_g = y - b_dec - sum over entries with latent < bounds[g] of value * W_dec[latent]

    are the residuals of nested prefixes of the dictionary (Matryoshka SAEs, 2503.17547; every other architecture has one, the whole).
    With g(l) the first prefix that has latent l, d_value = -2 <W_dec[l], E_g(l)>; the gradient of b_dec is -2 * E[0].sum(0), to which an
    SAE that takes b_dec from its input adds -W_enc @ d_b_enc. Twin: the dense formula, differentiated by PyTorch.

    W_dec: float32 [d_sae, d_out], b_dec: [d_out], y: [rows, d_out], all contiguous. bounds: int32 [groups], ascending, the last d_sae.
    weights: float32 [groups].
    """
    from sae import triton_programs as programs

    (rows, d_out), n_groups, nnz = y.shape, len(bounds), len(codes.value)
    _check_contiguous(W_dec=W_dec, b_dec=b_dec, y=y)
    n_parts = -(-d_out // COLUMNS)
    square_errors = y.new_empty(n_groups, rows, n_parts)
    e_last, E, d_value = torch.empty_like(y), y.new_empty(n_groups, rows, d_out), y.new_empty(n_parts, nnz)
    outputs, sizes = (square_errors, e_last, E, d_value), (rows, d_out, nnz, n_groups, n_parts)
    shape = {"GROUPS": _power_of_two(n_groups), "COLUMNS": COLUMNS, "ENTRIES": ENTRIES}
    with _device_of(y):
        programs.forward_error[(rows, n_parts)](*codes, W_dec, b_dec, y, bounds, weights, *outputs, *sizes, **shape, num_warps=1)
    return Residuals(square_errors.sum((1, 2), dtype=torch.float64), e_last, E, d_value[0] if n_parts == 1 else d_value.sum(0))


class LatentOrder(NamedTuple):
    """The entries of codes in the order of latents, which both weight gradients sum over."""

    start: Tensor
    """int32 [d_sae + 1]: the entries of latent l are `start[l]:start[l + 1]`."""
    entry: Tensor
    """int64 [nnz]: where in the codes each entry stands."""
    row: Tensor
    """int32 [nnz]"""
    first_piece: Tensor
    """int32 [d_sae + 1]: the pieces of latent l are `first_piece[l]:first_piece[l + 1]`; none if it has at most PIECE entries."""
    latent_of_piece: Tensor
    """int32 [the most pieces that there can be]; d_sae where there is none."""


def latent_order(start: Tensor, latent: Tensor, d_sae: int) -> LatentOrder:
    """Of the codes with this `start` and `latent`. Within a latent rows ascend."""
    nnz, device = len(latent), latent.device
    in_order, entry = latent.sort(stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(d_sae + 1, dtype=torch.int32, device=device), out_int32=True)
    rows = torch.arange(len(start) - 1, dtype=torch.int32, device=device)
    row = torch.repeat_interleave(rows, start.diff(), output_size=nnz)[entry]
    number = bounds.diff()
    pieces = torch.where(number > PIECE, (number + PIECE - 1) // PIECE, 0)
    first_piece = F.pad(pieces.cumsum(0, dtype=torch.int32), (1, 0))
    most = 2 * nnz // PIECE  # n > PIECE entries make less than n / PIECE + 1 pieces
    piece = torch.arange(most, dtype=torch.int32, device=device)
    return LatentOrder(bounds, entry, row, first_piece, torch.searchsorted(first_piece[1:], piece, right=True, out_int32=True))


def sum_by_latent(
    order: LatentOrder, factor: Tensor, matrix: Tensor, bounds: Tensor | None = None, scale: float = 1.0, factor_sums: bool = False
) -> tuple[Tensor, Tensor]:
    """(scale * sums over each latent's entries of factor * matrix[row] [d_sae, d], sums of factor [d_sae], not set without `factor_sums`).

    factor: float32 [nnz], in the order of the codes. matrix: float32 [rows, d], or [groups, rows, d], of which a latent takes that of the
    first group with bounds[group] > latent. Contiguous. Always in the same order, so the same inputs give the same bits.
    Twin: a dense product with the factors as a [d_sae, rows] matrix.
    """
    from sae import triton_programs as programs

    if bounds is None:
        matrix, bounds = matrix[None], order.start[-1:]  # one group: where it ends is not looked at
    n_groups, n_rows, d = matrix.shape
    _check_contiguous(matrix=matrix)
    d_sae, n_pieces, n_parts = len(order.start) - 1, len(order.latent_of_piece), -(-d // COLUMNS)
    factor = factor[order.entry]
    total, sums, pieces = matrix.new_empty(d_sae, d), matrix.new_empty(d_sae), matrix.new_empty(n_pieces, d)
    inputs = (order.start, order.row, factor, matrix, bounds, order.first_piece)
    shape = {"GROUPS": _power_of_two(n_groups), "PIECE": PIECE, "COLUMNS": COLUMNS, "ENTRIES": ENTRIES}
    with _device_of(matrix):
        programs.sum_pieces[(n_pieces, n_parts)](*inputs, order.latent_of_piece, pieces, n_rows, d, d_sae, n_groups, **shape, num_warps=1)
        programs.sum_latents[(d_sae, n_parts)](
            *inputs, pieces, total, sums, n_rows, d, n_groups, scale, FACTOR_SUMS=factor_sums, **shape, num_warps=1
        )
    return total, sums


def weight_gradients(codes: SparseRows, d_pre: Tensor, E: Tensor, bounds: Tensor, x_centred: Tensor, d_sae: int) -> WeightGradients:
    """The gradients of the weights, in sums over the entries of each latent l (with their rows r):

        d_W_dec[l] = -2 * sum of value * E_g(l)[r]        d_W_enc_T[l] = sum of d_pre * x_centred[r]        d_b_enc[l] = sum of d_pre

    Latents without entries have zeros. Twin: dense products with the codes as a [rows, d_sae] matrix.

    d_pre: float32 [nnz], gradient with respect to the pre-activation of each entry. E, bounds: as from `forward_error`.
    x_centred: float32 [rows, d_in], contiguous: what W_enc was multiplied with.
    """
    order = latent_order(codes.start, codes.latent, d_sae)
    d_W_dec, _ = sum_by_latent(order, codes.value, E, bounds, scale=-2.0)
    return WeightGradients(d_W_dec, *sum_by_latent(order, d_pre, x_centred, factor_sums=True))


# The optimiser


def square_norms(gradient: Tensor, tangent_to: Tensor | None = None) -> Tensor:
    """float32 [rows]: the squared norms of the rows of a gradient [rows, d], of what is tangential to the unit rows of a parameter if it is given.

    What the norm to clip by is made of, without writing the tangential gradient. Both contiguous, float32.
    Twin: `(g - (g * p).sum(1, keepdim=True) * p).square().sum(1)`.
    """
    from sae import triton_programs as programs

    rows, d = gradient.shape
    norms = gradient.new_empty(rows)
    parameter = gradient if tangent_to is None else tangent_to
    _check_contiguous(gradient=gradient, tangent_to=parameter)
    block, warps = _row_block(d)
    with _device_of(gradient):
        programs.square_norms[(rows,)](gradient, parameter, norms, d, TANGENT=tangent_to is not None, BLOCK=block, num_warps=warps)
    return norms


def adam_rows(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    gradient_scale: Tensor,
    tangent: bool = False,
    unit: bool = False,
) -> None:
    """One step of Adam (1412.6980) in place, as `torch.optim.Adam` without weight decay does it, reading and writing everything once.

    parameter, gradient and the two moments: float32 [rows, d], contiguous; without `tangent` and `unit` any shape will do.
    step: 1 at the first call. gradient_scale: float32 [] or [1], what the gradient is multiplied with (the factor that clips it).
    tangent: takes from each row of the gradient its part along the parameter's row, which must have unit norm. The gradient's memory stays as it is.
    unit: scales each row of the parameter to unit norm after the step.
    Twin: the projection of `Trainee`, `torch.optim.Adam`, `torch.nn.functional.normalize`.
    """
    from sae import triton_programs as programs

    _check_contiguous(parameter=parameter, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    n = parameter.numel()
    d = parameter.shape[1] if tangent or unit else FLAT_BLOCK
    block, warps = _row_block(d)
    step_size, root_correction = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
    with _device_of(parameter):
        programs.adam_rows[(-(-n // d),)](
            parameter, gradient, exp_avg, exp_avg_sq, gradient_scale, n, d, step_size, root_correction, *betas, eps,
            TANGENT=tangent, UNIT=unit, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def _row_block(d: int) -> tuple[int, int]:
    """For programs of one row of d columns each: (the power of two that holds it, warps)."""
    block = _power_of_two(d)
    return block, min(16, max(1, block // (32 * THREAD_VALUES)))


def _power_of_two(n: int) -> int:
    """The smallest one that is not less than n."""
    return 1 << (n - 1).bit_length()


def _check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.dtype == torch.float32, f"{name} must be contiguous float32"


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
