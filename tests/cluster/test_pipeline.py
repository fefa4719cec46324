"""The pipeline's parts: how many workers, audio that is decoded elsewhere, shards that kill, merges as a tree, metrics, following."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import netns
import numpy as np
import pytest
import soundfile
from conftest import fill_store, plan_of, write_tiny_whisper
from ray import cloudpickle
from test_ray import cache_command, contents, descendants, hold_to, inputs, ray_of_two, scan_command, without_ray  # noqa: F401 - fixtures

from cache.capture import CaptureConfig, ShardAudio, pack_audio, prepare, unpack_audio
from cache.errors import HearsaeError, SourceError, StoreError
from cache.store import ActivationStore
from cluster.cli import main
from cluster.pipeline import ATTEMPTS, Pool, PoolOptions, capture_shards
from cluster.shards import FAN_IN, reduce_shards
from cluster.workers import WorkerOptions, session

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import the tests
SITE = "encoder.blocks.1.mlp.1"
TWO = WorkerOptions(workers=2)


# How many workers


@pytest.mark.parametrize(
    ("options", "resources", "tasks", "uses_gpu", "expected"),
    [
        (PoolOptions(), {"CPU": 2}, 100, False, Pool(2, 2, 1, 0, 0)),
        (PoolOptions(), {"CPU": 2}, 1, False, Pool(1, 1, 1, 0, 0)),
        (PoolOptions(), {"CPU": 1}, 100, True, Pool(1, 1, 1, 0, 0)),
        (PoolOptions(workers=8), {"CPU": 2}, 100, False, Pool(2, 8, 1, 0, 0)),  # as many as fit; more as the cluster grows
        (PoolOptions(workers=8, min_workers=5), {"CPU": 2}, 100, False, Pool(5, 8, 1, 0, 0)),
        (PoolOptions(min_workers=1), {"CPU": 64}, 1000, False, Pool(1, 64, 1, 0, 0)),
        (PoolOptions(cpus_per_worker=4), {"CPU": 16}, 100, False, Pool(4, 4, 4, 0, 0)),
        (PoolOptions(), {}, 100, False, Pool(1, 1, 1, 0, 0)),  # a head without cores, whose workers are still to come
        (PoolOptions(), {"CPU": 16, "GPU": 4}, 100, True, Pool(4, 4, 1, 1, 12)),  # the cores that are left decode
        (PoolOptions(), {"CPU": 16, "GPU": 4}, 100, False, Pool(16, 16, 1, 0, 0)),
        (PoolOptions(gpus_per_worker=0.5), {"CPU": 16, "GPU": 4}, 100, True, Pool(8, 8, 1, 0.5, 8)),
        (PoolOptions(), {"CPU": 1, "GPU": 1}, 100, True, Pool(1, 1, 1, 1, 0)),  # no core is left: the worker decodes
        (PoolOptions(decoders=2), {"CPU": 16, "GPU": 4}, 100, True, Pool(4, 4, 1, 1, 2)),
        (PoolOptions(decoders=0), {"CPU": 16, "GPU": 4}, 100, True, Pool(4, 4, 1, 1, 0)),
        (PoolOptions(workers=1, decoders=1), {"CPU": 2}, 100, False, Pool(1, 1, 1, 0, 1)),
    ],
)
def test_the_pool_fits_the_cluster(options, resources, tasks, uses_gpu, expected):
    assert options.pool(resources, tasks, uses_gpu) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (PoolOptions(workers=0), "--workers 0 must be at least 1"),
        (PoolOptions(min_workers=0), "--min-workers 0 must be at least 1"),
        (PoolOptions(cpus_per_worker=0), "--cpus-per-worker 0 must be at least 1"),
        (PoolOptions(decoders=-1), "--decoders -1 is negative"),
        (PoolOptions(workers=2, min_workers=3), "--min-workers 3 is more than --workers 2"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(HearsaeError, match=said):
        options.check()


def test_a_pool_that_cannot_work_is_refused():
    with pytest.raises(HearsaeError, match="no GPU on this cluster for --gpus-per-worker 1"):
        PoolOptions(gpus_per_worker=1).pool({"CPU": 4}, 10)
    with pytest.raises(HearsaeError, match="--decoders 2: the workers hold all 2 cores"):
        PoolOptions(decoders=2).pool({"CPU": 2}, 10)


# Audio on its way


def pcm(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**15), 2**15, n).astype(np.float32) / 2**15


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.0, np.int16), (0.9, np.float32), (2.0, np.float32), (0.0, np.int16)],  # 0.9: not the steps of 16 bits; 2: beyond full scale
)
def test_audio_comes_out_as_it_went_in(scale, dtype):
    clips = [(7, pcm(500, 0) * scale), (8, SourceError("no sound")), (9, pcm(1, 1) * scale), (10, pcm(320, 2) * scale)]
    audio = pack_audio(3, clips)
    assert (audio.shard, audio.samples.dtype, audio.lengths) == (3, dtype, (500, -1, 1, 320))
    out = list(unpack_audio(audio, first_clip=7))
    assert [clip for clip, _ in out] == [7, 8, 9, 10]
    for (_, sent), (_, got) in zip(clips, out, strict=True):
        if isinstance(sent, SourceError):
            assert isinstance(got, SourceError) and str(got) == "no sound"
        else:
            assert got.dtype == np.float32 and np.array_equal(got, sent)


def test_a_shard_without_a_readable_clip_travels_too():
    audio = pack_audio(0, [(0, SourceError("a")), (1, SourceError("b"))])
    assert [str(error) for _, error in unpack_audio(audio, 0)] == ["a", "b"]
    assert isinstance(audio, ShardAudio) and len(audio.samples) == 0


@pytest.mark.cluster
@pytest.mark.slow
def test_audio_decoded_by_tasks_gives_the_same_store(inputs, without_ray, tmp_path):  # noqa: F811
    code = "import sys, cluster.cli; sys.exit(cluster.cli.main())"
    arguments = cache_command(inputs, tmp_path / "acts.zarr", "--workers", "1", "--decoders", "1")
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=out, stderr=err)
        seen: set[str] = set()
        while process.poll() is None:
            seen |= {command for command in descendants(process.pid).values() if command.startswith("ray::")}
            time.sleep(0.003)
    assert process.returncode == 0, (tmp_path / "err").read_text()
    assert any("_Decode" in command and "_CaptureActor" not in command for command in seen), seen
    hold_to(tmp_path / "acts.zarr", without_ray)


# Shards that kill


class Deadly(CaptureConfig):
    """Ends the process in which a `cache.capture.Worker` asks it for anything."""

    def __getattribute__(self, name):
        caller = sys._getframe(1)
        if caller.f_globals["__name__"] == "cache.capture" and caller.f_code.co_name == "__init__":
            os._exit(1)
        return super().__getattribute__(name)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_shard_that_kills_every_worker_is_given_up(inputs, tmp_path):  # noqa: F811
    config = Deadly(str(inputs / "clips"), str(inputs / "tiny.pt"), ("encoder.blocks.0",), tmp_path / "acts.zarr", chunk_rows=64, device="cpu")
    prepared = prepare(config)
    with session(WorkerOptions(workers=1)), pytest.raises(HearsaeError, match=f"a worker died {ATTEMPTS} times on shard 0 "):
        list(capture_shards(config, [0], PoolOptions(workers=1)))
    assert prepared.store.committed("encoder.blocks.0") == []


# Merges as a tree


def one(shard: int) -> dict[int, int]:
    return {shard: 1}


def together(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}


def refuse_five(shard: int) -> dict[int, int]:
    if shard == 5:
        raise HearsaeError("shard 5 is bad")
    return one(shard)


def refuse_merge(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
    raise HearsaeError("these can't be merged")


@pytest.mark.parametrize("options", [WorkerOptions(no_ray=True), pytest.param(TWO, marks=pytest.mark.cluster)])
@pytest.mark.parametrize("count", [0, 1, 2, FAN_IN, FAN_IN**2 + FAN_IN + 3])
def test_every_shard_is_merged_once(request, options, count):
    if not options.no_ray:
        request.getfixturevalue("ray_of_two")
    seen = []
    merged = reduce_shards(one, together, range(count), options, seen.append)
    assert (merged or {}) == dict.fromkeys(range(count), 1)
    assert sum(seen) == count


@pytest.mark.cluster
def test_errors_of_shards_and_merges_are_raised(ray_of_two):  # noqa: F811
    for options in (TWO, WorkerOptions(no_ray=True)):
        with pytest.raises(HearsaeError, match="shard 5 is bad"):
            reduce_shards(refuse_five, together, range(9), options)
        with pytest.raises(HearsaeError, match="these can't be merged"):
            reduce_shards(refuse_five, refuse_merge, range(4), options)


def kill(shard: int) -> dict[int, int]:
    os._exit(1)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_shard_that_kills_every_scanning_worker_is_given_up(ray_of_two):  # noqa: F811
    with pytest.raises(HearsaeError, match=r"a worker died \d times on the same shard"):
        reduce_shards(kill, together, [0], TWO)


# Following a store that is being written


def growing(path: Path, order: list[int], pause: float) -> threading.Thread:
    """Commits the shards of a small store in this order, one at a time, from a thread."""
    plan = plan_of([1.0] * 24, chunk_rows=64, shard_rows=256)
    assert plan.axes["frame"].shards == len(order)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((24, 50, 8)).astype(np.float16)

    def rows_of(site: str, clip: int, n: int) -> np.ndarray:
        return rows[clip, :n]

    fill_store(path, plan, {SITE: 8}, rows_of, shards=[])

    def write() -> None:
        for shard in order:
            time.sleep(pause)
            fill_store(path, plan, {SITE: 8}, rows_of, shards=[shard])

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 1, 0, 3, 2]])
def test_a_scan_that_follows_gives_the_bytes_of_one_that_waited(tmp_path, capsys, order):
    thread = growing(tmp_path / "acts.zarr", order, pause=0.3)
    assert main(scan_command(tmp_path / "acts.zarr", f"neurons:{SITE}", tmp_path / "live", "--no-ray", "--follow")) == 0
    thread.join()
    assert main(scan_command(tmp_path / "acts.zarr", f"neurons:{SITE}", tmp_path / "after", "--no-ray")) == 0
    live, after = map(json.loads, capsys.readouterr().out.splitlines())
    assert live["rows"] == after["rows"] == 24 * 50
    assert contents(tmp_path / "live") == contents(tmp_path / "after")


def test_a_follower_waits_for_the_store_too(tmp_path):
    made = threading.Thread(target=lambda: (time.sleep(1), growing(tmp_path / "acts.zarr", [0, 1, 2, 3, 4], pause=0).join()))
    made.start()
    assert main(scan_command(tmp_path / "acts.zarr", f"neurons:{SITE}", tmp_path / "live", "--no-ray", "--follow")) == 0
    made.join()
    assert main(scan_command(tmp_path / "none.zarr", f"neurons:{SITE}", tmp_path / "none", "--no-ray", "--follow", "--follow-timeout", "0.3")) == 1


def test_a_follower_gives_up_where_nothing_comes(tmp_path, capsys):
    growing(tmp_path / "acts.zarr", [0, 1, 2, 3, 4], pause=0).join()
    ActivationStore.open(tmp_path / "acts.zarr").record_path(SITE, 3).unlink()
    what = scan_command(tmp_path / "acts.zarr", f"neurons:{SITE}", tmp_path / "scan", "--no-ray", "--follow", "--follow-timeout", "0.5")
    assert main(what) == 1
    said = capsys.readouterr().err
    assert f"no new shard of {SITE} for 0.5 s (4 of 5 are there, shard 3 is not): is 'hearsae cache' still running?" in said
    assert said.count("\n") == 1
    with pytest.raises(StoreError, match="no new shard"):
        list(ActivationStore.open(tmp_path / "acts.zarr").arriving(SITE, patience=0.1))


def test_a_basis_that_needs_all_rows_does_not_follow(tmp_path, capsys):
    growing(tmp_path / "acts.zarr", [0, 1, 2, 3, 4], pause=0).join()
    store = ActivationStore.open(tmp_path / "acts.zarr")
    command = scan_command(store.path, f"random:{SITE}", tmp_path / "scan", "--no-ray", "--follow")
    record = store.record_path(SITE, 3).read_bytes()
    store.record_path(SITE, 3).unlink()
    assert main(command) == 1
    assert "follows from all rows" in capsys.readouterr().err
    store.record_path(SITE, 3).write_bytes(record)
    assert main(command) == 0


# A cluster that grows


def capture_workers() -> list[int]:
    """The processes of the capture workers."""
    return [process for process, command in descendants(1).items() if command.startswith("ray::MapWorker")]


def captured_while_it_grows(out: str) -> dict[str, int]:
    """How many capture workers there were before a node of two cores joined and after; the first one stands still until they are there."""
    config = CaptureConfig("micro", "micro", ("encoder.blocks.2",), Path(out), split="train", chunk_rows=64, shard_rows=384, device="cpu")
    pending = list(prepare(config).pending)
    seen = {"shards": 0, "before": 0, "after": 0}

    def watch(first: list[int]) -> None:
        deadline = time.monotonic() + 180
        while seen["after"] < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
            seen["after"] = max(seen["after"], len(capture_workers()))
        for worker in first:
            os.kill(worker, signal.SIGCONT)

    with netns.cluster(1, cpus=1) as cluster:
        for _ in capture_shards(config, pending, PoolOptions(address=cluster.address, workers=3)):
            seen["shards"] += 1
            if seen["shards"] == 3:
                first = capture_workers()
                seen["before"] = len(first)
                for worker in first:
                    os.kill(worker, signal.SIGSTOP)  # or it might be done with everything before another has started
                cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
                threading.Thread(target=watch, args=(first,)).start()
    assert seen["shards"] == len(pending)
    return seen


@pytest.mark.slow
@pytest.mark.cluster
def test_the_pool_grows_with_the_cluster(tmp_path):
    seen = netns.call(captured_while_it_grows, tmp_path / "acts.zarr", timeout=300)
    assert (seen["before"], seen["after"]) == (1, 3)
    assert ActivationStore.open(tmp_path / "acts.zarr").verify() == (seen["shards"], [])


# Metrics


def captured_with_metrics(folder: str) -> dict[str, float]:
    """What Ray's endpoint for Prometheus says of a run, summed over workers."""
    from cluster.workers import import_ray

    with session(TWO):
        ray = import_ray()
        os.chdir(folder)  # workers are elsewhere: relative paths must reach them all the same
        assert main(cache_command(Path(), Path("acts.zarr"), "--workers", "2")) == 0
        assert main(scan_command(Path("acts.zarr"), f"neurons:{SITE}", Path("scan"), "--workers", "2")) == 0
        port = ray.nodes()[0]["MetricsExportPort"]
        for _ in range(60):
            time.sleep(1)
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                continue
            found: dict[str, float] = {}
            for line in text.splitlines():
                if line.startswith("ray_hearsae_"):
                    name = line.split("{")[0].removeprefix("ray_hearsae_")
                    name += ":" + line.split('stage="')[1].split('"')[0] if 'stage="' in line else ""
                    found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
            if found.get("clips_total") == 24:
                return found
    return {}


@pytest.mark.cluster
@pytest.mark.slow
def test_ray_exports_what_was_captured(tmp_path):
    write_tiny_whisper(tmp_path / "tiny.pt", n_audio_ctx=200)
    (tmp_path / "clips").mkdir()
    for i in range(24):
        soundfile.write(tmp_path / "clips" / f"{i:02d}.wav", 0.1 * np.sin(np.arange(16000) * (i + 1) / 50), 16000)
    soundfile.write(tmp_path / "clips" / "nan.wav", np.full(9000, np.nan, np.float32), 16000, subtype="FLOAT")
    (tmp_path / "clips" / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{i:02d}.wav", "text": "a"}) for i in range(24)))
    found = netns.call(captured_with_metrics, tmp_path, timeout=240)
    store = ActivationStore.open(tmp_path / "acts.zarr")
    records = [store.record(site, shard) for site in store.sites for shard in store.committed(site)]
    assert found["clips_total"] == 24 and found["frames_total"] == 24 * 50 and found["skipped_clips_total"] == 1
    assert found["bytes_written_total"] == sum(record.object_bytes for record in records)
    assert {name for name in found if ":" in name} == {f"stage_seconds_total:{stage}" for stage in ("decode", "compute", "write", "wait")}
