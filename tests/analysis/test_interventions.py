"""Interventions against plain twins, on small Whispers of random weights."""

import copy

import pytest
import torch
import whisper
from conftest import write_tiny_whisper
from whisper.model import MultiHeadAttention, disable_sdpa
from whisper.tokenizer import get_tokenizer

from analysis.interventions import chop, limit_attention, next_tokens, padding_output, transcribe_encoded, word_frames
from cache.errors import HearsaeError
from cache.model import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two blocks, a window of 60 frames; weights large enough that attention is not uniform."""
    path = write_tiny_whisper(tmp_path_factory.mktemp("tiny") / "tiny.pt", n_audio_ctx=60)
    module = load_model(str(path), "cpu").module
    with torch.no_grad():
        for block in module.encoder.blocks:
            block.attn.query.weight *= 8
            block.attn.key.weight *= 8
    return module


@pytest.fixture
def mel():
    return torch.randn(2, 80, 120, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def limited_twin(model, mel, k):
    """The encoder written out, with a loop over positions in place of a mask."""
    encoder = model.encoder
    x = torch.nn.functional.gelu(encoder.conv2(torch.nn.functional.gelu(encoder.conv1(mel)))).permute(0, 2, 1) + encoder.positional_embedding
    for block in encoder.blocks:
        attn, heads = block.attn, block.attn.n_head
        q, key, v = (part(block.attn_ln(x)).unflatten(-1, (heads, -1)) for part in (attn.query, attn.key, attn.value))
        out = torch.zeros_like(q)
        for i in range(x.shape[1]):
            near = slice(max(0, i - k), i + k + 1)
            weights = (torch.einsum("bhd,bjhd->bhj", q[:, i], key[:, near]) / q.shape[-1] ** 0.5).softmax(-1)
            out[:, i] = torch.einsum("bhj,bjhd->bhd", weights, v[:, near])
        x = x + attn.out(out.flatten(2))
        x = x + block.mlp(block.mlp_ln(x))
    return encoder.ln_post(x)


@torch.no_grad()
def encode(model, mel):
    return model.encoder(mel)


@pytest.mark.parametrize("k", [0, 1, 7, 30, 58])
def test_a_limit_is_what_a_loop_over_positions_gives(model, mel, k):
    with limit_attention(model, k):
        limited = encode(model, mel)
    torch.testing.assert_close(limited, limited_twin(model, mel, k), atol=1e-5, rtol=1e-4)
    assert (limited - encode(model, mel)).abs().max() > 1e-3


@pytest.mark.parametrize("k", [59, 60, 1500])
def test_a_limit_that_reaches_everywhere_changes_no_bit(model, mel, k):
    whole = encode(model, mel)
    with limit_attention(model, k):
        assert torch.equal(encode(model, mel), whole)


def test_limited_attention_weights_are_the_same_computation(model, mel):
    """Without scaled-dot-product attention Whisper gives its attention logits too: those beyond the limit are minus infinity."""
    logits = []
    handle = model.encoder.blocks[0].attn.register_forward_hook(lambda module, inputs, output: logits.append(output[1]))
    try:
        with limit_attention(model, 5):
            fast = encode(model, mel)
            with disable_sdpa():
                slow = encode(model, mel)
    finally:
        handle.remove()
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    assert logits[0] is None
    position = torch.arange(60)
    assert torch.equal(torch.isinf(logits[1][0, 0]), (position[:, None] - position).abs() > 5)


@pytest.mark.parametrize("k", [0, 3, 10])
def test_what_changes_at_one_position_reaches_no_farther_than_k_per_block(model, mel, k):
    def encode_changed():
        handle = model.encoder.conv2.register_forward_hook(lambda module, inputs, output: output + 5.0 * (torch.arange(60) == 30))
        try:
            return encode(model, mel)
        finally:
            handle.remove()

    with limit_attention(model, k):
        moved = (encode_changed() - encode(model, mel)).abs().amax(dim=(0, 2))
    distance = (torch.arange(60) - 30).abs()
    assert moved[distance > 2 * k].max() == 0
    assert moved[distance <= k].max() > 0
    assert k == 0 or moved[(distance > k) & (distance <= 2 * k)].max() > 0


def test_a_limit_is_undone_however_it_is_left(model, mel):
    before = encode(model, mel)
    with limit_attention(model, 3):
        pass
    assert torch.equal(encode(model, mel), before)
    with pytest.raises(KeyError), limit_attention(model, 3):
        raise KeyError
    assert torch.equal(encode(model, mel), before)
    assert not any("qkv_attention" in vars(module) for module in model.modules())


def test_the_smallest_of_nested_limits_holds(model, mel):
    with limit_attention(model, 4):
        four = encode(model, mel)
    with limit_attention(model, 4):
        with limit_attention(model, 20):
            assert torch.equal(encode(model, mel), four)
        with limit_attention(model, 1):
            assert not torch.equal(encode(model, mel), four)
        assert torch.equal(encode(model, mel), four)
    with limit_attention(model, 20), limit_attention(model, 4):
        assert torch.equal(encode(model, mel), four)


def test_a_limit_touches_one_model_and_only_its_encoder(model, mel):
    other, method = copy.deepcopy(model), MultiHeadAttention.qkv_attention
    tokens = torch.tensor([[50257, 50362, 11]])
    whole = encode(model, mel)
    with torch.no_grad():
        logits = model.decoder(tokens, whole[:1])
        with limit_attention(model, 2):
            assert torch.equal(encode(other, mel), whole)
            assert torch.equal(model.decoder(tokens, whole[:1]), logits)
            assert MultiHeadAttention.qkv_attention is method


def test_an_encoder_alone_can_be_limited(tmp_path):
    encoder_only = load_model(str(write_tiny_whisper(tmp_path / "e.pt", encoder_only=True, n_audio_ctx=60)), "cpu").module
    with limit_attention(encoder_only, 1):
        assert all("qkv_attention" in vars(block.attn) for block in encoder_only.encoder.blocks)


def test_a_negative_limit_is_refused(model):
    with pytest.raises(HearsaeError, match="at least 0"), limit_attention(model, -1):
        pass


def test_padding_is_what_the_encoder_makes_of_a_silent_window(model, tmp_path):
    padding = padding_output(model)
    assert padding.shape == (60, 32) and not padding.requires_grad
    large = load_model(str(write_tiny_whisper(tmp_path / "large.pt", n_mels=128, n_audio_ctx=60)), "cpu").module
    assert padding_output(large).shape == (60, 32)


def test_chop_replaces_exactly_its_frames(model, mel):
    encoded, padding = encode(model, mel), padding_output(model)
    kept = encoded.clone()
    chopped = chop(encoded, 10, 20, padding)
    for frame in range(60):
        assert torch.equal(chopped[:, frame], padding[frame].expand(2, -1) if 10 <= frame < 20 else encoded[:, frame])
    assert torch.equal(encoded, kept)
    assert torch.equal(chop(encoded, 10, 10, padding), encoded)
    assert torch.equal(chop(encoded[0], 0, 60, padding), padding)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 61), (6, 5)])
def test_chop_refuses_frames_that_are_not_there(model, mel, start, stop):
    with pytest.raises(HearsaeError, match="0:60"):
        chop(encode(model, mel), start, stop, padding_output(model))


def test_a_word_touches_these_frames():
    assert word_frames(0.2, 0.3) == (10, 15)  # 0.3 / 0.02 is 14.999999999999998
    assert word_frames(0.14, 0.58) == (7, 29)  # 0.14 / 0.02 is 7.000000000000001, 0.58 / 0.02 is 28.999999999999996
    assert word_frames(0.199, 0.301) == (9, 16)
    assert word_frames(0.2, 0.3, margin=2) == (8, 17)
    assert word_frames(0.01, 29.99, margin=3) == (0, 1500)


def test_transcripts_of_encoder_outputs_are_those_of_whisper(model, mel):
    options = whisper.DecodingOptions(without_timestamps=True, fp16=False, language="en")
    expected = [result.text for result in model.decode(mel, options)]
    encoded = encode(model, mel)
    assert transcribe_encoded(model, encoded) == transcribe_encoded(model, list(encoded), batch=1) == expected


def test_next_tokens_are_the_best_of_the_decoder_on_padding(model):
    best = next_tokens(model, " traffic", n=5)
    with torch.no_grad():
        ids = torch.tensor([[50257, 50362, 4979]])  # start of transcript, no timestamps, " traffic"
        logits = model.decoder(ids, padding_output(model)[None])[0, -1]
    order = logits.argsort(descending=True)[:5]
    assert [token.token for token in best] == order.tolist()
    torch.testing.assert_close(torch.tensor([token.logit for token in best]), logits[order])
    torch.testing.assert_close(torch.tensor([token.probability for token in best]), logits.softmax(-1)[order])
    assert next_tokens(model, " traffic", n=5, padding=padding_output(model)) == best


def test_a_multilingual_model_is_told_that_it_hears_english(tmp_path):
    model = load_model(str(write_tiny_whisper(tmp_path / "m.pt", n_vocab=51865, n_audio_ctx=60)), "cpu").module
    best = next_tokens(model, " traffic", n=1)
    word = get_tokenizer(True).encode(" traffic")
    with torch.no_grad():  # after <|startoftranscript|><|en|><|transcribe|><|notimestamps|>
        logits = model.decoder(torch.tensor([[50258, 50259, 50359, 50363, *word]]), padding_output(model)[None])[0, -1]
    assert best[0].token == int(logits.argmax())
