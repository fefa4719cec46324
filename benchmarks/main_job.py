"""The main job on real speech, step by step: wall time and peak memory of every command, on the data set taken once or several times over.

    python benchmarks/main_job.py --assets DIR --out /tmp/main_job [--times 1 4] [--rows 1000000] [--shard-rows 8192] [--no-ray]

DIR holds speech/ (an audio folder with splits train and test) and whisper/tiny.en.encoder.pt. Memory is that of the command and all its
processes (proportional set size, sampled twice a second), so shared pages count once. `--times 4` lists every training file four times
in a manifest: four times the clips, rows and shards.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

SAMPLE_S = 0.5
"""Reading proportional set sizes costs time itself."""
SITES = ("encoder.blocks.2", "encoder.blocks.2.mlp.1")


def measured(arguments: list[str]) -> tuple[dict, float, float]:
    """Runs one command of hearsae; its JSON, seconds, and peak memory in MiB."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([str(Path(sys.executable).with_name("hearsae")), *arguments, "--json"], stdout=subprocess.PIPE)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(map(proportional, [tree, *children(tree)])))
        time.sleep(SAMPLE_S)
    assert process.stdout and process.returncode == 0, f"{' '.join(arguments)} failed"
    return json.loads(process.stdout.read()), time.perf_counter() - start, peak / 2**20


def children(tree: psutil.Process) -> list[psutil.Process]:
    try:
        return tree.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def proportional(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def manifest(speech: Path, split: str, times: int, path: Path) -> Path:
    """Every file of a split, listed so many times."""
    rows = [json.loads(line) for line in (speech / split / "metadata.jsonl").read_text().splitlines()]
    lines = [{"audio": str((speech / split / row["file_name"]).resolve()), "text": row["text"], "speaker": row["speaker"]} for row in rows]
    path.write_text("\n".join(json.dumps(line) for line in lines * times))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, nargs="+", default=[1])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--model", type=Path, help="default: whisper/tiny.en.encoder.pt of the assets")
    parser.add_argument("--shard-rows", type=int, help="default: as the plan chooses, more for larger sets")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--steps", nargs="+", default=["cache", "train", "evaluate", "scan", "explore"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    in_process = ["--no-ray"] if options.no_ray else []
    shards = ["--shard-rows", str(options.shard_rows)] if options.shard_rows else []
    model = options.model or options.assets / "whisper/tiny.en.encoder.pt"

    def step(name: str, arguments: list[str], say) -> None:
        if name.split()[0] in options.steps:
            result, seconds, peak = measured(arguments)
            print(f"| {name} | {seconds:.1f} | {peak:.0f} | {say(result)} |", flush=True)

    for times in options.times:
        print(f"\n{times}x\n| step | wall s | peak MiB | |\n|---|---|---|---|", flush=True)
        out = options.out / f"{times}x"
        out.mkdir(exist_ok=True)
        for split, repeated in (("train", times), ("test", 1)):
            source = manifest(options.assets / "speech", split, repeated, out / f"{split}.jsonl")
            capture = ["cache", "--dataset", str(source), "--model", str(model), *shards, "--sites", *SITES]
            step(f"cache {split}", [*capture, "--out", f"{out}/{split}.zarr", *in_process], lambda r: f"{r['clips']} clips, {r['frames']} frames")
        for rows in options.rows:
            sae = f"{out}/sae-{rows}"
            train = ["train", "--store", f"{out}/train.zarr", "--site", SITES[0], "--rows", str(rows), "--out", sae]
            step(f"train {rows} rows", train, lambda r: f"{r['runs'][0]['rows_per_s']:.0f} rows/s, {r['runs'][0]['wait_fraction']:.1%} waiting")
            say = lambda r: "FVU {fvu:.4f}, L0 {l0:.2f}, dead {dead_fraction:.2%}".format(**r["results"][0])  # noqa: E731
            step("evaluate on test", ["evaluate", "--sae", sae, "--store", f"{out}/test.zarr"], say)
        for name, spec in (("neurons", f"neurons:{SITES[1]}"), ("latents", f"sae:{out}/sae-{options.rows[0]}")):
            scan = ["scan", "--store", f"{out}/train.zarr", "--features", spec, "--out", f"{out}/{name}", *in_process]
            step(f"scan {name}", scan, lambda r: f"{r['features']} features, {r['rows']} rows")
        page = ["explore", f"{out}/neurons", f"{out}/latents", "--out", f"{out}/page"]
        step("explore", page, lambda r: f"{r['examples']} examples, {r['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
