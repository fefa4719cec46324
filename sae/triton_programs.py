"""The Triton programs that `sae/triton_kernels.py` launches: what one program of each grid does. Importing this needs Triton.

Sums are made in a fixed order and no float is added atomically, so a result depends on its inputs alone.
"""

import triton
import triton.language as tl

# Which values are kept


@triton.jit
def _bound(threshold, row, column, d_sae, PER_ROW: tl.constexpr, PER_LATENT: tl.constexpr):
    """What a value must exceed: the threshold of its row, of its latent, or the one of all; at least 0."""
    if PER_LATENT:
        bound = tl.load(threshold + column, mask=column < d_sae, other=0.0)
    elif PER_ROW:
        bound = tl.load(threshold + row)
    else:
        bound = tl.load(threshold)
    return tl.maximum(bound, 0.0)


@triton.jit
def count_above(
    pre, row_stride, d_sae, threshold, counts, n_tiles, PER_ROW: tl.constexpr, PER_LATENT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):
    """Program (row, group of tiles): how many values each tile of TILE columns keeps. counts: int32 [rows, n_tiles]."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(pre + row * row_stride + column, mask=column < d_sae, other=0.0).to(tl.float32)
    kept = x > _bound(threshold, row, column, d_sae, PER_ROW, PER_LATENT)
    tl.store(counts + row * n_tiles + tile, tl.sum(kept.to(tl.int32), 1), mask=tile < n_tiles)


@triton.jit
def write_above(
    pre, row_stride, d_sae, threshold, counts, ends, n_tiles, latent, value,
    PER_ROW: tl.constexpr, PER_LATENT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (row, group of tiles): writes what was counted; tiles that keep nothing are not read again. ends: inclusive sums of counts."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    count = tl.load(counts + row * n_tiles + tile, mask=tile < n_tiles, other=0)
    if tl.sum(count, 0) > 0:
        first = tl.load(ends + row * n_tiles + tile, mask=tile < n_tiles, other=0) - count
        column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = tl.load(pre + row * row_stride + column, mask=(column < d_sae) & (count[:, None] > 0), other=0.0).to(tl.float32)
        kept = x > _bound(threshold, row, column, d_sae, PER_ROW, PER_LATENT)
        position = first[:, None] + tl.cumsum(kept.to(tl.int32), 1) - 1
        tl.store(latent + position, column, mask=kept)
        tl.store(value + position, x, mask=kept)


@triton.jit
def count_digits(x, row_stride, n_columns, state, counts, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block of columns): adds to counts [2^WIDTH] how many values have which digit, of those whose higher bits are `state[0]`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * row_stride + column, mask=column < n_columns, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    counted = (value > 0) & ((bits >> (SHIFT + WIDTH)) == tl.load(state))
    # The others count as digit 0: where a search ends there, it is because the larger digits are too few.
    found = tl.histogram(tl.where(counted, (bits >> SHIFT) & ((1 << WIDTH) - 1), 0), 1 << WIDTH)
    digit = tl.arange(0, 1 << WIDTH)
    tl.atomic_add(counts + digit, found, mask=found > 0, sem="relaxed")


@triton.jit
def choose_digit(counts, state, WIDTH: tl.constexpr):
    """One program: appends to `state[0]` the digit of the `state[1]`-th largest value, and makes `state[1]` its place among those of this digit.

    With fewer values than that, the digit is 0.
    """
    digit = tl.arange(0, 1 << WIDTH)
    count = tl.load(counts + digit)
    at_least = tl.cumsum(count, 0, reverse=True)  # how many have this digit or a larger one
    prefix, wanted = tl.load(state), tl.load(state + 1)
    chosen = tl.max(tl.where(at_least >= wanted, digit, 0), 0)
    tl.store(state, (prefix << WIDTH) + chosen)
    tl.store(state + 1, wanted - tl.sum(tl.where(digit > chosen, count, 0), 0))


@triton.jit
def count_at_cut(value, nnz, state, larger, equal, BLOCK: tl.constexpr):
    """Program (block of entries): how many of them are larger than the value whose bits are `state[0]`, and how many equal it."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(value + entry, mask=entry < nnz, other=0.0).to(tl.int32, bitcast=True)
    cut = tl.load(state)
    tl.store(larger + tl.program_id(0), tl.sum((bits > cut).to(tl.int32), 0))
    tl.store(equal + tl.program_id(0), tl.sum((bits == cut).to(tl.int32), 0))


@triton.jit
def write_to_cut(latent, value, nnz, state, larger, larger_ends, equal, equal_ends, new_latent, new_value, before, BLOCK: tl.constexpr):
    """Program (block of entries): writes those larger than the cut and the first `state[1]` equal to it.

    before: int32 [nnz + 1], how many of those that are written stand before each entry.
    """
    block = tl.program_id(0)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(value + entry, mask=entry < nnz, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    cut, wanted = tl.load(state), tl.load(state + 1)
    above, tie = (bits > cut).to(tl.int32), (bits == cut).to(tl.int32)
    above_before = tl.load(larger_ends + block) - tl.load(larger + block) + tl.cumsum(above, 0) - above
    ties_before = tl.load(equal_ends + block) - tl.load(equal + block) + tl.cumsum(tie, 0) - tie
    position = above_before + tl.minimum(ties_before, wanted)
    kept = (above > 0) | ((tie > 0) & (ties_before < wanted))
    tl.store(new_latent + position, tl.load(latent + entry, mask=entry < nnz, other=0), mask=kept)
    tl.store(new_value + position, x, mask=kept)
    tl.store(before + entry, position, mask=entry <= nnz)


# Decoding and gradients


@triton.jit
def forward_error(
    start, latent, value, W_dec, b_dec, y, bounds, weights, square_error, e_last, E, d_value, n_rows, d_out, nnz, n_groups, n_parts,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (row, part of the columns): residuals of every prefix, their suffix sums, and this part's share of square errors and `d_value`.

    square_error: [n_groups, n_rows, n_parts]; d_value: [n_parts, nnz]; GROUPS: n_groups, rounded up to a power of two.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d_out
    group = tl.arange(0, GROUPS)
    last = tl.load(start + row + 1)
    e = tl.load(y + row * d_out + column, mask=inside, other=0.0) - tl.load(b_dec + column, mask=inside, other=0.0)
    sums = tl.zeros((GROUPS, COLUMNS), tl.float32)

    at = tl.load(start + row)
    for g in range(n_groups):
        bound = tl.load(bounds + g)
        found = at * 0 + ENTRIES
        while found == ENTRIES:  # entries are sorted by latent: the first chunk that is not full ends the group
            entry = at + tl.arange(0, ENTRIES)
            own = tl.load(latent + entry, mask=entry < last, other=bound)
            here = own < bound
            v = tl.load(value + entry, mask=here, other=0.0)
            w = tl.load(W_dec + own.to(tl.int64)[:, None] * d_out + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            e -= tl.sum(v[:, None] * w, 0)
            found = tl.sum(here.to(tl.int32), 0)
            at += found
        tl.store(square_error + (g * n_rows + row) * n_parts + part, tl.sum(e * e, 0))
        sums += tl.where(group[:, None] <= g, tl.load(weights + g) * e[None, :], 0.0)
    tl.store(e_last + row * d_out + column, e, mask=inside)
    tl.store(E + (group[:, None] * n_rows + row) * d_out + column[None, :], sums, mask=(group[:, None] < n_groups) & inside[None, :])

    at = tl.load(start + row)
    for g in range(n_groups):
        bound = tl.load(bounds + g)
        E_g = tl.sum(tl.where(group[:, None] == g, sums, 0.0), 0)
        found = at * 0 + ENTRIES
        while found == ENTRIES:
            entry = at + tl.arange(0, ENTRIES)
            own = tl.load(latent + entry, mask=entry < last, other=bound)
            here = own < bound
            w = tl.load(W_dec + own.to(tl.int64)[:, None] * d_out + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            tl.store(d_value + part.to(tl.int64) * nnz + entry, -2.0 * tl.sum(w * E_g[None, :], 1), mask=here)
            found = tl.sum(here.to(tl.int32), 0)
            at += found


@triton.jit
def _weighted_rows(row, factor, matrix, first, last, column, d, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr):
    """sum of factor[i] * matrix[row[i]] over entries first:last, of these columns."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for at in range(first, last, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        here = entry < last
        r = tl.load(row + entry, mask=here, other=0).to(tl.int64)
        f = tl.load(factor + entry, mask=here, other=0.0)
        total += tl.sum(f[:, None] * tl.load(matrix + r[:, None] * d + column[None, :], mask=here[:, None] & (column < d)[None, :], other=0.0), 0)
    return total


@triton.jit
def _of_group(matrix, latent, bounds, n_groups, n_rows, d, GROUPS: tl.constexpr):
    """Where, in matrix [n_groups, n_rows, d], the rows of the latent's group begin."""
    group = tl.arange(0, GROUPS)
    ends_before = tl.load(bounds + group, mask=group < n_groups - 1, other=2147483647) <= latent  # all are before the last group's end
    return matrix + tl.sum(ends_before.to(tl.int64), 0) * n_rows * d


@triton.jit
def sum_pieces(
    start, row, factor, matrix, bounds, first_piece, latent_of_piece, pieces, n_rows, d, d_sae, n_groups,
    GROUPS: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (piece, part of the columns): the sum over PIECE entries of a latent that has more. pieces: [n_pieces, d]."""
    piece = tl.program_id(0)
    latent = tl.load(latent_of_piece + piece)
    if latent < d_sae:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first = tl.load(start + latent) + (piece - tl.load(first_piece + latent)) * PIECE
        last = tl.minimum(first + PIECE, tl.load(start + latent + 1))
        own = _of_group(matrix, latent, bounds, n_groups, n_rows, d, GROUPS)
        total = _weighted_rows(row, factor, own, first, last, column, d, COLUMNS, ENTRIES)
        tl.store(pieces + piece.to(tl.int64) * d + column, total, mask=column < d)


@triton.jit
def sum_latents(
    start, row, factor, matrix, bounds, first_piece, pieces, out, factor_sums, n_rows, d, n_groups, scale,
    FACTOR_SUMS: tl.constexpr, GROUPS: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (latent, part of the columns): scale * the sum over the latent's entries, or over its pieces where it has any."""
    latent, part = tl.program_id(0), tl.program_id(1)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    first, last = tl.load(start + latent), tl.load(start + latent + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    if last - first <= PIECE:
        own = _of_group(matrix, latent, bounds, n_groups, n_rows, d, GROUPS)
        total += _weighted_rows(row, factor, own, first, last, column, d, COLUMNS, ENTRIES)
    else:
        piece, end = tl.load(first_piece + latent), tl.load(first_piece + latent + 1)
        at_piece = pieces + piece.to(tl.int64) * d + column
        for _ in range(piece, end):
            total += tl.load(at_piece, mask=column < d, other=0.0)
            at_piece += d
    tl.store(out + latent.to(tl.int64) * d + column, scale * total, mask=column < d)
    if FACTOR_SUMS:  # noqa: SIM102 (decided when this is compiled, unlike the other)
        if part == 0:
            lane_sums = tl.zeros((COLUMNS,), tl.float32)
            for at in range(first, last, COLUMNS):
                entry = at + tl.arange(0, COLUMNS)
                lane_sums += tl.load(factor + entry, mask=entry < last, other=0.0)
            tl.store(factor_sums + latent, tl.sum(lane_sums, 0))


# The optimiser


@triton.jit
def square_norms(gradient, parameter, norms, d, TANGENT: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row): the squared norm of the gradient's row, of its tangential part where asked for."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * d + column
    g = tl.load(gradient + at, mask=column < d, other=0.0)
    if TANGENT:
        p = tl.load(parameter + at, mask=column < d, other=0.0)
        g -= tl.sum(g * p, 0) * p
    tl.store(norms + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def adam_rows(
    parameter, gradient, exp_avg, exp_avg_sq, gradient_scale, n, d, step_size, root_correction, beta1, beta2, eps,
    TANGENT: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row of d of the n elements): one step of Adam, in place."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * d + column
    inside = (column < d) & (at < n)
    p = tl.load(parameter + at, mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0)
    if TANGENT:
        g -= tl.sum(g * p, 0) * p
    g *= tl.load(gradient_scale)
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + (1.0 - beta2) * g * g
    p -= step_size * m / (tl.sqrt(v) / root_correction + eps)
    if UNIT:
        p = p / tl.maximum(tl.sqrt(tl.sum(p * p, 0)), 1e-12)  # the bound of torch.nn.functional.normalize
    tl.store(parameter + at, p, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
