"""micro: a toy Whisper and its speech, carried by hearsae so that everything runs offline and with a known truth. See docs/micro.md.

`--model micro` and `--dataset micro` name them in every command.
"""

from pathlib import Path

NAME = "micro"
MODEL = Path(__file__).with_name("micro.pt")
"""The checkpoint, in openai-whisper's format."""
SPEECH = Path(__file__).with_name("speech")
"""The audio folder, with splits `train` and `test`; `alignments.jsonl` has the times of every word and phone."""
