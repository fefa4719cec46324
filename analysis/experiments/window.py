"""How far encoder positions must see: transcripts and error rates when each attends to at most k frames on either side."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from analysis.experiments.errors import text_errors
from analysis.experiments.report import Report
from analysis.experiments.speech import Clip, Mapper, Speech, encode, in_this_process, whole_model
from analysis.interventions import limit_attention, tokenizer_for, transcribe_encoded
from analysis.pictures import new_figure
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS

WINDOWS = (1500, 100, 75, 50, 20, 10)
"""Frames on either side, as in the post. 1500 reaches everywhere: the model as it is."""


def window(
    speech: Speech,
    model: str,
    ks: Sequence[int] = WINDOWS,
    blocks: Sequence[int] | None = None,
    by_block: bool = False,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Transcribes all clips with each window and scores them against the clips' texts.

    blocks: those whose attention is limited; None is all. by_block: besides, each of them alone. language: that Whisper is told it hears.
    The control is each clip's transcript held against the text of the next clip: what error rates mean that nothing was understood.
    Raises HearsaeError for a model without a decoder, a negative k, a block that is not there and clips without text.
    """
    if not ks or min(ks) < 0:
        raise HearsaeError("--k: give one window or more, each of at least 0 frames")
    loaded = whole_model(model, device, "transcribing")
    tokenizer_for(loaded.module, language)
    limited = sorted(set(range(loaded.dims.n_audio_layer) if blocks is None else blocks))
    with limit_attention(loaded.module, min(ks), limited):  # refuses blocks that are not there before there is work to lose
        texts = speech.texts()
    variants: list[tuple[int, tuple[int, ...]]] = [(k, tuple(limited)) for k in dict.fromkeys(ks)]
    variants += [(k, (block,)) for k in dict.fromkeys(ks) for block in limited if by_block and len(limited) > 1]
    heard = [text for piece in map_pieces(partial(_transcribe, speech, model, device, language, variants), speech.pieces()) for text in piece]

    rows: list[dict[str, Any]] = []
    scores: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    for number, (k, of_blocks) in enumerate(variants):
        after = [text[number] for text in heard]
        scores[k, of_blocks] = text_errors(texts, after, language).to_json()
        for clip, before, now in zip(speech.clips, (text[-1] for text in heard), after, strict=True):
            names = {"clip": clip.clip, "source": clip.source, "start_s": clip.start_s, "k": k, "blocks": list(of_blocks)}
            rows.append({**names, "text": clip.text, "before": before, "after": now, "wer": text_errors([clip.text or ""], [now], language).wer})
    unlimited = [text[-1] for text in heard]
    control = text_errors([*texts[1:], texts[0]], unlimited, language).to_json() if len(texts) > 1 else None
    summary = {
        "by_k": {str(k): scores[k, tuple(limited)] for k in dict.fromkeys(ks)},
        "by_block": {str(k): {str(b[0]): s for (one, b), s in scores.items() if one == k and len(b) == 1} for k in ks} if by_block else {},
        "unlimited": text_errors(texts, unlimited, language).to_json(),
        "control": control,
        "clips": len(texts),
        "blocks": limited,
    }
    return Report(
        title="Attention window",
        what="Every position of the encoder attends to itself and to at most k frames (20 ms each) on either side, in "
        + (f"the blocks {', '.join(map(str, limited))}" if blocks is not None else "every block")
        + ". Word and character error rates are those of Whisper's greedy transcripts against the texts of the dataset. Over n blocks information "
        "can still travel n times k frames. The control holds each transcript of the unchanged model against another clip's text: that is what an "
        "error rate looks like when nothing was understood.",
        rows=rows,
        summary=summary,
        figures={"window": _curve(summary)},
        captions={"window": "Error rates against the window. Grey: the control, and the unchanged model."},
        tables={"Error rates by window": _table(summary), "Examples": _examples(rows, tuple(limited))},
        lines=_lines(summary),
    )


def _transcribe(
    speech: Speech, name: str, device: str, language: str, variants: Sequence[tuple[int, tuple[int, ...]]], clips: Sequence[Clip]
) -> list[list[str]]:
    """For each clip its texts with each window, and last the unchanged model's."""
    model = whole_model(name, device)
    texts = []
    for k, blocks in variants:
        with limit_attention(model.module, k, blocks):
            texts.append(transcribe_encoded(model.module, encode(model, speech, clips), language=language))
    texts.append(transcribe_encoded(model.module, encode(model, speech, clips), language=language))
    return [list(of_clip) for of_clip in zip(*texts, strict=True)]


def _table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"k": k, "seconds_each_side": int(k) * FRAME_SECONDS, "WER": one["wer"], "CER": one["cer"], "substitutions": one["substitutions"],
         "deletions": one["deletions"], "insertions": one["insertions"]}
        for k, one in summary["by_k"].items()
    ]  # fmt: skip
    for k, of_block in summary["by_block"].items():
        for row in rows:
            if row["k"] == k:
                row |= {f"WER, block {block} alone": one["wer"] for block, one in of_block.items()}
    return rows


def _examples(rows: Sequence[dict[str, Any]], blocks: tuple[int, ...]) -> list[dict[str, Any]]:
    """What the first clips become as the window narrows."""
    of_all = [row for row in rows if tuple(row["blocks"]) == blocks]
    first = list(dict.fromkeys(row["clip"] for row in of_all))[:4]
    kept = sorted((row for row in of_all if row["clip"] in first), key=lambda row: (row["clip"], -row["k"]))
    return [{"clip": row["clip"], "k": row["k"], "text": row["text"], "transcript": row["after"]} for row in kept]


def _curve(summary: dict[str, Any]) -> Any:
    figure = new_figure()
    axes = figure.subplots()
    ks = sorted(map(int, summary["by_k"]))
    at = range(len(ks))  # evenly: from 0 to 1500 no scale shows them all
    for name, colour, marker in (("wer", "#0072B2", "o"), ("cer", "#D55E00", "s")):
        axes.plot(at, [summary["by_k"][str(k)][name] for k in ks], color=colour, marker=marker, label=f"{name.upper()}, all blocks")
    alone = {block for of_block in summary["by_block"].values() for block in of_block}
    for block, style in zip(sorted(alone), ("--", ":", "-.", (0, (1, 3)), (0, (5, 5)), (0, (3, 1, 1, 1))) * len(alone), strict=False):
        axes.plot(at, [summary["by_block"][str(k)][block]["wer"] for k in ks], color="0.35", linestyle=style, label=f"WER, block {block} alone")
    axes.axhline(summary["unlimited"]["wer"], color="0.7", linewidth=1, label="WER, unchanged")
    if summary["control"]:
        axes.axhline(summary["control"]["wer"], color="0.7", linewidth=1, linestyle="--", label="WER, another clip's text")
    axes.set_xticks(at, [str(k) for k in ks])
    axes.set(xlabel="k: frames of 20 ms that a position sees on either side", ylabel="error rate", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = [f"{summary['clips']} clips, unchanged: WER {summary['unlimited']['wer']:.1%}, CER {summary['unlimited']['cer']:.1%}"]
    lines += [f"  k = {k:>4} ({int(k) * FRAME_SECONDS:5.2f} s): WER {one['wer']:.1%}, CER {one['cer']:.1%}" for k, one in summary["by_k"].items()]
    for k, of_block in summary["by_block"].items():
        lines.append(f"  k = {k:>4}, one block alone: " + ", ".join(f"{block}: {one['wer']:.1%}" for block, one in of_block.items()))
    if summary["control"]:
        lines.append(f"  control, another clip's text: WER {summary['control']['wer']:.1%}")
    return lines
