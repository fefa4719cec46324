"""What a change at one site of a Whisper does to what comes out of it: transcripts, the likelihood of the right text, the encoder's output.

The experiments that share this differ in the change alone: steering, removal of features, a whole site put out, an SAE in its place.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import AudioEncoder, Whisper
from whisper.tokenizer import Tokenizer

from analysis.experiments.changes import Change, Stretch
from analysis.experiments.errors import text_errors
from analysis.experiments.speech import Clip, Mapper, Speech, encode, worker_model
from analysis.experiments.tokens import encode as tokens_of
from analysis.interventions import edit_site, tokenizer_for, transcribe_encoded
from analysis.steering import ChangeRows, at_positions
from cache.model import LoadedModel, fast_matmul


class Drift(NamedTuple):
    """How far rows have moved, summed over them."""

    rows: int = 0
    moved: float = 0.0
    """Sum of ||x' - x||^2."""
    size: float = 0.0
    """Sum of ||x||^2."""
    cosines: float = 0.0
    """Sum of cos(x', x)."""

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> "Drift":
        """Rows [rows, d]."""
        moved, size = (float(torch.linalg.vecdot(x, x).sum(dtype=torch.float64)) for x in (after.float() - before.float(), before.float()))
        return cls(len(before), moved, size, float(F.cosine_similarity(before.double(), after.double(), dim=1).sum()))

    def __add__(self, other: "Drift") -> "Drift":  # type: ignore[override]
        return Drift(self.rows + other.rows, self.moved + other.moved, self.size + other.size, self.cosines + other.cosines)

    def to_json(self) -> dict[str, Any] | None:
        """`relative`: root of the summed squares, ||x' - x|| over ||x||; `cosine`: mean. None of no rows."""
        if not self.rows:
            return None
        return {"rows": self.rows, "relative": (self.moved / self.size) ** 0.5 if self.size else None, "cosine": self.cosines / self.rows}


class Outcome(NamedTuple):
    """What comes out for one clip."""

    text: str | None
    """Whisper's greedy transcript; None where nothing was transcribed."""
    loss: float | None
    """Of the clip's own text, teacher-forced: minus the log-likelihood in nats, summed over its tokens. None without text or decoder."""
    tokens: int
    """That the loss is summed over."""
    site: Drift
    """Of the rows where the change holds; empty for a site of the decoder."""
    inside: Drift
    """Of the encoder's output at the frames where the change holds."""
    outside: Drift
    """At all other frames of the window."""


NO_DRIFT = Drift()


def measure(
    speech: Speech,
    name: str,
    device: str,
    changes: Sequence[Change],
    stretch: Stretch,
    language: str,
    transcribe: bool,
    clips: Sequence[Clip],
) -> list[list[Outcome]]:
    """For each clip the outcome of the unchanged model, and then of each change. The work on one piece of the speech.

    A change of an encoder site holds where `stretch` says, one of a decoder site at all tokens. Without `transcribe` there are no transcripts,
    only losses; without a decoder neither.
    """
    model = worker_model(name, device)
    tails = {change.site: Tail(model, change.site) for change in changes if change.site.startswith("encoder.")}
    with ExitStack() as stack:
        for tail in tails.values():
            stack.enter_context(tail.remember())
        plain = encode(model, speech, clips)
    columns = [[Outcome(text, *loss, NO_DRIFT, NO_DRIFT, NO_DRIFT) for text, loss in _written(model, plain, clips, language, transcribe)]]
    for change in changes:
        rows = change.open(model)
        if change.site not in tails:
            with edit_site(model.module, change.site, at_positions(rows, None)):
                written = _written(model, plain, clips, language, transcribe)
            columns.append([Outcome(text, *loss, NO_DRIFT, NO_DRIFT, NO_DRIFT) for text, loss in written])
            continue
        encoded, drifts = [], []
        for number, (clip, before) in enumerate(zip(clips, plain, strict=True)):
            span = stretch.frames(clip, len(before))
            watched = Watched(rows)
            after = tails[change.site].encode(number, at_positions(watched, None if span is None else [span]))
            start, stop = span or (0, len(before))
            outside = Drift.of(before[:start], after[:start]) + Drift.of(before[stop:], after[stop:])
            encoded.append(after)
            drifts.append((watched.drift, Drift.of(before[start:stop], after[start:stop]), outside))
        written = _written(model, torch.stack(encoded), clips, language, transcribe)
        columns.append([Outcome(text, *loss, *drift) for (text, loss), drift in zip(written, drifts, strict=True)])
    return [list(of_clip) for of_clip in zip(*columns, strict=True)]


def run_changes(
    speech: Speech,
    name: str,
    device: str,
    changes: Sequence[Change],
    stretch: Stretch,
    language: str,
    transcribe: bool,
    map_pieces: Mapper,
) -> tuple[list[Outcome], list[list[Outcome]]]:
    """`measure` over the whole speech: (of the unchanged model, of each change) the outcomes of all clips."""
    found = map_pieces(partial(measure, speech, name, device, changes, stretch, language, transcribe), speech.pieces())
    of_clips = [of_clip for piece in found for of_clip in piece]
    unchanged, *columns = ([of_clip[number] for of_clip in of_clips] for number in range(len(changes) + 1))
    return unchanged, columns


class Watched:
    """A change of rows, and how far it has moved them."""

    def __init__(self, change: ChangeRows) -> None:
        self.change, self.drift = change, NO_DRIFT

    def __call__(self, rows: Tensor) -> Tensor:
        changed = self.change(rows)
        self.drift += Drift.of(rows, changed)
        return changed


class Tail:
    """The encoder from the block of a site on: what a change at the site can't reach is computed once for all changes.

    Its plain twin is the whole encoder under `edit_site`; the result is the same to the bit.
    """

    def __init__(self, model: LoadedModel, site: str) -> None:
        self.model, self.site = model, site
        encoder = model.module.get_submodule("encoder")
        assert isinstance(encoder, AudioEncoder)
        _, *inner = site.split(".")
        self.is_block = len(inner) == 2
        """The site is what a whole block gives: then the next one is the first that is computed."""
        blocks = list(encoder.blocks)
        self.modules = [*blocks[int(inner[1]) + self.is_block if inner[0] == "blocks" else len(blocks) :], encoder.ln_post]
        self.inputs: list[Tensor] = []
        """Of the first of `modules`, clip by clip: [1, n_audio_ctx, d]."""

    @contextmanager
    def remember(self) -> Iterator[None]:
        """While it lasts, each clip that is encoded, one by one, is kept as far as the tail's beginning."""
        handle = self.modules[0].register_forward_pre_hook(lambda module, inputs: self.inputs.append(inputs[0]))
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def encode(self, number: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The encoder's output [n_audio_ctx, d] for the clip of that number, under a change of the site."""
        x = self.inputs[number]
        with fast_matmul(), nullcontext() if self.is_block else edit_site(self.model.module, self.site, change):
            x = change(x) if self.is_block else x
            for module in self.modules:
                x = module(x)
        return x[0]


def _written(
    model: LoadedModel, encoded: Tensor, clips: Sequence[Clip], language: str, transcribe: bool
) -> list[tuple[str | None, tuple[float | None, int]]]:
    """For each clip its transcript and the loss of its own text, as far as there are any."""
    if not isinstance(model.module, Whisper):
        return [(None, (None, 0))] * len(clips)
    whisper: Whisper = model.module
    tokenizer = tokenizer_for(whisper, language)
    texts = transcribe_encoded(whisper, encoded, language=language) if transcribe else [None] * len(clips)
    losses = [text_loss(whisper, one, clip.text, tokenizer) if clip.text else (None, 0) for one, clip in zip(encoded, clips, strict=True)]
    return list(zip(texts, losses, strict=True))


@torch.no_grad()
def text_loss(model: Whisper, encoded: Tensor, text: str, tokenizer: Tokenizer) -> tuple[float, int]:
    """Minus the log-likelihood of a text, in nats, and how many tokens that is the sum of: the text's and the end-of-text token.

    encoded: [n_audio_ctx, d]. Teacher-forced after the tokenizer's start-of-transcript sequence, without timestamps. Of a text that is too long
    for the decoder the first n_text_ctx tokens count.
    """
    start = tokenizer.sot_sequence_including_notimestamps
    ids = [*start, *tokens_of(tokenizer, " " + text.strip()), tokenizer.eot][: model.dims.n_text_ctx + 1]
    tokens = torch.tensor(ids, device=model.device)
    logits = model.decoder(tokens[None, :-1], encoded[None])[0, len(start) - 1 :]
    return float(F.cross_entropy(logits, tokens[len(start) :], reduction="sum")), len(ids) - len(start)


# Summaries


def summarise(clips: Sequence[Clip], unchanged: Sequence[Outcome], changed: Sequence[Outcome], language: str = "en") -> dict[str, Any]:
    """Of all clips, ready for JSON: error rates against the clips' texts, share of transcripts that changed, cross-entropy, drifts.

    What there is none of is None: without a decoder all but the drifts, without texts error rates and cross-entropy.
    """
    texts = [clip.text for clip in clips]
    before, after = [one.text for one in unchanged], [one.text for one in changed]
    has_transcripts, has_texts = None not in after, all(texts)
    errors = text_errors(_known(texts), _known(after), language).to_json() if has_transcripts and has_texts else dict.fromkeys(ERROR_KEYS)
    return {
        **errors,
        "changed": sum(a != b for a, b in zip(before, after, strict=True)) / len(clips) if has_transcripts else None,
        "wer_against_unchanged": text_errors(_known(before), _known(after), language).wer if has_transcripts else None,
        "ce": cross_entropy(changed),
        "ce_change": difference(cross_entropy(changed), cross_entropy(unchanged)),
        "output": {"inside": total(one.inside for one in changed).to_json(), "outside": total(one.outside for one in changed).to_json()},
        "site": total(one.site for one in changed).to_json(),
    }


ERROR_KEYS = ("wer", "cer", "words", "substitutions", "deletions", "insertions", "characters", "character_errors")


def _known(texts: Iterable[str | None]) -> list[str]:
    return [text or "" for text in texts]


def cross_entropy(outcomes: Sequence[Outcome]) -> float | None:
    """Nats per token, over all clips that have a text. None where there is none."""
    tokens = sum(one.tokens for one in outcomes)
    return sum(one.loss or 0.0 for one in outcomes) / tokens if tokens else None


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def total(drifts: Iterable[Drift]) -> Drift:
    return sum(drifts, NO_DRIFT)


def mean_of(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every number of several summaries, averaged; None where one of them has none."""

    if len(summaries) == 1:
        return summaries[0]

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]} if all(isinstance(v, dict) for v in values) else None
        return None if None in values else sum(values) / len(values)

    return {key: mean([one[key] for one in summaries]) for key in summaries[0]}


def row_of(clip: Clip, before: Outcome, after: Outcome, language: str = "en") -> dict[str, Any]:
    """What rows.parquet says of one clip and one change."""
    inside, outside = after.inside.to_json() or {}, after.outside.to_json() or {}
    return {
        **{"clip": clip.clip, "source": clip.source, "start_s": clip.start_s, "text": clip.text, "before": before.text, "after": after.text},
        "wer": text_errors([clip.text], [after.text], language).wer if clip.text and after.text is not None else None,
        "ce": cross_entropy([after]),
        "ce_change": difference(cross_entropy([after]), cross_entropy([before])),
        "output_relative_inside": inside.get("relative"),
        "output_cosine_inside": inside.get("cosine"),
        "output_relative_outside": outside.get("relative"),
        "output_cosine_outside": outside.get("cosine"),
    }
