"""What of a transcript sits in which encoder frames: it is written again with some of them replaced by those of silence."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from whisper.normalizers import BasicTextNormalizer

from analysis.align import Interval
from analysis.experiments.bootstrap import ratio_interval
from analysis.experiments.chop_report import by_place_report, by_word_report
from analysis.experiments.report import Report
from analysis.experiments.speech import PIECE_CLIPS, Clip, Mapper, Speech, encode, in_this_process, whole_model
from analysis.experiments.word_times import word_times
from analysis.interventions import DECODE_BATCH, padding_output, tokenizer_for, transcribe_encoded, word_frames
from analysis.interventions import chop as with_padding
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS

By = Literal["word", "time", "frame"]
Run = Callable[[Sequence["Cut"]], list[str]]
"""Cuts -> what Whisper writes of their clips without them."""

MARGIN = 2
"""Frames on either side of a word that go with it: an encoder position also holds what its neighbours sound like."""
SHORTEST_WORD_LETTERS = 3
"""Of a word that is looked for: shorter ones are often written without being heard."""
SHORTEST_WORD_S = 0.1
"""What is said faster is hardly heard by itself."""
SHORTEST_TRANSCRIPT = 3
"""Words: with fewer there are hardly others to be kept."""


class Cut(NamedTuple):
    """Frames [start, stop) of the encoder's output of one clip that are to be replaced."""

    clip: int
    """Its place in the speech."""
    start: int
    stop: int


class Trial(NamedTuple):
    """One word to chop out of one clip."""

    clip: int
    """Its place in the speech."""
    word: str
    """As `plain_words` has it."""
    start_s: float
    """Within the clip's source."""
    end_s: float


class Placed(NamedTuple):
    """A trial with the frames that it takes."""

    trial: Trial
    margin: int
    cut: Cut
    control: Cut | None
    """None where the clip has no room for it."""


class Outcome(NamedTuple):
    """What chopping did to a transcript."""

    gone: bool
    """The word is nowhere in it."""
    kept: float
    """Share of the other words that are still there."""
    same: bool
    """The other words are all there, in their order, and nothing else."""
    new: bool
    """It has a word that was not there before."""


def chop(
    speech: Speech,
    model: str,
    by: By = "word",
    start: float | None = None,
    end: float | None = None,
    times: Sequence[str] = (),
    word: str | None = None,
    margin: int = MARGIN,
    margins: Sequence[int] = (),
    trials: int | None = None,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """Replaces encoder frames by those that the padded, silent input has there, and transcribes again.

    by: `word`: each word that can be looked for (`find_trials`) by itself, with `margin` frames on either side, and besides with each of `margins`.
    `time`, `frame`: in every clip what lies between `start` and `end`, in seconds or frames from the clip's start.
    times: files of word times, as `word_times` takes them. word: look for this one only. trials: draw so many of all.
    The control chops as many frames at a random place of the same clip that has none of the chosen ones.
    Raises HearsaeError for a model without a decoder, a range that is not in the model's window, unknown times of words, and where there is no
    word that can be looked for.
    """
    loaded = whole_model(model, device, "transcribing")
    tokenizer_for(loaded.module, language)  # refuses what it does not know
    n_audio_ctx = loaded.dims.n_audio_ctx
    run: Run = partial(_transcripts, speech, model, device, language, map_pieces)
    if min([margin, *margins]) < 0 or (trials is not None and trials < 1) or seed < 0:
        raise HearsaeError("--margin, --margins and --seed can't be negative, and --trials must be at least 1")
    if by != "word":
        if word is not None or times or margins or trials is not None:
            raise HearsaeError(f"--by {by} chops the same place of every clip: --word, --times, --margins and --trials belong to --by word")
        return _by_place(speech, _range(by, start, end, n_audio_ctx), by, seed, run)
    if start is not None or end is not None:
        raise HearsaeError("--start and --end belong to --by time or --by frame")
    said = word_times(speech, times)
    wanted = None if word is None else " ".join(plain_words(word))
    if wanted is not None and not any(plain_words(label) == [wanted] for words in said for _, _, label in words):
        raise HearsaeError(f"the word '{word}' is not among the words whose times are known")
    before = run([Cut(number, 0, 0) for number in range(len(speech.clips))])
    found = find_trials(before, said, wanted)
    if not found:
        which = f"the word '{word}' can't be looked for" if word else "none of the words whose times are known can be looked for"
        needed = f"{SHORTEST_WORD_LETTERS} letters, {SHORTEST_WORD_S:g} s, once in a transcript of at least {SHORTEST_TRANSCRIPT} words"
        raise HearsaeError(f"{which} in what {model} writes: it needs {needed}")
    chosen = drawn(found, trials, seed)
    generator = np.random.Generator(np.random.PCG64(seed))
    placed = [_placed(speech, trial, one, n_audio_ctx, generator) for one in dict.fromkeys([margin, *margins]) for trial in chosen]
    after = iter(run([cut for one in placed for cut in (one.cut, one.control) if cut is not None]))
    rows = [_row(speech, one, before[one.trial.clip], next(after), next(after) if one.control else None) for one in placed]
    by_margin = {str(one): rates([row for row in rows if row["margin"] == one]) for one in sorted({row["margin"] for row in rows})}
    words = {"margin": margin, "clips": len({row["clip"] for row in rows}), "words_found": len(found), "by_margin": by_margin if margins else {}}
    return by_word_report(rows, {**by_margin[str(margin)], **words})


# Words


def plain_words(text: str) -> list[str]:
    """The words of a text in lower case without punctuation, by Whisper's BasicTextNormalizer: its English one would join number words."""
    return BasicTextNormalizer()(text).split()


def find_trials(before: Sequence[str], times: Sequence[Sequence[Interval]], word: str | None = None) -> list[Trial]:
    """Every word that can be looked for: of 3 letters or more, longer than 100 ms, said once and written once, in a transcript of 3 words or more.

    before: each clip's transcript. times: each clip's words, of `word_times`. word: only this one, as `plain_words` has it.
    """
    trials = []
    for number, (text, words) in enumerate(zip(before, times, strict=True)):
        written = Counter(plain_words(text))
        said = Counter(part for _, _, label in words for part in plain_words(label))
        for start_s, end_s, label in words:
            plain = " ".join(plain_words(label))
            looked_for = word in (None, plain) and len(plain) >= SHORTEST_WORD_LETTERS and end_s - start_s > SHORTEST_WORD_S
            if looked_for and written.total() >= SHORTEST_TRANSCRIPT and written[plain] == said[plain] == 1:
                trials.append(Trial(number, plain, start_s, end_s))
    return trials


def drawn(trials: Sequence[Trial], n: int | None, seed: int) -> list[Trial]:
    """n of the trials, in their order; all of them where there are no more."""
    if n is None or n >= len(trials):
        return list(trials)
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(trials), n, replace=False)
    return [trials[number] for number in sorted(chosen)]


def outcome(word: str, before: str, after: str) -> Outcome:
    """What became of a transcript that had the word."""
    others, left = [one for one in plain_words(before) if one != word], plain_words(after)
    kept = (Counter(others) & Counter(left)).total() / len(others)
    return Outcome(word not in left, kept, left == others, bool(Counter(left) - Counter([*others, word])))


# Places


def elsewhere(cut: Cut, n_frames: int, generator: np.random.Generator) -> Cut | None:
    """As many frames at a random place within the first n_frames of the same clip that shares none with the cut. None where they don't fit."""
    n = cut.stop - cut.start
    places = [place for place in range(n_frames - n + 1) if place + n <= cut.start or place >= cut.stop]
    if not places:
        return None
    place = int(generator.choice(places))
    return Cut(cut.clip, place, place + n)


def _range(by: By, start: float | None, end: float | None, n_audio_ctx: int) -> tuple[int, int]:
    if start is None or end is None:
        raise HearsaeError(f"--by {by} needs --start and --end")
    longest = n_audio_ctx if by == "frame" else n_audio_ctx * FRAME_SECONDS
    if not 0 <= start <= end <= longest:
        window = f"frames 0 to {n_audio_ctx}, seconds 0 to {n_audio_ctx * FRAME_SECONDS:g}"
        raise HearsaeError(f"--start {start:g} --end {end:g} is no range of the model's window: {window}")
    if by == "frame":
        if start != int(start) or end != int(end):
            raise HearsaeError("--by frame takes whole numbers for --start and --end")
        return int(start), int(end)
    return (0, 0) if start == end else word_frames(start, end, n_audio_ctx=n_audio_ctx)


# Transcripts


def _transcripts(speech: Speech, model: str, device: str, language: str, map_pieces: Mapper, cuts: Sequence[Cut]) -> list[str]:
    """What Whisper writes of each cut's clip without its frames, in the order of the cuts."""
    numbers: dict[int, list[int]] = {}
    for number, cut in enumerate(cuts):
        numbers.setdefault(cut.clip, []).append(number)
    clips = list(numbers)
    pieces = [
        [(speech.clips[clip], [cuts[number] for number in numbers[clip]]) for clip in clips[first : first + PIECE_CLIPS]]
        for first in range(0, len(clips), PIECE_CLIPS)
    ]
    texts = [text for piece in map_pieces(partial(_transcribe, speech, model, device, language), pieces) for text in piece]
    in_order = [""] * len(cuts)
    for number, text in zip((number for clip in clips for number in numbers[clip]), texts, strict=True):
        in_order[number] = text
    return in_order


def _transcribe(speech: Speech, name: str, device: str, language: str, piece: Sequence[tuple[Clip, Sequence[Cut]]]) -> list[str]:
    model = whole_model(name, device)
    padding, encoded = padding_output(model.module), encode(model, speech, [clip for clip, _ in piece])
    cuts = [(row, cut) for row, (_, of_clip) in enumerate(piece) for cut in of_clip]
    texts: list[str] = []
    for first in range(0, len(cuts), DECODE_BATCH):  # so many copies at once
        chopped = [with_padding(encoded[row], cut.start, cut.stop, padding) for row, cut in cuts[first : first + DECODE_BATCH]]
        texts += transcribe_encoded(model.module, chopped, language=language)
    return texts


# By word


def _placed(speech: Speech, trial: Trial, margin: int, n_audio_ctx: int, generator: np.random.Generator) -> Placed:
    clip = speech.clips[trial.clip]
    cut = Cut(trial.clip, *word_frames(trial.start_s - clip.start_s, trial.end_s - clip.start_s, margin, n_audio_ctx))
    return Placed(trial, margin, cut, elsewhere(cut, clip.n_frames, generator))


def _row(speech: Speech, placed: Placed, before: str, after: str, control_after: str | None) -> dict[str, Any]:
    trial, margin, cut, control = placed
    clip, result = speech.clips[trial.clip], outcome(trial.word, before, after)
    of_control = None if control_after is None else outcome(trial.word, before, control_after)
    return {
        "clip": clip.clip, "source": clip.source, "word": trial.word, "start_s": trial.start_s, "end_s": trial.end_s, "margin": margin,
        "frames": [cut.start, cut.stop], "before": before, "after": after, "gone": result.gone, "others_kept": result.kept,
        "deleted": result.gone and result.same, "replaced": result.gone and result.new,
        "control_frames": [control.start, control.stop] if control else None, "control_after": control_after,
        "control_gone": of_control and of_control.gone, "control_others_kept": of_control and of_control.kept,
    }  # fmt: skip


def rates(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fractions over trials, with 95 % intervals over clips."""
    clips, of_clip = np.unique([row["clip"] for row in rows], return_inverse=True)

    def by_clip(values: Sequence[float]) -> np.ndarray:
        return np.bincount(of_clip, values, minlength=len(clips))

    def rate(name: str, among: Sequence[bool]) -> tuple[float | None, tuple[float, float] | None]:
        part = by_clip([float(row[name]) if counts else 0.0 for row, counts in zip(rows, among, strict=True)])
        whole = by_clip([float(counts) for counts in among])
        return (float(part.sum() / whole.sum()), ratio_interval(part, whole)) if whole.sum() else (None, None)

    every, gone, fits = [True] * len(rows), [row["gone"] for row in rows], [row["control_frames"] is not None for row in rows]
    found = {
        "word_gone": rate("gone", every), "others_kept": rate("others_kept", every),
        "deleted": rate("deleted", gone), "replaced": rate("replaced", gone),
    }  # fmt: skip
    control = {"word_gone": rate("control_gone", fits), "others_kept": rate("control_others_kept", fits)}
    return {
        "trials": len(rows),
        **{name: value for name, (value, _) in found.items()},
        "intervals": {name: interval for name, (_, interval) in found.items()},
        "control": {"trials": sum(fits), **{name: value for name, (value, _) in control.items()},
                    "intervals": {name: interval for name, (_, interval) in control.items()}},
    }  # fmt: skip


# By place


def _by_place(speech: Speech, frames: tuple[int, int], by: By, seed: int, run: Run) -> Report:
    generator = np.random.Generator(np.random.PCG64(seed))
    cuts = [Cut(number, *frames) for number in range(len(speech.clips))]
    controls = [elsewhere(cut, clip.n_frames, generator) for cut, clip in zip(cuts, speech.clips, strict=True)]
    before = run([Cut(cut.clip, 0, 0) for cut in cuts])
    after = run(cuts)
    elsewhere_after = iter(run([control for control in controls if control]))
    rows = []
    for clip, control, text, now in zip(speech.clips, controls, before, after, strict=True):
        other = next(elsewhere_after) if control else None
        rows.append(
            {"clip": clip.clip, "source": clip.source, "start_s": clip.start_s, "frames": list(frames), "n_frames": clip.n_frames, "text": clip.text,
             "before": text, "after": now, "words_kept": _kept(text, now), "control_frames": [control.start, control.stop] if control else None,
             "control_after": other, "control_words_kept": None if other is None else _kept(text, other)}
        )  # fmt: skip
    with_control = [row for row in rows if row["control_frames"]]
    summary = {
        "by": by, "frames": list(frames), "clips": len(rows), "clips_reached": sum(frames[0] < clip.n_frames for clip in speech.clips),
        "changed": _mean(row["after"] != row["before"] for row in rows), "words_kept": _mean(row["words_kept"] for row in rows),
        "control": {"clips": len(with_control), "changed": _mean(row["control_after"] != row["before"] for row in with_control),
                    "words_kept": _mean(row["control_words_kept"] for row in with_control)},
    }  # fmt: skip
    return by_place_report(rows, summary)


def _kept(before: str, after: str) -> float | None:
    """Share of a transcript's words that another has too. None for a transcript without words."""
    words = Counter(plain_words(before))
    return (words & Counter(plain_words(after))).total() / words.total() if words else None


def _mean(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None
