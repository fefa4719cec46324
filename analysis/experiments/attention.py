"""How local the encoder's attention is: its weights by distance, head by head, and relevance propagated through all blocks."""

import re
import resource
import sys
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from whisper.model import AudioEncoder

from analysis.attention import (
    Locality,
    attention_weights,
    block_inputs,
    locality,
    output_gradient,
    relevance,
    transcript_gradient,
    uniform_locality,
)
from analysis.experiments.attention_figures import head_grid, mass_curves, relevance_map, relevance_rows, whole_block
from analysis.experiments.report import Report
from analysis.experiments.speech import PIECE_CLIPS, Clip, Mapper, Speech, clip_mel, encode, in_this_process, whole_model, worker_model
from analysis.interventions import tokenizer_for, transcribe_encoded
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS
from cache.model import LoadedModel, fast_matmul, random_twin

KS = (1, 5, 10, 25, 50, 100, 250)
"""Frames on either side: 20 ms to 5 s."""
TARGETS = ("output", "transcript")
SHOWN_PADDING = 50
"""Frames behind the clip's end that a map shows: a second."""
PLACES = (0.25, 0.5, 0.75)
"""Of the clip: the positions whose own relevance is drawn."""


def attention(
    speech: Speech,
    model: str,
    ks: Sequence[int] = KS,
    target: str = "output",
    maps: int = 2,
    control_seed: int = 0,
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Measures all clips, each in the model's whole window; draws the relevance of the first `maps` of them.

    ks: distances in frames. target: `output`, or `transcript`, which needs a decoder.
    The control is the same model with random weights on the same clips; besides, what uniform attention would give.
    Raises HearsaeError for distances that can't be, another target, and a clip longer than the window.
    """
    ks = sorted(set(ks))
    if not ks or ks[0] < 0:
        raise HearsaeError("--k: give one distance or more, each of at least 0 frames")
    if target not in TARGETS:
        raise HearsaeError(f"--target {target} is none of {', '.join(TARGETS)}")
    if maps < 0:
        raise HearsaeError(f"--maps {maps} must be at least 0")
    loaded = whole_model(model, device, "--target transcript") if target == "transcript" else worker_model(model, device)
    control = random_twin(model, control_seed)
    worker_model(control, device)  # refuses before there is work to lose
    texts: list[str | None] = [None] * len(speech.clips)
    if target == "transcript":
        texts = [text for piece in map_pieces(partial(_transcribe, speech, model, device), speech.pieces()) for text in piece]
    heard = list(zip(speech.clips, texts, strict=True))
    pieces = [heard[first : first + PIECE_CLIPS] for first in range(0, len(heard), PIECE_CLIPS)]
    found = _together(map_pieces(partial(_measure, speech, model, device, ks), pieces))
    drawn = map_pieces(partial(_draw, speech, model, device), heard[:maps])
    of_random = _together(map_pieces(partial(_measure, speech, control, device, ks), pieces))

    summary = {
        "attention": _by_head(found, ks),
        "layers": _by_layer(found, ks),
        "relevance": _numbers(found.relevance, ks),
        "uniform": _numbers(found.uniform, ks),
        "control": {
            "model": control,
            "attention": _by_head(of_random, ks),
            "layers": _by_layer(of_random, ks),
            "relevance": _numbers(of_random.relevance, ks),
        },
        "ks": list(ks),
        "target": target,
        "clips": len(speech.clips),
        "frames": found.uniform.rows,
        "positions": loaded.dims.n_audio_ctx,
        "peak_memory_bytes": max(found.peak_bytes, of_random.peak_bytes),
    }
    shown = min(ks, key=lambda k: abs(k - 10))
    figures: dict[str, Any] = {
        "mass": mass_curves(found.attention, found.relevance, found.uniform, of_random.relevance, ks),
        "heads": head_grid(found.attention, of_random.attention, shown),
    }
    captions = {
        "mass": "Share of weight at most k frames away. Thick: the mean of a block's heads; thin: its heads. Black: relevance through all blocks.",
        "heads": f"Share of weight within {shown} frames, by block and head: the model, and the same with random weights.",
    }
    for clip, one in zip(speech.clips, drawn, strict=False):
        figures |= {f"relevance-{clip.clip}": relevance_map(one.matrix, clip.n_frames), f"rows-{clip.clip}": relevance_rows(one.rows, clip.n_frames)}
        captions[f"relevance-{clip.clip}"] = f"Relevance, clip {clip.clip}, {clip.source}, its text: {clip.text or '(none given)'}"
        captions[f"rows-{clip.clip}"] = f"Clip {clip.clip}: relevance for the output at one position alone (dotted), and its share by time."
    return Report(
        title="Attention",
        what=_what(target),
        rows=found.rows,
        summary=summary,
        figures=figures,
        captions=captions,
        tables={"Blocks": _table(summary), "Heads": _heads_table(summary, shown)},
        lines=_lines(summary),
    )


# Work on clips


class _Measured(NamedTuple):
    rows: list[dict[str, Any]]
    attention: list[list[Locality]]
    """By block and head, over the frames of all clips."""
    relevance: Locality
    uniform: Locality
    peak_bytes: int
    """Of the process that had most."""


class _Drawn(NamedTuple):
    matrix: Tensor
    """[shown, shown]: relevance of positions (columns) for positions (rows)."""
    rows: dict[int, Tensor]
    """Position -> relevance [shown] for the output at this position alone."""


Heard = tuple[Clip, str | None]
"""A clip, and the transcript that relevance is for; None: relevance is for the encoder's output."""


def _transcribe(speech: Speech, name: str, device: str, clips: Sequence[Clip]) -> list[str]:
    model = whole_model(name, device)
    return [text for clip in clips for text in transcribe_encoded(model.module, encode(model, speech, [clip]), language=_language(clip))]


def _language(clip: Clip) -> str:
    return re.split("[-_]", clip.language or "en")[0]  # datasets name locales too: pt-BR


@torch.no_grad()
def _measure(speech: Speech, name: str, device: str, ks: Sequence[int], piece: Sequence[Heard]) -> _Measured:
    model = worker_model(name, device)
    return _together([_measure_clip(model, speech, clip, text, ks) for clip, text in piece])


def _measure_clip(model: LoadedModel, speech: Speech, clip: Clip, text: str | None, ks: Sequence[int]) -> _Measured:
    encoder: AudioEncoder = model.module.get_submodule("encoder")
    with fast_matmul():
        inputs = block_inputs(encoder, clip_mel(model, speech, clip))
        heads = [[locality(one) for one in attention_weights(block, x, clip.n_frames)] for block, x in zip(encoder.blocks, inputs, strict=False)]
        real = torch.arange(clip.n_frames, device=model.device)
        flow = relevance(encoder, inputs, _gradient(model, inputs[-1], real, clip, text), real)
    # Each row counts as much as another, whatever its sum.
    passed = locality(flow / flow.sum(1, keepdim=True).clamp(min=torch.finfo(flow.dtype).tiny))
    names = {"clip": clip.clip, "source": clip.source, "start_s": clip.start_s, "frames": clip.n_frames, "transcript": text}
    rows = [
        {**names, "of": "attention", "layer": layer, "head": head, **_row(one, ks)}
        for layer, ones in enumerate(heads)
        for head, one in enumerate(ones)
    ]
    rows.append({**names, "of": "relevance", "layer": None, "head": None, **_row(passed, ks)})
    return _Measured(rows, heads, passed, uniform_locality(clip.n_frames, model.dims.n_audio_ctx), _peak_bytes())


@torch.no_grad()
def _draw(speech: Speech, name: str, device: str, heard: Heard) -> _Drawn:
    model, (clip, text) = worker_model(name, device), heard
    encoder: AudioEncoder = model.module.get_submodule("encoder")
    shown = min(clip.n_frames + SHOWN_PADDING, model.dims.n_audio_ctx)
    with fast_matmul():
        inputs = block_inputs(encoder, clip_mel(model, speech, clip))
        real, asked = torch.arange(clip.n_frames, device=model.device), torch.arange(shown, device=model.device)
        matrix = relevance(encoder, inputs, _gradient(model, inputs[-1], real, clip, text), asked)[:, :shown]
        rows = {}
        for position in (round(place * (clip.n_frames - 1)) for place in PLACES):
            one = torch.tensor([position], device=model.device)
            rows[position] = relevance(encoder, inputs, output_gradient(encoder, inputs[-1], one), one)[0, :shown].cpu()
    return _Drawn(matrix.cpu(), rows)


def _gradient(model: LoadedModel, last: Tensor, real: Tensor, clip: Clip, text: str | None) -> Tensor:
    if text is None:
        return output_gradient(model.module.get_submodule("encoder"), last, real)
    whisper: Any = model.module
    special = tokenizer_for(whisper)  # its special tokens are those of every language
    tokens = model.decoder_input(text, _language(clip))
    return transcript_gradient(whisper, last, [*tokens, special.eot], tokens.index(special.no_timestamps) + 1)


def _peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _together(parts: Sequence[_Measured]) -> _Measured:
    return reduce(_joined, parts)


def _joined(a: _Measured, b: _Measured) -> _Measured:
    heads = [[one + other for one, other in zip(*both, strict=True)] for both in zip(a.attention, b.attention, strict=True)]
    return _Measured(a.rows + b.rows, heads, a.relevance + b.relevance, a.uniform + b.uniform, max(a.peak_bytes, b.peak_bytes))


# Numbers


def _numbers(of: Locality, ks: Sequence[int]) -> dict[str, Any]:
    return {
        "within": {str(k): of.within(k) for k in ks},
        "padding": of.padding_share,
        "mean_distance": of.mean_distance,
        "half_width_50": of.half_width(0.5),
        "half_width_90": of.half_width(0.9),
    }


def _row(of: Locality, ks: Sequence[int]) -> dict[str, Any]:
    numbers = _numbers(of, ks)
    return {f"within_{k}": share for k, share in numbers.pop("within").items()} | numbers


def _by_head(found: _Measured, ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    return {str(layer): {str(head): _numbers(one, ks) for head, one in enumerate(ones)} for layer, ones in enumerate(found.attention)}


def _by_layer(found: _Measured, ks: Sequence[int]) -> dict[str, Any]:
    return {str(layer): _numbers(whole_block(ones), ks) for layer, ones in enumerate(found.attention)}


def _table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [(f"block {layer}", one) for layer, one in summary["layers"].items()]
    groups += [("relevance, all blocks", summary["relevance"]), ("uniform attention", summary["uniform"])]
    groups += [(f"random weights, block {layer}", one) for layer, one in summary["control"]["layers"].items()]
    groups.append(("random weights, relevance", summary["control"]["relevance"]))
    return [
        {"of": name, **{f"within {k}": one["within"][str(k)] for k in summary["ks"]}, "on padding": one["padding"],
         "mean distance": one["mean_distance"], "half width, 50 %": one["half_width_50"], "half width, 90 %": one["half_width_90"]}
        for name, one in groups
    ]  # fmt: skip


def _heads_table(summary: dict[str, Any], k: int) -> list[dict[str, Any]]:
    """The most local heads first."""
    heads = [(layer, head, one) for layer, ones in summary["attention"].items() for head, one in ones.items()]
    heads.sort(key=lambda of: -of[2]["within"][str(k)])
    return [
        {"block": int(layer), "head": int(head), f"within {k}": one["within"][str(k)], "on padding": one["padding"],
         "mean distance": one["mean_distance"], "half width, 50 %": one["half_width_50"], "half width, 90 %": one["half_width_90"],
         f"random weights, within {k}": summary["control"]["attention"][layer][head]["within"][str(k)]}
        for layer, head, one in heads
    ]  # fmt: skip


# Words


def _what(target: str) -> str:
    aim = (
        "the encoder's output at the clip's own frames: the sum of the logarithms of their lengths, the last layer norm's deviation held fixed"
        if target == "output"
        else "the log-probability that the decoder gives to the transcript that Whisper itself writes of the clip"
    )
    return (
        "Where the encoder looks. Each clip is heard in Whisper's whole window, padded with silence, and only the clip's own frames (20 ms each) "
        "are asked where their attention goes: the share of weight within k frames on either side, and the share that falls on the padding. Numbers "
        "are means over all frames of all clips. A half width is the smallest distance that holds half, or 90 %, of all weight.\n\n"
        "Attention is one block's; what a position receives it may pass on in the next. Relevance (Chefer, Gur and Wolf, 2021) follows that "
        "through all blocks: a weight counts by how much it adds to an objective, which is the gradient times the weight where that is above zero. "
        f"The objective here: {aim}. A row of a map says where what ended at that position came from; what stays in place without any attention is "
        "left out.\n\n"
        "Two things to hold it against: attention that is the same everywhere, and the same model with random weights."
    )


def _lines(summary: dict[str, Any]) -> list[str]:
    k = min(summary["ks"], key=lambda k: abs(k - 10))

    def say(name: str, one: dict[str, Any]) -> str:
        return (
            f"  {name}: {one['within'][str(k)]:6.1%} within {k} frames ({k * FRAME_SECONDS:.2f} s), half of it within {one['half_width_50']}, "
            f"{one['padding']:.1%} on padding"
        )

    lines = [f"{summary['clips']} clips, {summary['frames']} frames; attention of {summary['positions']} positions"]
    lines += [say(f"block {layer:>2}          ", one) for layer, one in summary["layers"].items()]
    lines.append(say("relevance         ", summary["relevance"]))
    lines.append(say("uniform attention ", summary["uniform"]))
    lines += [say(f"control, block {layer:>2} ", one) for layer, one in summary["control"]["layers"].items()]
    lines.append(say("control, relevance", summary["control"]["relevance"]))
    return [*lines, f"peak memory of a process: {summary['peak_memory_bytes'] / 1e9:.2f} GB"]
