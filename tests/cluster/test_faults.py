"""Full disks, flipped bytes, killed drivers, two drivers at once: the store ends as if nothing had happened, byte for byte."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import netns
import numpy as np
import pytest
import soundfile
from conftest import write_tiny_whisper
from test_ray import hold_to

import cache.store
from cache.store import ActivationStore
from cluster.cli import main

SITES = ("encoder.blocks.0", "encoder.blocks.1.mlp.1", "decoder.blocks.1")
CLIPS = 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with `clips` (60 of about a second, with texts, and one file that is no audio), `few` (2 of them), and `tiny.pt`."""
    root = tmp_path_factory.mktemp("faults")
    write_tiny_whisper(root / "tiny.pt", n_audio_ctx=200)
    rng = np.random.default_rng(0)
    for folder, count in (("clips", CLIPS), ("few", 2)):
        (root / folder).mkdir()
        lines = []
        for i in range(count):
            tone = 0.3 * np.sin(2 * np.pi * (150 + 40 * i) * np.arange(14000 + 90 * i) / 16000)
            soundfile.write(root / folder / f"{i:02d}.wav", tone + 0.01 * rng.standard_normal(len(tone)), 16000)
            lines.append(json.dumps({"file_name": f"{i:02d}.wav", "text": f"tone {i}"}))
        (root / folder / "metadata.jsonl").write_text("\n".join(lines))
    (root / "clips" / "broken.wav").write_bytes(b"no audio")
    return root


def cache_arguments(inputs: str | Path, out: str | Path, *more: str, dataset: str = "clips", sites: tuple[str, ...] = SITES) -> list[str]:
    """The command of these tests: one clip a shard."""
    what = ["--dataset", f"{inputs}/{dataset}", "--model", f"{inputs}/tiny.pt", "--sites", *sites, "--out", str(out)]
    return ["cache", *what, "--chunk-rows", "64", "--shard-rows", "64", "--clip-seconds", "1.25", "--device", "cpu", "--json", *more]


def hearsae(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", *arguments]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    """The store of `clips` that one process makes. Read only."""
    out = tmp_path_factory.mktemp("undisturbed") / "acts.zarr"
    assert main(cache_arguments(inputs, out, "--no-ray")) == 0
    assert ActivationStore.open(out).committed(*SITES) == list(range(CLIPS))
    return out


def verified(store: Path) -> None:
    """Raises unless the store is good; so do leftovers of writers."""
    objects, bad = ActivationStore.open(store).verify()
    assert bad == [] and objects == CLIPS * len(SITES)
    assert not list(store.rglob("*.tmp"))


# A full disk


def fill_the_disk(inputs: str, folder: str, room: int, how: list[str]) -> dict[str, object]:
    """Captures on a disk of 4 MiB that has `room` bytes left, frees the rest, captures again; the store lies in `folder` then."""
    disk = Path(folder) / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    (disk / "other").write_bytes(bytes((4 << 20) - room))
    command = hearsae(*cache_arguments(inputs, disk / "acts.zarr", *how))
    full = subprocess.run(command, capture_output=True, text=True)
    left = [str(path) for path in disk.rglob("*.tmp")]
    opens = (disk / "acts.zarr" / "zarr.json").exists()
    bad = [str(damage) for damage in ActivationStore.open(disk / "acts.zarr").verify()[1]] if opens else []
    (disk / "other").unlink()
    again = subprocess.run(command, capture_output=True, text=True)
    shutil.copytree(disk / "acts.zarr", Path(folder) / "acts.zarr")
    shown = {name: (run.returncode, run.stdout, run.stderr) for name, run in (("full", full), ("again", again))}
    return {**shown, "left": left, "bad": bad, "opens": opens}


@pytest.mark.parametrize(
    ("room", "how"),
    [
        pytest.param(4 << 10, ["--no-ray"], id="while-planning"),
        pytest.param(600 << 10, ["--no-ray"], id="while-capturing"),
        pytest.param(600 << 10, ["--workers", "2"], id="while-capturing-on-ray", marks=[pytest.mark.cluster, pytest.mark.slow]),
    ],
)
@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_with_room_the_same_command_finishes(inputs, undisturbed, tmp_path, room, how):
    seen = netns.call(fill_the_disk, inputs, tmp_path, room, how, timeout=180)
    status, out, err = seen["full"]
    assert (status, out) == (1, "")
    *before, line = [line for line in err.splitlines() if "network_util.cc" not in line]  # Ray, of having no network
    assert before == []
    assert line.startswith(f"hearsae: can't write {tmp_path}/disk/acts.zarr/") and line.endswith(": No space left on device")
    assert seen["opens"] == (room > 100 << 10)  # full while planning, full while capturing
    assert seen["left"] == seen["bad"] == []
    status, out, err = seen["again"]
    assert status == 0, err
    assert 0 < json.loads(out)["shards_computed"] <= CLIPS
    hold_to(tmp_path / "acts.zarr", undisturbed)


# A killed driver


class Crash(BaseException):
    """The end of a process, in a test that goes on."""


def crash_at(write: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the process ends at its so-many-th write: just before (odd numbers), half-way aside and just after it (even ones)."""
    real, count = cache.store.put, iter(range(10**9))

    def put(path: Path, data: bytes | memoryview) -> None:
        here = next(count)
        if here == write // 2 and write % 2 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0.tmp").write_bytes(bytes(data)[: len(data) // 2])
            raise Crash
        real(path, data)
        if here == write // 2:
            raise Crash

    monkeypatch.setattr(cache.store, "put", put)


def test_a_capture_that_ends_at_any_of_its_writes_goes_on_from_there(inputs, tmp_path, monkeypatch):
    def capture(store: Path) -> int:
        return main(cache_arguments(inputs, store, "--no-ray", dataset="few", sites=("encoder.blocks.0", "decoder.blocks.0")))

    reference, finished, write = tmp_path / "reference.zarr", False, 0
    assert capture(reference) == 0
    while not finished:
        store = tmp_path / f"{write}.zarr"
        with monkeypatch.context() as patch:
            crash_at(write, patch)
            with suppress(Crash):
                finished = capture(store) == 0
        kept = committed_files(store)
        assert capture(store) == 0
        assert kept.items() <= committed_files(store).items()
        if (store / "zarr.json").exists():
            assert ActivationStore.open(store).repair() == []  # sweeps up what was being written
        hold_to(store, reference)
        write += 1
    assert write > 2 * 2 * 2 * 2  # before and after object and record of two shards of two sites


def committed_files(store: Path) -> dict[str, tuple[int, int]]:
    """Each committed object and its record -> what changes if it is written again."""
    found = {}
    for record in sorted(store.glob("commits/*/*.json")):
        for file in (record, store / record.parent.name / "c" / str(int(record.stem)) / "0"):
            found[str(file.relative_to(store))] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


def kill_the_driver(inputs: str, out: str, how: list[str], kills: int, seed: int) -> dict[str, object]:
    """Starts the capture, kills it at a random moment, and so on, until it gets through; how it went."""
    random.seed(seed)
    store, rewritten, grew = Path(out), [], []
    while True:
        before = committed_files(store)
        process = subprocess.Popen(hearsae(*cache_arguments(inputs, out, *how)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if len(grew) < kills:
            # Of the kills, some come while it starts and plans, the others once it has committed something more: so it gets on, and not to the end.
            wanted = len(before) + random.randint(1, 2 * 3 * CLIPS // (kills + 2)) if len(grew) % 3 else 0
            while process.poll() is None and len(committed_files(store)) < wanted:
                time.sleep(0.001)
            if not wanted:
                time.sleep(random.uniform(0, 1.5))
            process.kill()
        said, complained = process.communicate()
        after = committed_files(store)
        rewritten += [name for name, stamp in before.items() if after.get(name) != stamp]
        if process.returncode != -signal.SIGKILL:
            return {"status": process.returncode, "out": said, "err": complained, "rewritten": rewritten, "grew": grew}
        grew.append(len(after) - len(before))


@pytest.mark.parametrize(
    ("how", "kills"),
    [
        pytest.param(("--no-ray",), 5, id="in-process"),
        pytest.param(("--workers", "2"), 6, id="ray", marks=[pytest.mark.cluster, pytest.mark.slow]),
    ],
)
@pytest.mark.slow
def test_a_driver_killed_at_random_moments_and_started_again_makes_the_same_store_and_nothing_twice(inputs, undisturbed, tmp_path, how, kills):
    seen = netns.call(kill_the_driver, inputs, tmp_path / "acts.zarr", how, kills, 0, timeout=400)
    assert seen["status"] == 0, seen["err"]
    assert len(seen["grew"]) == kills and sum(count > 0 for count in seen["grew"]) >= kills // 2
    assert seen["rewritten"] == []
    assert 0 < json.loads(seen["out"])["shards_computed"] < CLIPS
    assert ActivationStore.open(tmp_path / "acts.zarr").repair() == []
    verified(tmp_path / "acts.zarr")
    hold_to(tmp_path / "acts.zarr", undisturbed)


# Flipped bytes


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def small_store(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small") / "acts.zarr"
    assert main(cache_arguments(inputs, out, "--no-ray", dataset="few")) == 0
    return out


FILES = {
    "zarr.json": "zarr.json",
    "header.json": "header.json",
    "clips.parquet": "clips.parquet",
    "skipped.parquet": "skipped.parquet",
    "encoder.blocks.0/zarr.json": "encoder.blocks.0/zarr.json",
    "encoder.blocks.0/c/1/0": "encoder.blocks.0 shard 1",
    "commits/decoder.blocks.1/000001.json": "decoder.blocks.1 shard 1",
}
"""A file of each kind, and how `verify` names it."""


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_anywhere_is_named_and_repair_and_cache_restore_it(inputs, small_store, tmp_path, capsys, file):
    length = (small_store / file).stat().st_size
    for at in sorted(
        {0, length - 20, length - 9, length - 1, *random.Random(file).sample(range(length), 5)}
    ):  # an object's index is its last 20 bytes
        store = tmp_path / f"{at}.zarr"
        shutil.copytree(small_store, store)
        flip(store / file, at)
        assert main(["verify", str(store)]) == 1
        out, err = capsys.readouterr()
        assert out.startswith(f"{FILES[file]}: ") and out.count("\n") == 1, f"byte {at}: {out}{err}"
        assert main(["repair", str(store)]) == 0
        assert FILES[file] in capsys.readouterr().out
        assert main(cache_arguments(inputs, store, "--no-ray", dataset="few")) == 0
        assert main(["verify", str(store)]) == 0
        capsys.readouterr()
        hold_to(store, small_store)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_gone_is_named_and_made_again(inputs, small_store, tmp_path, capsys, file):
    store = tmp_path / "acts.zarr"
    shutil.copytree(small_store, store)
    (store / file).unlink()
    if not file.startswith("commits/"):  # without a record there is nothing to be missed
        assert main(["verify", str(store)]) == 1
        assert capsys.readouterr().out.startswith(f"{FILES[file]}: ")
        assert main(["repair", str(store)]) == 0
    assert main(cache_arguments(inputs, store, "--no-ray", dataset="few")) == 0
    hold_to(store, small_store)


# Two drivers


def start_two(inputs: str, out: str, how: list[str], apart: bool) -> list[tuple[int, str, str]]:
    """Two drivers at once; or the second while the first, which has committed something, is held until the second has begun."""

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(hearsae(*cache_arguments(inputs, out, *how)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    drivers = [start()]
    if apart:
        while drivers[0].poll() is None and not committed_files(Path(out)):
            time.sleep(0.001)
        drivers[0].send_signal(signal.SIGSTOP)
    drivers.append(start())
    if apart:
        while drivers[1].poll() is None and len(list(Path(out).glob("runs/*.json"))) < 2:
            time.sleep(0.001)
        drivers[0].send_signal(signal.SIGCONT)
    said = [driver.communicate() for driver in drivers]
    return [(driver.returncode, *texts) for driver, texts in zip(drivers, said, strict=True)]


@pytest.mark.parametrize(
    ("how", "apart"),
    [
        pytest.param(("--no-ray",), False, id="in-process-at-once"),
        pytest.param(("--no-ray",), True, id="in-process-apart"),
        pytest.param(("--workers", "1"), True, id="ray", marks=[pytest.mark.cluster, pytest.mark.slow]),
    ],
)
@pytest.mark.slow
def test_two_drivers_on_one_store_do_no_harm(inputs, undisturbed, tmp_path, how, apart):
    first, second = netns.call(start_two, inputs, tmp_path / "acts.zarr", how, apart, timeout=240)
    for status, out, err in (first, second):
        assert status == 0, err
        assert json.loads(out)["clips"] == CLIPS
    if apart:
        assert "hearsae: this store is being captured by process" in second[2]
        # They meet once. Two that start at the same moment may not see each other, and then do the same work side by side.
        assert json.loads(first[1])["shards_computed"] + json.loads(second[1])["shards_computed"] < CLIPS + 10
    verified(tmp_path / "acts.zarr")
    hold_to(tmp_path / "acts.zarr", undisturbed)
