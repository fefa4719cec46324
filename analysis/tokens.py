"""The tokens of a store's clips: their text, their place in the clip's transcript and, where the store's dataset knows it, their time.

`hearsae transcribe` makes datasets that know it: the column `token_times` of clips.parquet. Its times count where its tokens are those of the
clip: another tokenizer or another text has others.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from cache.store import ActivationStore

CLIPS_AT_ONCE = 1024
"""Whose tokens are in memory together."""


class Token(NamedTuple):
    """One position of the decoder's input."""

    id: int
    token: str
    """Its text; a piece of a character is U+FFFD."""
    token_start: int | None
    """First character in the clip's text, without the space before a word; None for a token of the start sequence, and where the text is not
    that of the tokens."""
    token_end: int | None
    start_s: float | None
    """When it is said, within the clip's source; None where that is not known."""
    end_s: float | None


def tokens_of(store: ActivationStore, clips: Sequence[int]) -> Iterator[tuple[int, list[Token]]]:
    """Each clip with its decoder's input, token by token; nothing for a clip without text."""
    columns = ["tokens", "text"]
    if "token_times" in store.clips.column_names and _is_times(store.clips.schema.field("token_times").type):
        columns.append("token_times")
    spelling = _Spelling(int(store.header.model["dims"].get("n_vocab", 0)))
    for first in range(0, len(clips), CLIPS_AT_ONCE):
        some = clips[first : first + CLIPS_AT_ONCE]
        rows = store.clips.select(columns).take(pa.array(some, pa.int64())).to_pylist()
        for clip, row in zip(some, rows, strict=True):
            yield clip, _tokens(spelling, row["tokens"] or [], row["text"] or "", row.get("token_times") or [])


def marked(text: str | None, start: int | None, end: int | None, context: int) -> str | None:
    """A text around its characters start:end, these in brackets, with so many before and after; the text as it is where they are None."""
    if text is None or start is None or end is None:
        return text
    return f"{'...' * (start > context)}{text[max(0, start - context) : start]}[{text[start:end]}]{text[end : end + context]}"


def _is_times(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_list(kind) else None
    return inner is not None and pa.types.is_struct(inner) and {"start_s", "end_s", "id"} <= {inner.field(i).name for i in range(inner.num_fields)}


class _Spelling:
    """The bytes of every token of a Whisper."""

    def __init__(self, n_vocab: int) -> None:
        from whisper.tokenizer import get_tokenizer

        is_multilingual = n_vocab >= 51865
        known = max(0, n_vocab - 51765 - int(is_multilingual))
        self.encoding = get_tokenizer(is_multilingual, num_languages=known).encoding
        self.known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        if token not in self.known:
            self.known[token] = self.encoding.decode_single_token_bytes(token) if 0 <= token < self.encoding.n_vocab else b""
        return self.known[token]

    def is_text(self, token: int) -> bool:
        return token < self.encoding.eot_token


def _tokens(spelling: _Spelling, ids: list[int], text: str, times: list[dict[str, Any]]) -> list[Token]:
    spelled = [spelling.of(token) for token in ids]
    written = [i for i, token in enumerate(ids) if spelling.is_text(token)]
    places = dict(zip(written, _places(text, [spelled[i] for i in written]), strict=False))
    fits = [one["id"] for one in times] == [ids[i] for i in written]
    when = {i: (one["start_s"], one["end_s"]) for i, one in zip(written, times, strict=True)} if fits else {}
    found = []
    for i, (token, part) in enumerate(zip(ids, spelled, strict=True)):
        (first, last), (start_s, end_s) = places.get(i, (None, None)), when.get(i, (None, None))
        found.append(Token(token, part.decode(errors="replace"), first, last, start_s, end_s))
    return found


def _places(text: str, parts: list[bytes]) -> list[tuple[int, int]]:
    """First and last + 1 character of each token, without the space before a word; nothing where the tokens spell another text."""
    said = (" " + text.strip()).encode()  # as `LoadedModel.decoder_input` gives it to the tokenizer
    if not said.startswith(b"".join(parts)):
        return []
    before = len(text) - len(text.lstrip()) - 1  # characters of the text before what was given, less the space that it got
    places, stop = [], 0
    for part in parts:
        start, stop = stop, stop + len(part)
        if part.startswith(b" ") and len(part) > 1:
            start += 1
        first = _characters(said[: start + 1]) - 1  # the character that byte `start` is of
        places.append((max(0, first + before), max(0, _characters(said[:stop]) + before)))
    return places


def _characters(part: bytes) -> int:
    """Characters that begin in it."""
    return sum(byte & 0xC0 != 0x80 for byte in part)
