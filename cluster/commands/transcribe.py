"""`hearsae transcribe`."""

import time
from dataclasses import dataclass
from typing import Any

from analysis.experiments.speech import Speech
from analysis.transcribe import transcribe
from cache.location import Location, reach
from cluster.commands import Output
from cluster.commands.experiments import mapper
from cluster.workers import WorkerOptions

SHOWN = 5
"""Transcripts and reasons that the summary names."""


@dataclass(frozen=True, kw_only=True)
class Transcribe(Output, WorkerOptions):
    """Write down what Whisper hears in every clip, and when it hears each word and token: a manifest that 'hearsae cache' takes as its dataset."""

    dataset: str
    """Speech, as in 'hearsae cache'; or one audio file."""
    model: str
    """Whisper, as in 'hearsae cache'."""
    out: Location
    """The manifest to write, FILE.jsonl."""
    again: bool = False
    """Replace a manifest that is there."""
    language: str | None = None
    """Of all clips; default: what the dataset says of each, else what Whisper hears."""
    split: str | None = None
    """Split of the dataset."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    limit: int | None = None
    """Use the first so many files or rows only."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        self.check()
        reach(self.out)
        speech = Speech(self.dataset, self.split, self.limit, self.subset)
        result = transcribe(
            speech,
            self.model,
            self.out.absolute(),
            language=self.language,
            device=self.device,
            again=self.again,
            map_pieces=mapper(self, "transcribe"),
        )
        result["summary"]["seconds"] = time.perf_counter() - begin
        return result

    def summary(self, result: dict[str, Any]) -> str:
        numbers = result["summary"]
        lines = [f"  {row['source']} at {row['start_s']:.1f} s: {row['after'] or '(nothing)'}" for row in result["rows"][:SHOWN]]
        if numbers["compared"]:
            lines.append(f"against the text of {numbers['compared']} clips: WER {numbers['wer']:.1%}, CER {numbers['cer']:.1%}")
        if numbers["audio_written"]:
            lines.append(f"the dataset has its audio inside: the sound of {numbers['audio_written']} clips was written beside the manifest")
        reasons = numbers["skipped_reasons"]
        lines += [f"{len(reasons)} skipped:"] if reasons else []
        lines += [*(f"  {reason}" for reason in reasons[:SHOWN]), *(["  ..."] if len(reasons) > SHOWN else [])]
        head = f"{result['out']}: {numbers['clips']} clips, {numbers['audio_seconds'] / 60:.1f} min, {numbers['tokens']} tokens"
        return "\n".join([f"{head} in {numbers['seconds']:.1f} s", *lines])
