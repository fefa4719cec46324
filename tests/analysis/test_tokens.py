"""Tokens of clips: text, place and time, whatever the transcript is made of."""

import pytest
from conftest import fill_store
from whisper.tokenizer import get_tokenizer

from analysis.tokens import marked, tokens_of
from cache.plan import SourceItem, make_plan

TEXTS = ["Hot ones.", "  New   York\tis\nbig ", "naïve café, 東京 and 🎵🎶 twice", "<|endoftext|> is text", "e\u0301 combining", "x"]
START = 2
"""Tokens of the English start sequence."""


def store_of(path, texts, times=None, cut=None):
    tokenizer = get_tokenizer(False)

    def tokenize(text, language):
        return [*tokenizer.sot_sequence_including_notimestamps, *tokenizer.encode(" " + text.strip(), disallowed_special=())][:cut]

    items = [SourceItem(f"s{i}.wav", 0, 16000, text=text, extra=times[i] if times else {}) for i, text in enumerate(texts)]
    plan = make_plan(items, shard_rows=4096, tokenize=tokenize, shuffle=False)
    return fill_store(path, plan, {"decoder.blocks.0": 2}, lambda site, clip, n: [[0, 0]] * n)


@pytest.mark.parametrize("cut", [None, 5])
def test_tokens_lie_one_after_the_other_in_the_text(tmp_path, cut):
    store = store_of(tmp_path / "acts.zarr", TEXTS, cut=cut)
    for clip, tokens in tokens_of(store, range(len(TEXTS))):
        text = TEXTS[clip]
        assert [token.token for token in tokens[:START]] == ["<|startoftranscript|>", "<|notimestamps|>"]
        assert all(token.token_start is token.token_end is token.start_s is token.end_s is None for token in tokens[:START])
        at = len(text) - len(text.lstrip())
        for token in tokens[START:]:
            assert 0 <= at - token.token_start <= 1 or text[at : token.token_start] == " ", token  # a piece of a character begins in it
            if "\ufffd" not in token.token:
                assert text[token.token_start : token.token_end] == (
                    token.token[1:] if token.token[0] == " " and len(token.token) > 1 else token.token
                )
            at = token.token_end
        assert cut or at == len(text.rstrip())


def test_times_count_where_the_tokens_are_the_clips_own(tmp_path):
    ids = get_tokenizer(False).encode(" Hot ones.")
    own = [{"start_s": 1 + i / 2, "end_s": 1.5 + i / 2, "id": token} for i, token in enumerate(ids)]
    other = [*own[:-1], own[-1] | {"id": 0}]
    store = store_of(tmp_path / "acts.zarr", ["Hot ones."] * 4, [{"token_times": times} for times in (own, other, own[:-1], None)])
    found = {clip: [(token.start_s, token.end_s) for token in tokens[START:]] for clip, tokens in tokens_of(store, range(4))}
    assert found[0] == [(1, 1.5), (1.5, 2), (2, 2.5)]
    assert found[1] == found[2] == found[3] == [(None, None)] * 3


@pytest.mark.parametrize("column", ["none", [1, 2, 3], [{"start": 1.0}]])
def test_a_column_of_that_name_that_is_something_else_is_no_time(tmp_path, column):
    store = store_of(tmp_path / "acts.zarr", ["Hot ones."], [{"token_times": column}])
    assert [token.start_s for token in dict(tokens_of(store, [0]))[0]] == [None] * 5


def test_what_is_marked_keeps_its_surroundings():
    assert marked("Stop at the traffic lights", 12, 19, 8) == "... at the [traffic] lights"
    assert marked("Stop", 0, 4, 8) == "[Stop]" and marked("Stop", None, None, 8) == "Stop" and marked(None, None, None, 8) is None
