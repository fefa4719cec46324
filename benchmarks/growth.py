"""Time a clip and peak memory of capture as the set grows: the same clips listed again and again, each time as new ones.

    python benchmarks/growth.py --out /tmp/growth [--clips 500 5000 50000] [--seconds 2] [--context trimmed] [--ray]

micro and its own speech, clips of --seconds, one process (or Ray), `encoder.blocks.2`; `--context` goes to `hearsae cache` as it is. Memory
is that of the command and all its processes, shared pages counted once. "start" is what is not the workers' time: imports, the plan, the store.
The clips of the largest set are gigabytes: each store is removed after its run.
"""

import argparse
import itertools
import json
import shutil
from pathlib import Path

import soundfile
from main_job import measured

from cache import micro

SITE = "encoder.blocks.2"


def manifest(path: Path, clips: int, seconds: float) -> Path:
    """So many lines: the start of each file that is long enough, in turn, with an id of its own."""
    files = [file for file in sorted((micro.SPEECH / "train").rglob("*.flac")) if soundfile.info(file).duration >= seconds]
    with open(path, "w") as out:
        for number, file in zip(range(clips), itertools.cycle(files), strict=False):
            out.write(json.dumps({"audio": str(file), "duration": seconds, "id": f"{number:08d}"}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, nargs="+", default=[500, 5000, 50000])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--context", choices=["padded", "trimmed"])
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    context = ["--context", arguments.context] if arguments.context else []
    where = [] if arguments.ray else ["--no-ray"]
    print(f"{'clips':>8} {'shards':>7} {'wall s':>8} {'start s':>8} {'ms/clip':>8} {'frames/s':>9} {'peak MiB':>9}")
    for clips in arguments.clips:
        store = arguments.out / f"{clips}.zarr"
        dataset = manifest(arguments.out / f"{clips}.jsonl", clips, arguments.seconds)
        options = ["--dataset", str(dataset), "--model", "micro", "--sites", SITE, "--clip-seconds", str(arguments.seconds), "--out", str(store)]
        done, wall, peak = measured(["cache", *options, *context, *where])
        busy = sum(done["seconds_by_stage"].values())
        assert done["clips"] == clips and not done["skipped"], done
        rate = done["frames"] / busy
        print(f"{clips:8d} {done['shards']:7d} {wall:8.1f} {wall - busy:8.1f} {busy / clips * 1e3:8.2f} {rate:9.0f} {peak:9.0f}", flush=True)
        shutil.rmtree(store)


if __name__ == "__main__":
    main()
