"""The training set on disk: raw samples beside one JSON line a clip, in parts that processes make independently."""

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cache.micro.recipe import grammar
from cache.micro.recipe.synthesis import draw_clips
from cache.micro.recipe.voices import TRAINING_VARIANTS

CLIPS_IN_PART = 500
MAX_SECONDS = 8.0
WORD_STRINGS = 0.3
"""Share of the texts that are words in no order."""


@dataclass
class TrainingClip:
    text: str
    words: list[list[Any]]
    """[word, start, end], seconds."""
    phones: list[list[Any]]
    pcm: np.ndarray
    """int16, the memory-mapped samples of the clip's part."""
    first: int
    count: int

    def samples(self) -> np.ndarray:
        """float32 [count] in [-1, 1]."""
        return self.pcm[self.first : self.first + self.count].astype(np.float32) / 32768


def write_training_set(folder: Path, clips: int, seed: int, processes: int) -> None:
    """Synthesises `clips` clips (rounded up to whole parts). Parts that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = range(-(-clips // CLIPS_IN_PART))
    missing = [(folder, part, seed) for part in parts if not (folder / f"{part:04d}.jsonl").exists()]
    # A fresh process for every part: espeak-ng remembers what it said before, and what it says next depends on it.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        list(tqdm(pool.map(_write_part, missing), "speech", len(missing), unit="part"))


def read_training_set(folder: Path) -> list[TrainingClip]:
    clips = []
    for table in sorted(folder.glob("*.jsonl")):
        pcm = np.memmap(table.with_suffix(".pcm"), np.int16, "r")
        with open(table) as lines:
            clips += [TrainingClip(pcm=pcm, **json.loads(line)) for line in lines]
    return clips


def training_sentence(rng: random.Random) -> str:
    """A sentence that is not held out."""
    while grammar.is_held_out(text := grammar.sentence(rng)):
        pass
    return text


def training_text(rng: random.Random) -> str:
    """A sentence that is not held out, or words in no order."""
    return grammar.word_string(rng) if rng.random() < WORD_STRINGS else training_sentence(rng)


def _write_part(task: tuple[Path, int, int]) -> None:
    folder, part, seed = task
    clips = draw_clips(f"training {seed} {part}", CLIPS_IN_PART, training_text, TRAINING_VARIANTS, MAX_SECONDS)
    np.concatenate([clip.samples for clip in clips]).tofile(folder / f"{part:04d}.pcm")
    table, first = folder / f"{part:04d}.jsonl", 0
    with open(f"{table}.partial", "w") as lines:
        for clip in clips:
            row = {"text": clip.text, "words": clip.words, "phones": clip.phones, "first": first, "count": len(clip.samples)}
            lines.write(json.dumps(row) + "\n")
            first += len(clip.samples)
    os.replace(f"{table}.partial", table)
