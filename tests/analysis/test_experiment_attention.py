"""Attention weights and relevance against plain twins, and `hearsae experiment attention` on micro."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_tiny_whisper
from whisper.model import disable_sdpa

from analysis.attention import (
    attention_weights,
    block_inputs,
    encoder_input,
    locality,
    output_gradient,
    relevance,
    transcript_gradient,
    uniform_locality,
)
from analysis.interventions import tokenizer_for
from cache.model import load_model

POSITIONS, REAL = 60, 21


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three blocks of four heads; weights large enough that attention is not uniform."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    module = load_model(str(write_tiny_whisper(path, n_audio_ctx=POSITIONS, n_audio_head=4, n_audio_layer=3)), "cpu").module
    with torch.no_grad():
        for block in module.encoder.blocks:
            block.attn.query.weight *= 6
            block.attn.key.weight *= 6
            block.attn.value.weight *= 6
    return module


@pytest.fixture(scope="module")
def mel():
    return torch.randn(80, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))


def all_at_once(model, mel, objective):
    """R of 2103.15679 as it is written: every block's weights are held, one backward pass gives all their gradients, R goes from first to last.

    objective: of the last block's output [n, d].
    """
    encoder, held = model.encoder, []
    x = encoder_input(encoder, mel)
    for block in encoder.blocks:
        attn, h = block.attn, block.attn_ln(x)
        q, k, v = (part(h).unflatten(-1, (attn.n_head, -1)).transpose(0, 1) for part in (attn.query, attn.key, attn.value))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        weights.requires_grad_() if not held else None  # parameters need none: the gradient begins at the first weights
        weights.retain_grad()
        held.append(weights)
        x = x + attn.out((weights @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.mlp_ln(x))
    objective(x).backward()
    found = torch.eye(len(x))
    for weights in held:
        found = found + (weights.grad * weights).relu().mean(0) @ found
    return found.detach() - torch.eye(len(x))


def log_lengths(model, positions):
    def objective(x):
        norm, deviation = model.encoder.ln_post, (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt().detach()
        return ((x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias)[positions].norm(dim=-1).log().sum()

    return objective


def close(a, b):
    return (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("positions", [range(REAL), [7]], ids=["all", "one"])
def test_relevance_block_by_block_is_that_of_everything_held_at_once(model, mel, positions):
    positions = torch.tensor(list(positions))
    inputs = block_inputs(model.encoder, mel)
    found = relevance(model.encoder, inputs, output_gradient(model.encoder, inputs[-1], positions), torch.arange(POSITIONS))
    expected = all_at_once(model, mel, log_lengths(model, positions))
    assert expected.max() > 1e-3
    assert close(found, expected)


def test_relevance_for_a_transcript_is_that_of_its_log_probability(model, mel):
    tokenizer = tokenizer_for(model)
    prompt = list(tokenizer.sot_sequence_including_notimestamps)
    tokens = [*prompt, *tokenizer.encode(" a red fish"), tokenizer.eot]

    def log_probability(x):
        logits = model.decoder(torch.tensor([tokens]), model.encoder.ln_post(x)[None])[0]
        return sum(logits[at - 1].log_softmax(-1)[tokens[at]] for at in range(len(prompt), len(tokens)))

    inputs = block_inputs(model.encoder, mel)
    found = relevance(model.encoder, inputs, transcript_gradient(model, inputs[-1], tokens, len(prompt)), torch.arange(POSITIONS))
    assert close(found, all_at_once(model, mel, log_probability))


def test_some_rows_alone_are_those_rows_of_all(model, mel):
    inputs = block_inputs(model.encoder, mel)
    gradient = output_gradient(model.encoder, inputs[-1], torch.arange(REAL))
    whole = relevance(model.encoder, inputs, gradient, torch.arange(POSITIONS))
    assert close(relevance(model.encoder, inputs, gradient, torch.tensor([3, 20, 59])), whole[[3, 20, 59]])


def test_weights_of_real_frames_are_whispers_own(model, mel):
    inputs = block_inputs(model.encoder, mel)
    assert torch.equal(model.encoder.ln_post(inputs[-1]), model.encoder(mel[None])[0])
    block = model.encoder.blocks[1]
    with disable_sdpa():
        scores = block.attn(block.attn_ln(inputs[1])[None])[1][0]
    found = torch.stack(list(attention_weights(block, inputs[1], REAL)))
    assert close(found, scores.softmax(-1)[:, :REAL])


def test_locality_is_what_a_loop_over_pairs_adds_up():
    weights = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = locality(weights) + locality(weights)
    for k in range(9):
        near = sum(float(weights[i, j]) for i in range(5) for j in range(9) if abs(i - j) <= k)
        assert found.within(k) == pytest.approx(near / 5)
    assert found.padding_share == pytest.approx(float(weights[:, 5:].sum() / 5))
    assert found.mean_distance == pytest.approx(sum(float(weights[i, j]) * abs(i - j) for i in range(5) for j in range(9)) / 5)
    half = found.half_width(0.5)
    assert found.within(half) >= 0.5 > found.within(half - 1)
    assert found.rows == 10


def test_uniform_attention_has_the_shares_that_counting_gives():
    found = uniform_locality(2, 100)
    assert found.within(0) == pytest.approx(0.01)
    assert found.within(1) == pytest.approx((2 + 3) / 200)  # the first position has no neighbour before it
    assert found.padding_share == pytest.approx(0.98)


def test_memory_does_not_grow_with_the_heads():
    code = """
import resource, torch
from whisper.model import AudioEncoder
from analysis.attention import block_inputs, output_gradient, relevance
encoder = AudioEncoder(80, 1500, 128, 64, 1).requires_grad_(False)
with torch.no_grad():
    inputs = block_inputs(encoder, torch.randn(80, 3000))
    rows = torch.arange(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    relevance(encoder, inputs, output_gradient(encoder, inputs[-1], rows), rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    one_block = 64 * 1500 * 1500 * 4 / 1024
    assert int(done.stdout) < 0.5 * one_block  # kB; a block's weights alone, not to speak of their gradients, would be all of it


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from cluster.cli import main

    out = tmp_path_factory.mktemp("attention") / "report"
    assert main(["experiment", "attention", "--split", "test", "--limit", "2", "--maps", "1", "--no-ray", "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())["summary"], pq.read_table(out / "rows.parquet").to_pylist(), out


def test_micro_looks_near_and_the_same_with_random_weights_looks_everywhere(done):
    summary, _, _ = done
    uniform = summary["uniform"]["within"]["10"]
    assert summary["layers"]["2"]["within"]["10"] > 0.5 and summary["relevance"]["within"]["10"] > 0.3
    assert max(one["within"]["10"] for one in summary["control"]["layers"].values()) < 3 * uniform
    assert summary["control"]["relevance"]["within"]["10"] < 3 * uniform
    assert summary["layers"]["2"]["padding"] < 0.1 < 0.8 < summary["uniform"]["padding"]
    shares = list(summary["attention"]["3"]["2"]["within"].values())
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 1


def test_there_is_a_row_for_every_clip_block_and_head_and_they_average_to_the_summary(done):
    summary, rows, _ = done
    of_heads = [row for row in rows if row["of"] == "attention"]
    assert {(row["clip"], row["layer"], row["head"]) for row in of_heads} == {(c, layer, h) for c in range(2) for layer in range(4) for h in range(3)}
    assert len(of_heads) == 24 and len(rows) == 26
    one = [row for row in of_heads if (row["layer"], row["head"]) == (1, 2)]
    mean = sum(row["within_10"] * row["frames"] for row in one) / sum(row["frames"] for row in one)
    assert mean == pytest.approx(summary["attention"]["1"]["2"]["within"]["10"])


def test_the_report_draws_what_was_asked(done):
    _, _, out = done
    assert {path.stem for path in out.glob("*.png")} == {"mass", "heads", "relevance-0", "rows-0"}


def test_relevance_for_the_transcript_is_another_one(succeeds, tmp_path, done):
    arguments = ("--split", "test", "--limit", "1", "--maps", "0", "--no-ray", "--target", "transcript", "--out", tmp_path / "report")
    found = succeeds("experiment", "attention", *arguments)
    row = found["rows"][-1]
    assert row["of"] == "relevance" and row["within_50"] > 0.5 and len(row["transcript"].split()) > 3
    assert abs(row["within_10"] - next(row for row in done[1] if row["of"] == "relevance")["within_10"]) > 1e-3
    assert found["rows"][0] | {"transcript": None} == done[1][0]  # attention itself does not depend on it


def test_what_cannot_be_done_is_refused_before_there_is_work(refused, tiny_whisper, tmp_path):
    out = ("--no-ray", "--out", tmp_path / "a")
    encoder = tiny_whisper(tmp_path / "encoder.pt", encoder_only=True)
    short = tiny_whisper(tmp_path / "short.pt", encoder_only=True, n_audio_ctx=20)
    assert "encoder without a decoder" in refused("experiment", "attention", "--model", encoder, "--target", "transcript", *out)
    assert "at least 0 frames" in refused("experiment", "attention", "--k", "-1", *out)
    assert "--maps -1" in refused("experiment", "attention", "--maps", "-1", *out)
    assert "hears 0 s at once" in refused("experiment", "attention", "--model", short, *out)
    assert not (tmp_path / "a").exists()
