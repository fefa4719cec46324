"""Held-out speech as an audio folder: sentences and voices that training never had, with the times of words and phones."""

import json
import random
from itertools import cycle
from pathlib import Path

import soundfile as sf

from cache.header import SAMPLE_RATE
from cache.micro.recipe import grammar
from cache.micro.recipe.synthesis import Clip, synthesise
from cache.micro.recipe.voices import ACCENTS, HELD_OUT_VARIANTS, Voice

MAX_SECONDS = 7.0


def write_corpus(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """An audio folder with `metadata.jsonl` in each split and one `alignments.jsonl`. sizes: split -> clips. No voice variant is in two splits."""
    alignments = []
    for split, variants in zip(sizes, _deal(HELD_OUT_VARIANTS, sizes), strict=True):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with open(folder / split / "metadata.jsonl", "w") as metadata:
            for number, clip in enumerate(held_out_clips(f"{split} {seed}", sizes[split], variants)):
                name = f"{number:04d}.flac"
                sf.write(folder / split / name, clip.samples, SAMPLE_RATE, subtype="PCM_16", compression_level=1.0)
                row = {"file_name": name, "text": clip.text, "speaker": clip.voice.name, "accent": ACCENTS[clip.voice.accent]}
                metadata.write(json.dumps(row) + "\n")
                times = {kind: [[start, end, label] for label, start, end in getattr(clip, kind)] for kind in ("words", "phones")}
                alignments.append({"file_name": f"{split}/{name}", **times})
    (folder / "alignments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alignments))


def held_out_clips(seed: str, count: int, variants: list[str]) -> list[Clip]:
    """Different held-out sentences of three words or more, by every accent and variant in turn; the blog's sentence is the first."""
    rng = random.Random(seed)
    clips: list[Clip] = []
    said: set[str] = set()
    voices = [Voice(accent, variant) for variant in variants for accent in ACCENTS]
    rng.shuffle(voices)
    for voice in cycle(voices):
        text = _held_out_text(rng, said) if said else grammar.BLOG_SENTENCE
        said.add(text)
        clip = synthesise(text, voice, rng.randint(120, 190), rng.randint(25, 75), rng.randint(35, 65))
        if clip is not None and clip.seconds <= MAX_SECONDS:
            clips.append(clip)
        if len(clips) == count:
            break
    return clips


def _held_out_text(rng: random.Random, said: set[str]) -> str:
    while True:
        text = grammar.sentence(rng)
        if grammar.is_held_out(text) and text not in said and len(text.split()) >= 3:
            return text


def _deal(variants: list[str], sizes: dict[str, int]) -> list[list[str]]:
    """Shares of the variants in proportion to the sizes, at least one each."""
    total, dealt, rest = sum(sizes.values()), [], list(variants)
    for size in list(sizes.values())[:-1]:
        count = max(1, round(len(variants) * size / total))
        dealt.append(rest[:count])
        rest = rest[count:]
    return [*dealt, rest]
