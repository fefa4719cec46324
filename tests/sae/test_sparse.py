"""The sparse paths equal their plain twins."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sae.selection import Above, BatchTopK, Keep, SparseRows, TopK, select, select_plain, select_slices
from sae.sparse import Error, decode_error, decode_error_plain, decode_rows, encode, encode_plain


def pre_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    pre = torch.randn(300, 64, generator=generator)
    return {
        "normal": pre,
        "a width that blocks do not divide": pre[:, :53].contiguous(),
        "fewer columns than a block": pre[:, :5].contiguous(),
        "a few strong rows": pre * torch.logspace(2, -2, 300)[:, None],
        "strong rows that a sample misses": pre * (1 + 100.0 * (torch.arange(300) % 2)[:, None]),
        "many ties": (pre * 2).round(),
        "all equal": torch.ones(300, 64),
        "nearly all negative": pre - 2.5,
        "none positive": -pre.abs(),
        "one row": pre[:1],
        "rows enough for several threads": torch.randn(2000, 64, generator=generator),
    }[kind]


KINDS = [
    "normal",
    "a width that blocks do not divide",
    "fewer columns than a block",
    "a few strong rows",
    "strong rows that a sample misses",
    "many ties",
    "all equal",
    "nearly all negative",
    "none positive",
    "one row",
    "rows enough for several threads",
]


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def hold_equal(ours: SparseRows, theirs: SparseRows) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_equals_what_the_plain_twin_keeps(kind):
    pre = pre_of(kind)
    keeps: list[Keep] = [Above(torch.tensor(bound)) for bound in (-1.0, 0.0, 0.7, 1e9)]
    keeps.append(Above(torch.linspace(-1, 2, pre.shape[1])))
    keeps += [TopK(k) for k in (1, 4, 40, 64) if k <= pre.shape[1]]
    keeps += [BatchTopK(k * len(pre)) for k in (1, 4, 64)]
    for keep in keeps:
        expected = select_plain(pre, keep)
        for n in (1, 3):
            with threads(n):
                hold_equal(select(pre, keep), expected)
                hold_equal(select_slices(lambda: iter(pre.split(37)), torch.zeros(pre.shape[1]), keep, len(pre)), expected)


@pytest.mark.parametrize("hint", [0.0, 0.5, 1.2, 5.0])
def test_a_hint_changes_nothing_whether_it_is_good_or_not(hint):
    pre = pre_of("normal")
    keep = BatchTopK(1200, hint=hint)
    hold_equal(select(pre, keep), select_plain(pre, keep))
    assert 0.8 < keep.hint < pre.flatten().topk(1200).values[-1]


def test_equal_values_at_the_cut_are_kept_from_the_first_on():
    codes = select(torch.ones(3, 4), BatchTopK(6))
    assert codes.rows().tolist() == [0, 0, 0, 0, 1, 1]
    assert codes.latent.tolist() == [0, 1, 2, 3, 0, 1]
    assert select(torch.ones(2, 4), TopK(3)).latent.tolist() == [0, 1, 2, 0, 1, 2]


def test_topk_keeps_the_k_largest_positive_values_of_each_row():
    pre = pre_of("nearly all negative")
    codes = select(pre, TopK(4))
    dense = torch.zeros_like(pre)
    dense[codes.rows().long(), codes.latent.long()] = codes.value
    kth = pre.topk(4, dim=1).values[:, -1:]
    torch.testing.assert_close(dense, torch.where(pre >= kth, pre, 0.0).relu())


def test_entries_are_sorted_by_row_then_latent():
    pre = pre_of("normal")
    for codes in (select(pre, TopK(7)), select(pre, BatchTopK(2000)), select(pre, Above(torch.tensor(0.5)))):
        key = codes.rows().long() * 64 + codes.latent
        assert (key.diff() > 0).all()
        assert codes.start[-1] == len(codes.value)


def halves(encode_with, decode_with, keep: Keep, shifted: bool, bounds: list[int]) -> tuple[SparseRows, Error, list[torch.Tensor | None]]:
    """One step of an SAE of 24 -> 96 -> 20 on 700 rows, values squashed between the halves: codes, errors, gradients."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(700, 24, generator=generator), torch.randn(700, 20, generator=generator)
    W_enc = torch.randn(96, 24, generator=generator).t().requires_grad_()
    b_in, b_enc, W_dec, b_dec = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((24,), (96,), (96, 20), (20,)))
    encoded = encode_with(x, b_in if shifted else None, W_enc, b_enc, keep)
    squashed = encoded._replace(codes=encoded.codes._replace(value=encoded.codes.value.tanh()))
    error = decode_with(squashed, W_dec, b_dec, y, torch.tensor(bounds, dtype=torch.int32), torch.linspace(0.5, 1.5, len(bounds)))
    loss = error.weighted + encoded.codes.value.sum()
    return encoded.codes, error, list(torch.autograd.grad(loss, (b_in, W_enc, b_enc, W_dec, b_dec), allow_unused=True))


@pytest.mark.parametrize("keep", [BatchTopK(0), BatchTopK(2800), TopK(5), Above(torch.tensor(3.0))], ids=["none", "batch", "row", "above"])
@pytest.mark.parametrize("bounds", [[96], [10, 11, 50, 96], [1, 96]], ids=str)
def test_a_step_and_its_gradients_equal_the_dense_ones(keep, bounds):
    for shifted in (True, False):
        plain_codes, plain_error, plain = halves(encode_plain, decode_error_plain, keep, shifted, bounds)
        for n in (1, 2):
            with threads(n):
                codes, error, fast = halves(encode, decode_error, keep, shifted, bounds)
            torch.testing.assert_close(tuple(codes), tuple(plain_codes), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(tuple(error), tuple(plain_error), rtol=1e-5, atol=1e-4)
            assert (fast[0] is None) == (plain[0] is None) == (not shifted)
            torch.testing.assert_close(fast[not shifted :], plain[not shifted :], rtol=1e-4, atol=1e-3)


def test_threads_change_no_bit():
    with threads(1):
        one = halves(encode, decode_error, BatchTopK(2800), True, [10, 96])
    with threads(3):
        three = halves(encode, decode_error, BatchTopK(2800), True, [10, 96])
    assert all(torch.equal(a, b) for a, b in zip((*one[0][1:], *one[2][1:4]), (*three[0][1:], *three[2][1:4]), strict=True))


def test_the_plain_halves_take_values_that_autocast_has_rounded():
    with torch.autocast("cpu", torch.bfloat16):
        codes, error, _ = halves(encode_plain, decode_error_plain, TopK(5), True, [10, 96])
    assert codes.value.dtype == torch.float32
    weighted = float((error.of_prefixes * torch.tensor([0.5, 1.5])).sum())
    assert float(error.weighted.detach()) == pytest.approx(weighted, rel=1e-6)


def test_rows_without_codes_decode_to_zero():
    codes = select(torch.tensor([[0.0, 2.0], [-1.0, -1.0]]), Above(torch.tensor(0.0)))
    assert decode_rows(codes, torch.eye(2)).tolist() == [[0.0, 2.0], [0.0, 0.0]]
