"""Whisper's own transcripts of a dataset, with the time of every token and word, as a manifest that `hearsae cache` takes as its dataset.

Times are those of openai-whisper's `whisper.timing`: dynamic time warping over the cross-attention of the alignment heads. `docs/transcribe.md`
describes the manifest.
"""

import base64
import gzip
import io
import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import whisper
from torch import Tensor, nn
from whisper.model import disable_sdpa
from whisper.timing import WordTiming, dtw, median_filter, merge_punctuations
from whisper.tokenizer import Tokenizer

from analysis.experiments.errors import TextErrors, text_errors
from analysis.experiments.speech import Clip, Mapper, Speech, in_this_process, whole_model
from cache import micro
from cache.audio import LANGUAGE_COLUMNS, SPEAKER_COLUMNS, TEXT_COLUMNS
from cache.errors import HearsaeError, SourceError
from cache.header import FRAME_SECONDS, SAMPLE_RATE
from cache.location import Location, location, put
from cache.model import LoadedModel, fast_matmul, log_mel, name_of_checkpoint
from cache.plan import RESERVED

MICRO_HEADS = ((1, 0),)
"""The head that micro was trained to align words with (docs/micro.md)."""
MEDIAN_FRAMES = 7
"""Width of the median filter over attention weights, as in `whisper.timing.find_alignment`."""
BEFORE_A_WORD, AFTER_A_WORD = "\"'“¿([{-", "\"'.。,，!！?？:：”)]}、"
"""Punctuation that belongs to the word after it, or before it, as in `whisper.timing.add_word_timestamps`."""
TIME_DECIMALS = 4
"""Of seconds: times are whole frames from the clip's start, which need not be whole frames."""
OF_MANIFEST = {"audio", "offset", "duration", "text", "language", "speaker", "reference", "words", "token_times", "avg_logprob", "no_speech_prob"}
"""Keys of a line; the dataset's other columns follow them."""


class Timed(NamedTuple):
    """A token or word of a transcript."""

    start_s: float
    """Within the clip."""
    end_s: float
    what: int | str
    """A token's number, a word's letters with the punctuation around it."""


class Heard(NamedTuple):
    """What Whisper made of one clip."""

    clip: int
    text: str
    language: str
    tokens: list[Timed]
    """Of the text as the tokenizer spells it, which is what a store's decoder is given: one for each token after the start sequence."""
    words: list[Timed]
    avg_logprob: float
    no_speech_prob: float
    respelled: bool
    """Whisper wrote the text in other tokens than the tokenizer would."""
    audio: str | None
    """File that the clip's sound was written to, where the dataset has none; relative to the manifest."""


class Failure(NamedTuple):
    """A clip that could not be read."""

    clip: int
    reason: str


def transcribe(
    speech: Speech,
    model: str,
    out: Location,
    *,
    language: str | None = None,
    device: str = "auto",
    again: bool = False,
    map_pieces: Mapper = in_this_process,
) -> dict[str, Any]:
    """Transcribes every clip and writes the manifest `out`, all of it or nothing.

    language: of all clips; None takes that of the dataset, else what Whisper hears. An English-only model knows one.
    again: replace a manifest that is there.
    Returns `rows` (`clip, source, start_s, before, after`: the clip's text in the dataset, and Whisper's), `summary`, `out`. Clips that can't be
    read are left out and counted. Raises HearsaeError for a model without a decoder, and where `out` can't or must not be written.
    """
    _refuse_place(out, speech, again)
    loaded = whole_model(model, device, "transcribing")
    if language is not None and not loaded.is_multilingual and _code(language) != "en":
        raise HearsaeError(f"{model} knows English alone: leave --language {language} out, or give a multilingual model")
    loaded.tokenizer(language)  # refuses a language that Whisper does not know
    window_s = loaded.dims.n_audio_ctx * FRAME_SECONDS
    if speech.clip_seconds > window_s:
        speech = Speech(speech.dataset, speech.split, speech.limit, speech.subset, window_s)
    pieces = speech.pieces()
    found = [one for piece in map_pieces(partial(_transcribe, speech, model, device, language, out), pieces) for one in piece]
    heard = [one for one in found if isinstance(one, Heard)]
    failures = [one for one in found if isinstance(one, Failure)]
    if not heard:
        raise HearsaeError(f"no clip of {speech.dataset} could be read ({failures[0].reason})")
    put(out, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in manifest_lines(speech, heard)).encode())
    rows = [
        {"clip": one.clip, "source": clip.source, "start_s": clip.start_s, "before": clip.text, "after": one.text}
        for one in heard
        for clip in [speech.clips[one.clip]]
    ]
    return {"rows": rows, "summary": _summary(speech, heard, failures), "out": str(out)}


def _refuse_place(out: Location, speech: Speech, again: bool) -> None:
    if out.suffix != ".jsonl":
        raise HearsaeError(f"--out {out}: give the manifest a name that ends in .jsonl")
    if out.exists() and not again:
        raise HearsaeError(f"{out} is there already: give --again to replace it, or another --out")
    if speech.dataset == str(out) or location(speech.dataset).absolute() == out.absolute():
        raise HearsaeError(f"--out {out} is the dataset itself: give another name")


def _code(language: str) -> str:
    """A language's code as Whisper has it: `en` of `en`, `English` and `en-GB`."""
    spelled = language.lower()
    return whisper.tokenizer.TO_LANGUAGE_CODE.get(spelled, spelled.replace("_", "-").split("-")[0])


def _summary(speech: Speech, heard: Sequence[Heard], failures: Sequence[Failure]) -> dict[str, Any]:
    errors = TextErrors(0, 0, 0, 0, 0, 0)
    compared = [one for one in heard if speech.clips[one.clip].text]
    for language, of_it in groupby(sorted(compared, key=lambda one: one.language), key=lambda one: one.language):
        same = list(of_it)
        errors += text_errors([speech.clips[one.clip].text or "" for one in same], [one.text for one in same], language)
    first = speech.plan.skipped.to_pylist()
    named = [f"{speech.clips[one.clip].source} (row {speech.clips[one.clip].source_row}): {one.reason}" for one in failures]
    return {
        "clips": len(heard),
        "skipped": len(failures) + len(first),
        "skipped_reasons": [*named, *(f"{row['source']} (row {row['source_row']}): {row['reason']}" for row in first)],
        "compared": len(compared),
        **errors.to_json(),
        "tokens": sum(len(one.tokens) for one in heard),
        "respelled": sum(one.respelled for one in heard),
        "empty": sum(not one.text for one in heard),
        "audio_written": sum(one.audio is not None for one in heard),
        "audio_seconds": sum(speech.clips[one.clip].duration_s for one in heard),
    }


# The manifest


def manifest_lines(speech: Speech, heard: Sequence[Heard]) -> list[dict[str, Any]]:
    """A line of the manifest for each clip: `docs/transcribe.md`."""
    left_out = {*RESERVED, *OF_MANIFEST, *TEXT_COLUMNS, *SPEAKER_COLUMNS, *LANGUAGE_COLUMNS}  # Whisper's text must be the only one
    others = [name for name in speech.table.column_names if name not in left_out]
    rows = speech.table.select(["clip", *others]).take([one.clip for one in heard]).to_pylist()
    return [_line(speech, one, {name: row[name] for name in others}) for one, row in zip(heard, rows, strict=True)]


def _line(speech: Speech, one: Heard, more: dict[str, Any]) -> dict[str, Any]:
    """One line; what is not known has no key."""
    clip = speech.clips[one.clip]
    audio = one.audio or str(_absolute(speech.source.file(clip.source, clip.source_row)))
    start_s = 0.0 if one.audio else clip.start_s

    def times(of: list[Timed], name: str) -> list[dict[str, Any]]:
        return [
            {"start_s": round(start_s + begin, TIME_DECIMALS), "end_s": round(start_s + end, TIME_DECIMALS), name: what} for begin, end, what in of
        ]

    line = {
        "audio": audio,
        "offset": start_s,
        "duration": clip.duration_s,
        "text": one.text or None,
        "language": one.language,
        "speaker": clip.speaker,
        "reference": clip.text,
        "words": times(one.words, "word"),
        "token_times": times(one.tokens, "id"),
        "avg_logprob": one.avg_logprob if math.isfinite(one.avg_logprob) else None,
        "no_speech_prob": one.no_speech_prob if math.isfinite(one.no_speech_prob) else None,
    }
    return {name: value for name, value in (line | more).items() if value is not None}


def _absolute(file: Location | None) -> Location:
    assert file is not None  # `_transcribe` wrote the sound of what has no file
    return file.absolute()


def _write_audio(out: Location, clip: Clip, samples: np.ndarray) -> str:
    """Writes a clip's sound beside the manifest, and returns the path from there. FLAC of 24 bits: exact for every source of 24 bits or less."""
    data = io.BytesIO()
    full_scale = 2**23
    whole = np.clip(np.rint(samples.astype(np.float64) * full_scale), -full_scale, full_scale - 1).astype(np.int32)
    soundfile.write(data, whole << 8, SAMPLE_RATE, format="FLAC", subtype="PCM_24")  # libsndfile takes the upper 24 of 32 bits
    name = f"{out.stem}-audio/{clip.clip:06d}.flac"
    put(out.parent / name, data.getvalue())
    return name


# One piece of the speech


def _transcribe(speech: Speech, name: str, device: str, language: str | None, out: Location, clips: Sequence[Clip]) -> list[Heard | Failure]:
    model = whole_model(name, device)
    heads = alignment_heads(model)
    found: list[Heard | Failure] = []
    encoded: dict[Clip, Tensor] = {}
    written: dict[Clip, str] = {}
    for clip in clips:
        try:
            samples = speech.read(clip)
        except SourceError as error:
            found.append(Failure(clip.clip, str(error)))
            continue
        if speech.source.file(clip.source, clip.source_row) is None:
            written[clip] = _write_audio(out, clip, samples)
        with torch.no_grad(), fast_matmul():
            encoded[clip] = model.module.get_submodule("encoder")(log_mel(samples, model)[None])[0]
    for spoken, of_it in groupby(sorted(encoded, key=partial(_spoken, model, language)), key=partial(_spoken, model, language)):
        same = list(of_it)
        options = whisper.DecodingOptions(language=spoken or None, without_timestamps=True, fp16=False)
        results = model.module.decode(torch.stack([encoded[clip] for clip in same]), options)  # type: ignore[operator]
        for clip, result in zip(same, results, strict=True):
            found.append(_timed(model, heads, clip, encoded[clip], result, written.get(clip)))
    return sorted(found, key=lambda one: one.clip)


def _spoken(model: LoadedModel, language: str | None, clip: Clip) -> str:
    """The language to decode a clip in; empty where Whisper is to find it."""
    if not model.is_multilingual:
        return "en"
    named = language or clip.language
    return (model.tokenizer(named).language or "") if named else ""


def _timed(
    model: LoadedModel, heads: Sequence[tuple[int, int]], clip: Clip, encoded: Tensor, result: whisper.DecodingResult, audio: str | None
) -> Heard:
    tokenizer = model.tokenizer(result.language)
    ids = model.decoder_input(result.text, result.language) if result.text else []
    bounds = token_bounds(model, heads, encoded, ids, tokenizer, clip.n_frames).tolist() if ids else []
    written = ids[len(tokenizer.sot_sequence_including_notimestamps) :]
    tokens = [Timed(start, end, token) for start, end, token in zip(bounds, bounds[1:], written, strict=False)]
    words = words_of(tokens, tokenizer)
    respelled = written != result.tokens
    return Heard(clip.clip, result.text, result.language, tokens, words, result.avg_logprob, result.no_speech_prob, respelled, audio)


# Times


def alignment_heads(model: LoadedModel) -> list[tuple[int, int]]:
    """(block, head) of the decoder whose cross-attention follows the sound.

    Those that openai-whisper lists for its checkpoints, known by their SHA-256; micro's own; of any other model all heads of the upper half of the
    blocks, as openai-whisper does.
    """
    name = name_of_checkpoint(model.sha256)
    if name == micro.NAME:
        return list(MICRO_HEADS)
    n_blocks, n_heads = model.dims.n_text_layer, model.dims.n_text_head
    if name in whisper._ALIGNMENT_HEADS:
        mask = np.frombuffer(gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[name])), bool).reshape(n_blocks, n_heads)
        return [(int(block), int(head)) for block, head in np.argwhere(mask)]
    return [(block, head) for block in range(n_blocks // 2, n_blocks) for head in range(n_heads)]


@torch.no_grad()
def token_bounds(
    model: LoadedModel, heads: Sequence[tuple[int, int]], encoded: Tensor, ids: Sequence[int], tokenizer: Tokenizer, n_frames: int
) -> np.ndarray:
    """When each token of a transcript begins, and when the last one ends: float64 [text tokens + 1], seconds from the clip's start.

    `whisper.timing.find_alignment`, token by token, of a clip that is encoded already.
    encoded: fp32 [n_audio_ctx, d]. ids: of `LoadedModel.decoder_input`. n_frames: of the clip; what follows is padding, where nothing is said.
    """
    module, weights = model.module, dict[int, Tensor]()

    def keep(block: int) -> Any:
        def hook(attention: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
            weights[block] = output[1][0]

        return hook

    hooks = [module.get_submodule(f"decoder.blocks.{block}.cross_attn").register_forward_hook(keep(block)) for block in {block for block, _ in heads}]
    try:
        with disable_sdpa():  # which else keeps the weights to itself
            whole = [*ids, tokenizer.eot][: model.dims.n_text_ctx]
            module.get_submodule("decoder")(torch.tensor([whole], device=model.device), encoded[None])
    finally:
        for handle in hooks:
            handle.remove()
    attention = torch.stack([weights[block][head] for block, head in heads])[:, :, :n_frames].softmax(dim=-1)
    std, mean = torch.std_mean(attention, dim=-2, keepdim=True, unbiased=False)
    smooth = median_filter((attention - mean) / std, MEDIAN_FRAMES).mean(dim=0).nan_to_num()  # a single frame has no spread
    # A position attends to the sound of the token that it predicts: the last one of the start sequence to that of the first token.
    first = len(tokenizer.sot_sequence_including_notimestamps) - 1
    row, frame = dtw(-smooth[first : len(ids)])
    return frame[np.diff(row, prepend=-1) > 0] * FRAME_SECONDS


def words_of(tokens: Sequence[Timed], tokenizer: Tokenizer) -> list[Timed]:
    """The words that tokens spell, with the punctuation around them: from the start of a word's first token to the end of its last."""
    spelled, parts = tokenizer.split_to_word_tokens([*(int(token.what) for token in tokens), tokenizer.eot])
    words, at = [], 0
    for word, part in zip(spelled[:-1], parts[:-1], strict=True):
        last = at + len(part) - 1
        words.append(WordTiming(word, part, tokens[at].start_s, tokens[last].end_s, 0.0))
        at = last + 1
    merge_punctuations(words, BEFORE_A_WORD, AFTER_A_WORD)
    return [Timed(word.start, word.end, word.word.strip()) for word in words if word.word.strip()]
