"""Every function of `sae/triton_kernels.py` equals its plain twin. Run by `test_triton_kernels.py`, in Triton's interpreter or on a GPU.

Apart from the other tests because Triton decides once, when it is imported, whether it interprets.
"""

import os

import pytest
import torch
from torch import Tensor

from sae import triton_kernels, triton_step
from sae.selection import Above, BatchTopK, SparseRows, TopK, select_plain
from sae.sparse import ByLatent, Encoded, Error, decode_error_plain, encode_plain
from sae.triton_kernels import (
    CUT_BLOCK,
    ENTRIES,
    PIECE,
    TILE,
    TILES,
    adam_rows,
    forward_error,
    select_above,
    select_batch_topk,
    select_topk,
    square_norms,
    weight_gradients,
)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_same(codes: SparseRows, expected: SparseRows) -> None:
    for ours, theirs in zip(codes, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def codes_of(dense: Tensor) -> SparseRows:
    """The positive values of [rows, d_sae]."""
    row, latent = dense.nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(dense) + 1, device=DEVICE)).int()
    return SparseRows(start, latent.int(), dense[row, latent].float())


# Which values are kept


@pytest.mark.parametrize("shape", [(5, 384), (7, 24), (3, TILE * TILES + 52), (1, TILE), (0, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.5, -1.0])
def test_values_above_a_threshold_are_kept(shape, dtype, threshold):
    pre = normal(*shape).to(dtype)
    pre[1:2] = -1.0
    bound = torch.tensor(threshold, device=DEVICE)
    assert_same(select_above(pre, bound), select_plain(pre.float(), Above(bound)))


def test_each_latent_may_have_its_own_threshold():
    pre, threshold = normal(9, 300), normal(300, seed=1)
    assert_same(select_above(pre, threshold), select_plain(pre, Above(threshold)))


def test_rows_may_lie_apart_in_memory():
    pre, bound = normal(10, 400)[::3, :100], torch.tensor(0.2, device=DEVICE)
    assert_same(select_above(pre, bound), select_plain(pre, Above(bound)))


def pre_of(kind: str) -> Tensor:
    pre = normal(17, 70, seed=1)
    odd = torch.arange(17, device=DEVICE)[:, None] % 2
    return {
        "normal": pre,
        "strong rows that a sample misses": pre * (1 + 100.0 * odd),
        "strong rows of which a sample is full": pre * (100.0 - 99 * odd),
        "many ties": (pre * 2).round(),
        "all equal": torch.ones_like(pre),
        "nearly all negative": pre - 2.5,
        "none positive": -pre.abs(),
        "very small and infinite": torch.where(pre > 2, torch.inf, pre * 1e-40),
        "not a number": torch.where(pre < 0, torch.nan, pre),
        "one row": pre[:1],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "strong rows that a sample misses",
        "strong rows of which a sample is full",
        "many ties",
        "all equal",
        "nearly all negative",
        "none positive",
        "very small and infinite",
        "not a number",
        "one row",
    ],
)
def test_the_largest_values_of_each_row_or_of_the_batch_are_kept(kind, monkeypatch):
    monkeypatch.setattr(triton_kernels, "BOUND_SAMPLE_ROWS", 8)  # of 17 rows every other one
    pre = pre_of(kind)
    for k in (1, 8, 70):
        positive = pre.nan_to_num(-1.0, posinf=torch.inf)
        assert_same(select_topk(positive, k), select_plain(positive, TopK(k)))
        plain = select_plain(positive, BatchTopK(k * len(pre)))
        assert_same(select_batch_topk(pre, k * len(pre)), plain)


def test_any_number_of_equal_values_may_be_kept():
    pre = torch.ones(3, 500, device=DEVICE)
    for n in (0, 1, 700, CUT_BLOCK, CUT_BLOCK + 1, 1499, 1500, 1501):
        assert_same(select_batch_topk(pre, n), select_plain(pre, BatchTopK(n)))


def test_the_largest_values_of_bfloat16():
    pre = normal(40, 90).bfloat16()  # with ties
    assert_same(select_topk(pre, 20), select_plain(pre.float(), TopK(20)))
    assert_same(select_batch_topk(pre, 200), select_plain(pre.float(), BatchTopK(200)))


# Decoding and gradients


def sparse_values(rows: int, d_sae: int) -> Tensor:
    """[rows, d_sae] with empty rows, full ones, latents that never fire, one that always does, and as many entries as a chunk has."""
    z = normal(rows, d_sae, seed=2).abs()
    z *= torch.rand(rows, d_sae, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.2
    z[:, 3] = 1.5
    z[0] = 0.0
    z[2] = 1.0
    z[4] = 0.0
    z[4, : ENTRIES + 2] = 2.0
    z[:, 5:7] = 0.0
    return z


CASES = {
    # rows, d_in, d_sae, d_out, bounds
    "one width": (13, 24, 40, 24, [40]),
    "384 columns": (6, 384, 30, 384, [30]),
    "another width out than in": (9, 40, 33, 150, [33]),
    "more rows than one piece of a latent": (PIECE * 2 + 5, 24, 10, 24, [10]),
    "a latent that fires as often as a piece is long": (PIECE + 1, 24, 10, 24, [10]),  # row 0 is empty
    "prefixes, some as long as one or two chunks": (11, 24, 50, 24, [7, 7 + ENTRIES, 7 + 3 * ENTRIES, 50]),
    "prefixes, one without entries": (9, 24, 30, 130, [1, 4, 30]),
    "prefixes that only few rows reach": (11, 24, 20, 24, [2, 5, 6, 7, 20]),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_and_gradients_equal_those_of_the_dense_formula(case):
    rows, d_in, d_sae, d_out, ends = CASES[case]
    x, y, mask = normal(rows, d_in), normal(rows, d_out, seed=1), sparse_values(rows, d_sae) > 0
    shapes = [(d_in, d_sae), (d_sae,), (d_sae, d_out), (d_out,)]
    W_enc, b_enc, W_dec, b_dec = (normal(*shape, seed=4 + i) for i, shape in enumerate(shapes))
    bounds, weights = torch.tensor(ends, dtype=torch.int32, device=DEVICE), torch.linspace(0.3, 1.0, len(ends), device=DEVICE)

    exact = [parameter.double().requires_grad_() for parameter in (W_enc, b_enc, W_dec, b_dec)]
    pre = (x.double() @ exact[0] + exact[1]) * mask
    pre.retain_grad()
    e = torch.stack([y.double() - exact[3] - pre[:, :end] @ exact[2][:end] for end in ends])
    loss = (weights.double() * e.square().sum((1, 2))).sum()
    loss.backward()

    row, latent = mask.nonzero(as_tuple=True)
    codes = SparseRows(torch.searchsorted(row, torch.arange(rows + 1, device=DEVICE)).int(), latent.int(), pre.detach()[row, latent].float())
    residuals = forward_error(codes, W_dec, b_dec, y, bounds, weights)
    gradients = weight_gradients(codes, residuals.d_value, residuals.E, bounds, x, d_sae)

    assert residuals.errors.dtype == torch.float64
    suffix_sums = (weights.double()[:, None, None] * e).flip(0).cumsum(0).flip(0)
    d_W_enc, d_b_enc, d_W_dec, d_b_dec = (parameter.grad for parameter in exact)
    for ours, theirs in [
        (residuals.errors, e.square().sum((1, 2))),
        (residuals.e_last, e[-1]),
        (residuals.E, suffix_sums),
        (residuals.d_value, pre.grad[row, latent]),
        (gradients.d_W_dec, d_W_dec),
        (gradients.d_W_enc_T, d_W_enc.t()),
        (gradients.d_b_enc, d_b_enc),
        (-2 * residuals.E[0].sum(0), d_b_dec),
    ]:
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= 2e-6 * theirs.norm()
    never = ~mask.any(0)
    assert never.sum() == 2
    assert not gradients.d_W_dec[never].any() and not gradients.d_W_enc_T[never].any() and not gradients.d_b_enc[never].any()


def test_two_latents_that_just_need_a_second_piece():
    z, E, x = normal(PIECE + 1, 2).abs(), normal(1, PIECE + 1, 24, seed=1), normal(PIECE + 1, 24, seed=2)
    codes, bounds = codes_of(z), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    gradients = weight_gradients(codes, codes.value, E, bounds, x, 2)
    torch.testing.assert_close(tuple(gradients), (-2 * z.t() @ E[0], z.t() @ x, z.sum(0)), rtol=1e-5, atol=1e-4)


def test_without_any_code_the_bias_is_the_reconstruction():
    codes, bounds = codes_of(torch.zeros(4, 10, device=DEVICE)), torch.tensor([3, 10], dtype=torch.int32, device=DEVICE)
    y, b_dec = normal(4, 24), normal(24, seed=1)
    residuals = forward_error(codes, normal(10, 24, seed=2), b_dec, y, bounds, torch.ones(2, device=DEVICE))
    gradients = weight_gradients(codes, residuals.d_value, residuals.E, bounds, y, 10)
    torch.testing.assert_close(residuals.e_last, y - b_dec)
    torch.testing.assert_close(residuals.E[0], 2 * (y - b_dec))
    assert len(residuals.d_value) == 0
    assert all(not gradient.any() and gradient.isfinite().all() for gradient in gradients)


# The halves of a step


def halves(encode_with, decode_with, keep: Above | TopK | BatchTopK, shifted: bool, ends: list[int]) -> tuple[SparseRows, Error, list[Tensor | None]]:
    """One step of an SAE of 24 -> 26 -> 20 on 12 rows, values squashed between the halves: codes, errors, gradients."""
    x, y, W_enc = normal(12, 24), normal(12, 20, seed=1), normal(26, 24, seed=2).t().requires_grad_()
    b_in, b_enc, W_dec, b_dec = (normal(*shape, seed=3 + i).requires_grad_() for i, shape in enumerate([(24,), (26,), (26, 20), (20,)]))
    encoded = encode_with(x, b_in if shifted else None, W_enc, b_enc, keep)
    squashed = encoded._replace(codes=encoded.codes._replace(value=encoded.codes.value.tanh()))
    bounds, weights = torch.tensor(ends, dtype=torch.int32, device=DEVICE), torch.linspace(0.5, 1.5, len(ends), device=DEVICE)
    error = decode_with(squashed, W_dec, b_dec, y, bounds, weights)
    loss = 0.1 * error.weighted + encoded.codes.value.sum()
    return encoded.codes, error, list(torch.autograd.grad(loss, (b_in, W_enc, b_enc, W_dec, b_dec), allow_unused=True))


@pytest.mark.parametrize(
    "keep", [BatchTopK(0), BatchTopK(60), TopK(5), Above(torch.tensor(3.0, device=DEVICE))], ids=["none", "batch", "row", "above"]
)
@pytest.mark.parametrize(("ends", "shifted"), [([26], True), ([6, 7, 15, 26], False)], ids=["shifted", "prefixes"])
def test_a_step_and_its_gradients_equal_the_dense_ones(keep, ends, shifted):
    codes, error, fast = halves(triton_step.encode, triton_step.decode_error, keep, shifted, ends)
    plain_codes, plain_error, plain = halves(encode_plain, decode_error_plain, keep, shifted, ends)
    torch.testing.assert_close(tuple(codes), tuple(plain_codes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuple(error), tuple(plain_error), rtol=1e-5, atol=1e-4)
    assert (fast[0] is None) == (plain[0] is None) == (not shifted)
    torch.testing.assert_close(fast[not shifted :], plain[not shifted :], rtol=1e-4, atol=1e-3)


def test_under_autocast_only_the_encoder_product_is_rounded():
    x, W_enc, b_enc, W_dec = normal(12, 24), normal(26, 24, seed=1).t(), normal(26, seed=2), normal(26, 24, seed=3)
    bounds, weights = torch.tensor([26], dtype=torch.int32, device=DEVICE), torch.ones(1, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        pre = torch.addmm(b_enc, x, W_enc)
        encoded = triton_step.encode(x, None, W_enc, b_enc, BatchTopK(60))
        error = triton_step.decode_error(encoded, W_dec, torch.zeros(24, device=DEVICE), x, bounds, weights)
    assert pre.dtype == torch.bfloat16
    assert_same(encoded.codes, select_plain(pre.float(), BatchTopK(60)))
    z = torch.zeros(12, 26, device=DEVICE)
    z[encoded.codes.rows().long(), encoded.codes.latent.long()] = encoded.codes.value
    torch.testing.assert_close(error.weighted, (x - z @ W_dec).square().sum(), rtol=1e-6, atol=0.0)


def test_a_decoder_that_is_frozen_gets_no_gradient():
    codes = codes_of(sparse_values(5, 20))
    value = codes.value.requires_grad_()
    encoded = Encoded(codes, ByLatent(codes.start, codes.latent, 20))
    bounds, weights = torch.tensor([20], dtype=torch.int32, device=DEVICE), torch.ones(1, device=DEVICE)
    W_dec = normal(20, 24)
    error = triton_step.decode_error(encoded, W_dec, torch.zeros(24, device=DEVICE), normal(5, 24, seed=1), bounds, weights)
    error.weighted.backward()
    row = codes.rows().long()
    torch.testing.assert_close(value.grad, -2 * (error.residual[row] * W_dec[codes.latent.long()]).sum(1), rtol=1e-5, atol=1e-5)


# The optimiser


@pytest.mark.parametrize("shape", [(7, 24), (3, 384), (2, 1280), (1500,)])
def test_adam_is_that_of_torch(shape):
    parameter = normal(*shape)
    twin = parameter.clone().requires_grad_()
    optimizer = torch.optim.Adam([twin], lr=0.01, betas=(0.8, 0.99))
    exp_avg, exp_avg_sq = torch.zeros_like(parameter), torch.zeros_like(parameter)
    clip = torch.tensor([0.25], device=DEVICE)
    for step in (1, 2, 3):
        gradient = normal(*shape, seed=step)
        twin.grad = gradient * clip
        optimizer.step()
        adam_rows(parameter, gradient, exp_avg, exp_avg_sq, step=step, lr=0.01, betas=(0.8, 0.99), gradient_scale=clip)
        torch.testing.assert_close(parameter, twin.detach(), rtol=1e-6, atol=1e-6)
    moments = optimizer.state[twin]
    torch.testing.assert_close((exp_avg, exp_avg_sq), (moments["exp_avg"], moments["exp_avg_sq"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("d", [24, 384])
@pytest.mark.parametrize(("tangent", "unit"), [(True, True), (True, False), (False, True)])
def test_adam_of_unit_rows(d, tangent, unit):
    parameter = torch.nn.functional.normalize(normal(6, d), dim=1)
    before, gradient = parameter.clone(), normal(6, d, seed=1)
    twin = parameter.clone().requires_grad_()
    projected = gradient - (gradient * before).sum(1, keepdim=True) * before if tangent else gradient
    twin.grad = projected * 0.5
    optimizer = torch.optim.Adam([twin], lr=0.05)
    optimizer.step()
    expected = torch.nn.functional.normalize(twin.detach(), dim=1) if unit else twin.detach()

    untouched, moments = gradient.clone(), (torch.zeros_like(parameter), torch.zeros_like(parameter))
    scale = torch.tensor(0.5, device=DEVICE)
    adam_rows(parameter, gradient, *moments, step=1, lr=0.05, gradient_scale=scale, tangent=tangent, unit=unit)
    torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments[0], optimizer.state[twin]["exp_avg"], rtol=1e-5, atol=1e-7)
    assert torch.equal(gradient, untouched)
    torch.testing.assert_close(square_norms(gradient, before if tangent else None), projected.square().sum(1))
