"""The sparse paths equal their plain twins."""

import pytest
import torch

from sae.sparse import autoencode, autoencode_plain, decode_rows, select_above, select_batch_topk, select_batch_topk_plain, select_topk


def pre_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    pre = torch.randn(300, 64, generator=generator)
    return {
        "normal": pre,
        "a few strong rows": pre * torch.logspace(2, -2, 300)[:, None],
        "strong rows that a sample misses": pre * (1 + 100.0 * (torch.arange(300) % 2)[:, None]),
        "many ties": (pre * 2).round(),
        "all equal": torch.ones(300, 64),
        "nearly all negative": pre - 2.5,
        "none positive": -pre.abs(),
        "one row": pre[:1],
    }[kind]


KINDS = [
    "normal",
    "a few strong rows",
    "strong rows that a sample misses",
    "many ties",
    "all equal",
    "nearly all negative",
    "none positive",
    "one row",
]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_topk_equals_its_plain_twin(kind):
    pre = pre_of(kind)
    for k in (1, 4, 64):
        fast, plain = select_batch_topk(pre, k * len(pre)), select_batch_topk_plain(pre, k * len(pre))
        for ours, theirs in zip(fast, plain, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_equal_values_at_the_cut_are_kept_from_the_first_on():
    codes = select_batch_topk(torch.ones(3, 4), 6)
    assert codes.rows().tolist() == [0, 0, 0, 0, 1, 1]
    assert codes.latent.tolist() == [0, 1, 2, 3, 0, 1]


def test_topk_keeps_the_k_largest_positive_values_of_each_row():
    pre = pre_of("nearly all negative")
    codes = select_topk(pre, 4)
    dense = torch.zeros_like(pre)
    dense[codes.rows().long(), codes.latent.long()] = codes.value
    kth = pre.topk(4, dim=1).values[:, -1:]
    torch.testing.assert_close(dense, torch.where(pre >= kth, pre, 0.0).relu())


def test_entries_are_sorted_by_row_then_latent():
    pre = pre_of("normal")
    for codes in (select_topk(pre, 7), select_batch_topk(pre, 2000), select_above(pre, 0.5)):
        key = codes.rows().long() * 64 + codes.latent
        assert (key.diff() > 0).all()
        assert codes.start[-1] == len(codes.value)


@pytest.mark.parametrize("kept", [0, 900])
def test_sparse_reconstruction_and_gradients_equal_the_dense_ones(kept):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator)
    shapes = [(24, 96), (96,), (96, 24), (24,)]
    parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    target = torch.randn(200, 24, generator=generator)

    def run(function, *rest):
        x_hat, codes = function(x, *parameters, lambda pre: select_batch_topk(pre, kept), *rest)
        return codes, x_hat, *torch.autograd.grad((x_hat - target).square().sum(), parameters)

    (codes, *fast), (plain_codes, *plain) = run(autoencode, torch.empty(200, 96)), run(autoencode_plain)
    assert len(codes.value) == kept
    torch.testing.assert_close(tuple(codes), tuple(plain_codes))
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)


def test_rows_without_codes_decode_to_zero():
    codes = select_above(torch.tensor([[0.0, 2.0], [-1.0, -1.0]]), 0.0)
    assert decode_rows(codes, torch.eye(2)).tolist() == [[0.0, 2.0], [0.0, 0.0]]
