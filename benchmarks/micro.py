"""What micro can do, against the known truth of its speech; prints the tables of docs/micro.md.

    python benchmarks/micro.py wer|features|chop|window|bigrams|align|all [--model FILE] [--speech FOLDER] [--limit N] [--threads 1]

FOLDER is an audio folder whose metadata.jsonl have text, speaker and accent, with alignments.jsonl at its root. Words are compared as
Whisper's BasicTextNormalizer leaves them: lower case, no punctuation. (Its EnglishTextNormalizer would join number words, "two, three" to "23".)
"""

import argparse
import json
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
import soundfile
import torch
import whisper
from torch import Tensor
from whisper.model import Whisper
from whisper.normalizers import BasicTextNormalizer
from whisper.timing import find_alignment

from analysis.arpabet import SILENCE
from analysis.experiments.chop import chop
from analysis.experiments.speech import Speech
from analysis.features import open_features
from analysis.interventions import limit_attention, next_tokens, padding_output, tokenizer_for, transcribe_encoded
from analysis.phones import Alignment, best_phone, label_frames, phone_auc, read_alignments
from cache.capture import CaptureConfig, capture_in_process, prepare
from cache.micro import MODEL, SPEECH
from cache.store import ActivationStore
from sae.train import train
from sae.train_config import TrainConfig

SITE, NEURONS = "encoder.blocks.2", "encoder.blocks.2.mlp.1"
WINDOWS = (1500, 300, 150, 100, 75, 50, 35, 20, 10, 5)
MARGINS = (0, 1, 2, 3)
PROMPTS = (" traffic", " New", " Good", " Thank", " ice", " very")
LEAST_FRAMES = 30
"""Of a phone that counts: on fewer, a high AUC comes by chance."""
ALIGNED_CLIPS = 100
"""At most; attention weights make this the slowest table, and words are plenty."""

normalise = BasicTextNormalizer()


class Clip(NamedTuple):
    """One audio file and the truth about it."""

    path: Path
    text: str
    speaker: str
    accent: str
    alignment: Alignment

    @property
    def voice(self) -> str:
        """The speaker apart from the accent: espeak-ng's variant."""
        return self.speaker.partition("+")[2] or self.speaker

    def mel(self) -> Tensor:
        """Of the padded 30 s window, [80, 3000]."""
        samples, _ = soundfile.read(self.path, dtype="float32")
        return whisper.log_mel_spectrogram(whisper.pad_or_trim(samples))


class Errors(NamedTuple):
    """Word errors, clip by clip."""

    wrong: np.ndarray
    """int64 [clips]: substitutions, insertions and deletions."""
    words: np.ndarray
    """int64 [clips]: of the reference."""

    @property
    def wer(self) -> float:
        return float(self.wrong.sum() / self.words.sum())

    def interval(self, resamples: int = 5000) -> tuple[float, float]:
        """95 % bootstrap interval of the WER over clips."""
        drawn = np.random.Generator(np.random.PCG64(0)).multinomial(len(self.words), np.full(len(self.words), 1 / len(self.words)), resamples)
        low, high = np.percentile(drawn @ self.wrong / (drawn @ self.words), [2.5, 97.5])
        return float(low), float(high)


class Detectors(NamedTuple):
    """How many of a set of features detect a single phone."""

    count: int
    above_90: int
    above_80: int
    median: float
    phones: int
    """That some feature detects with AUC > 0.9."""


# Speech and words


def read_clips(speech: Path, limit: int | None = None, seed: int = 0) -> list[Clip]:
    """All clips of an audio folder, sorted by path; or `limit` of them, drawn."""
    alignments = read_alignments(speech / "alignments.jsonl")
    clips = []
    for table in sorted(speech.rglob("metadata.jsonl")):
        for row in map(json.loads, table.read_text().splitlines()):
            path = table.parent / row["file_name"]
            clips.append(Clip(path, row["text"], row["speaker"], row["accent"], alignments[path.relative_to(speech).as_posix()]))
    return sorted(random.Random(seed).sample(clips, min(limit or len(clips), len(clips))))


def words(text: str) -> list[str]:
    return normalise(text).split()


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    counts = [jiwer.process_words(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    wrong = [count.substitutions + count.insertions + count.deletions for count in counts]
    return Errors(np.array(wrong), np.array([len(words(reference)) for reference in references]))


@torch.no_grad()
def encode(model: Whisper, clips: Sequence[Clip]) -> Tensor:
    """fp32 [clips, n_audio_ctx, d], of padded windows."""
    return torch.cat([model.encoder(clip.mel()[None]) for clip in clips])


def random_twin(path: Path, seed: int = 0) -> Whisper:
    """A Whisper of the checkpoint's dimensions with the weights that openai-whisper initialises a new one with."""
    dims = whisper.load_model(str(path), device="cpu").dims
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = Whisper(dims).eval()
        torch.nn.init.normal_(twin.decoder.positional_embedding, std=0.02)  # which openai-whisper leaves as memory had it
    return twin


# Experiments


def window_errors(model: Whisper, clips: Sequence[Clip], k: int) -> Errors:
    """Word errors with the encoder's attention limited to k positions on either side."""
    with limit_attention(model, k):
        encoded = encode(model, clips)
    return word_errors([clip.text for clip in clips], transcribe_encoded(model, encoded))


def word_start_errors(model: Whisper, clips: Sequence[Clip]) -> np.ndarray:
    """Seconds by which Whisper's own word starts (dynamic time warping on head 0 of the last cross-attention) come late.

    Words that Whisper's tokens join or split in another way than the alignment are left out with their clips.
    """
    head = torch.zeros(model.dims.n_text_layer, model.dims.n_text_head, dtype=torch.bool)
    head[-1, 0] = True
    model.register_buffer("alignment_heads", head.to_sparse(), persistent=False)
    tokenizer = tokenizer_for(model)
    late: list[float] = []
    for clip in clips:
        mel_frames = math.ceil(soundfile.info(str(clip.path)).frames / whisper.audio.HOP_LENGTH)
        timings = find_alignment(model, tokenizer, tokenizer.encode(" " + clip.text), clip.mel(), mel_frames)
        timings = [timing for timing in timings if words(timing.word)]
        if [words(timing.word) for timing in timings] == [words(word.label) for word in clip.alignment.words]:
            late += [timing.start - word.start_s for timing, word in zip(timings, clip.alignment.words, strict=True)]
    return np.array(late)


# Features


def capture_store(model: Path, speech: Path, split: str | None, out: Path) -> ActivationStore:
    config = CaptureConfig(str(speech), str(model), (SITE, NEURONS), out, split=split, device="cpu")
    list(capture_in_process(config, prepare(config).pending))
    return ActivationStore.open(out)


def save_encoder(model: Whisper, path: Path) -> Path:
    weights = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    torch.save({"dims": asdict(model.dims), "model_state_dict": weights}, path)
    return path


def detectors(store: ActivationStore, spec: str, alignments: dict[str, Alignment], either_sign: bool = False) -> Detectors:
    """Features whose best single phone, silence not counted, has this AUC over all labelled frames."""
    features = open_features(spec, store)
    table = phone_auc(store, features, label_frames(store, features.site, alignments))
    best = best_phone(table, without=[SILENCE], least_frames=LEAST_FRAMES, either_sign=either_sign)
    found = best.auc > 0.9
    return Detectors(len(best.auc), int(found.sum()), int((best.auc > 0.8).sum()), float(np.median(best.auc)), len(set(best.phone[found])))


def feature_rows(name: str, model: Path, speech: Path, folder: Path, rows: int, k: int, threads: int) -> Iterator[tuple[str, str, Detectors]]:
    """(model, features, what they detect): SAE latents, neurons, and the residual stream's own and a random basis."""
    every = capture_store(model, speech, None, folder / "all.zarr")
    alignments = read_alignments(speech / "alignments.jsonl")
    learnt = capture_store(model, speech, "train", folder / "train.zarr") if (speech / "train").is_dir() else every
    d_sae = 8 * every.sites[SITE]["width"]
    config = TrainConfig((learnt.path,), (SITE,), folder / "sae", (d_sae,), (k,), rows=rows, device="cpu", threads=threads, quiet=True)
    (run,) = train(config)
    yield name, f"SAE latents, `{SITE}`", detectors(every, f"sae:{run.dir}", alignments)
    yield name, f"neurons, `{NEURONS}`", detectors(every, f"neurons:{NEURONS}", alignments)
    yield name, f"residual basis, `{SITE}` (either sign)", detectors(every, f"neurons:{SITE}", alignments, either_sign=True)
    yield name, f"random basis, `{SITE}` (either sign)", detectors(every, f"random:{SITE}", alignments, either_sign=True)


# Tables


def table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def print_wer(clips: Sequence[Clip], texts: Sequence[str]) -> None:
    errors = word_errors([clip.text for clip in clips], texts)
    same = np.array([clip.text.strip() == text.strip() for clip, text in zip(clips, texts, strict=True)])
    table("speech", "clips", "words", "WER", "95 % interval", "clips without error", "exact with case and punctuation")

    def line(name: str, of: np.ndarray) -> None:
        part = Errors(errors.wrong[of], errors.words[of])
        interval = f"{100 * part.interval()[0]:.1f} to {100 * part.interval()[1]:.1f} %"
        row(name, of.sum(), part.words.sum(), f"**{100 * part.wer:.2f} %**", interval, percent((part.wrong == 0).mean()), percent(same[of].mean()))

    line("all", np.ones(len(clips), bool))
    for field in ("accent", "voice"):
        names = np.array([getattr(clip, field) for clip in clips])
        for name in sorted(set(names)):
            line(name, names == name)


def print_chop(model: Path, speech: Path, limit: int | None) -> None:
    of = Speech(str(speech), limit=limit)
    found = chop(of, str(model), times=[str(speech / "alignments.jsonl")], margin=MARGINS[0], margins=MARGINS, device="cpu").summary["by_margin"]
    table("margin, frames", "trials", "word gone", "other words kept", "of those gone: nothing in its place", "control: word gone")
    for margin, one in found.items():
        row(margin, one["trials"], *map(percent, (one["word_gone"], one["others_kept"], one["deleted"], one["control"]["word_gone"])))


def print_window(model: Whisper, clips: Sequence[Clip]) -> None:
    table("k, frames on either side", "seconds", "WER", "95 % interval")
    for k in WINDOWS:
        errors = window_errors(model, clips, k)
        low, high = errors.interval()
        row(k, f"{0.02 * k:.1f}", percent(errors.wer), f"{100 * low:.1f} to {100 * high:.1f} %")


def print_bigrams(model: Whisper) -> None:
    padding = padding_output(model)
    table("prompt", "next token, probability (logit)")
    for prompt in PROMPTS:
        row(f"`{prompt}`", ", ".join(f"`{t.text}` {t.probability:.3f} ({t.logit:.1f})" for t in next_tokens(model, prompt, 5, padding)))


def print_align(model: Whisper, clips: Sequence[Clip]) -> None:
    late = 1000 * word_start_errors(model, clips[:: -(-len(clips) // ALIGNED_CLIPS)])
    table("words", "median error of starts, ms", "median lateness, ms", "within 50 ms", "within 100 ms")
    row(len(late), f"{np.median(abs(late)):.0f}", f"{np.median(late):+.0f}", percent((abs(late) < 50).mean()), percent((abs(late) < 100).mean()))


def print_features(model: Path, speech: Path, rows: int, k: int, threads: int) -> None:
    table("model", "features", "count", "AUC > 0.9", "AUC > 0.8", "median", "phones covered")
    with tempfile.TemporaryDirectory() as folder:
        twin = save_encoder(random_twin(model), Path(folder) / "random.pt")
        for name, path in (("micro", model), ("random weights", twin)):
            for of, features, found in feature_rows(name, path, speech, Path(folder) / path.stem, rows, k, threads):
                row(of, features, found.count, found.above_90, found.above_80, f"{found.median:.3f}", found.phones)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wer", "features", "chop", "window", "bigrams", "align", "all"])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--speech", type=Path, default=SPEECH)
    parser.add_argument("--limit", type=int, help="use so many clips, drawn; `chop` uses the first, `features` all")
    parser.add_argument("--rows", type=int, default=1_000_000, help="to train each SAE on")
    parser.add_argument("--k", type=int, default=32, help="latents per row of the SAEs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    asked = {"wer", "features", "chop", "window", "bigrams", "align"} if options.what == "all" else {options.what}

    model = whisper.load_model(str(options.model), device="cpu")
    clips = read_clips(options.speech, options.limit)
    if "wer" in asked:
        print_wer(clips, transcribe_encoded(model, encode(model, clips)))
    if "chop" in asked:
        print_chop(options.model, options.speech, options.limit)
    if "window" in asked:
        print_window(model, clips)
    if "bigrams" in asked:
        print_bigrams(model)
    if "align" in asked:
        print_align(model, clips)
    if "features" in asked:
        print_features(options.model, options.speech, options.rows, options.k, options.threads)


if __name__ == "__main__":
    main()
