"""Object stores: against a real S3 protocol server on loopback, behind a proxy that misbehaves as object stores and networks do."""

import io
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import fill_store, plan_of
from s3_server import FAULTS, S3

from cache import bucket as bucket_module
from cache import micro
from cache.audio import open_source, reopen_source
from cache.errors import HearsaeError, RemoteError, SourceError, StoreError
from cache.location import Location, RemotePath, location, put, reach
from cache.model import load_model
from cache.plan import SkippedSource, SourceItem
from cache.store import ActivationStore
from sae.checkpoint import Checkpoint, State, load_checkpoint, save_checkpoint

SITE, OTHER = "encoder.blocks.0", "encoder.blocks.1.mlp.1"
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")]


def root(s3: S3) -> RemotePath:
    place = location(f"s3://{s3.bucket}/deep/down")
    assert isinstance(place, RemotePath)
    return place


def octets(n: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(n)


def store_at(path: Location, shards: list[int] | None = None, skip: dict[int, str] | None = None) -> ActivationStore:
    plan = plan_of([3.0, 1.5, 2.0, 4.0, 2.5], shard_rows=256, chunk_rows=64)

    def rows(site: str, clip: int, n: int) -> np.ndarray:
        return np.random.default_rng([clip, len(site)]).standard_normal((n, 8 if site == SITE else 24))

    return fill_store(path, plan, {SITE: 8, OTHER: 24}, rows, skip=skip, shards=shards)


# Addresses


def test_an_address_is_a_path_that_data_can_not_leave():
    place = location("s3://bucket//a/b.tar.gz/")
    assert (str(place), place.name, place.stem, place.suffix) == ("s3://bucket/a/b.tar.gz", "b.tar.gz", "b.tar", ".gz")
    assert str(place.parent / "c" / "d/./e") == "s3://bucket/a/c/d/e"
    assert str(place.parent.parent) == "s3://bucket" and location(place) is place
    assert location("some/folder") == Path("some/folder") and location("odd:/name") == Path("odd:/name")
    for name in ("../x", "a/../../x", "/etc/passwd", ".."):
        with pytest.raises(HearsaeError, match="leads out"):
            place / name
    assert str(place / "s3://elsewhere/x") == "s3://bucket/a/b.tar.gz/s3:/elsewhere/x"


@pytest.mark.parametrize("address", ["http://bucket/x", "s3:///x", "s3://", "S4://bucket", "s3://bucket/../x", "s3://us er@bucket/x"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(HearsaeError) as raised:
        location(address)
    assert "\n" not in str(raised.value)


# What can pass is tried again


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_survives_a_store_that_fails_now_and_then(s3, fault, monkeypatch):
    monkeypatch.setattr(bucket_module, "WHOLE_PUT_BYTES", 6 << 20)
    place = root(s3)
    large = octets(15 << 20)
    s3.faults = {fault: 0.3}
    for i in range(4):
        data = octets(200_000, i)
        put(place / f"a b/ä#?%20{i}", data)
        assert (place / f"a b/ä#?%20{i}").read_bytes() == data
        assert (place / f"a b/ä#?%20{i}").stat().st_size == len(data)
    put(place / "large", large)
    assert (place / "large").read_bytes() == large
    with (place / "large").open("rb") as file:
        file.seek(9_000_000)
        assert file.read(1_000_000) == large[9_000_000:10_000_000]
    assert sorted(path.name for path in place.iterdir()) == ["a b", "large"]
    assert [path.name for path in sorted((place / "a b").iterdir())] == [f"ä#?%20{i}" for i in range(4)]
    assert not (place / "nothing").exists() and (place / "a b").is_dir() and not (place / "a b").is_file()
    (place / "large").unlink()
    (place / "large").unlink()
    assert not (place / "large").exists()
    assert s3.injected[fault] >= 2
    assert s3.requests["POST"] >= 2  # the large one went in parts


def test_a_long_listing_goes_on_where_it_broke_off(s3, monkeypatch):
    monkeypatch.setattr(bucket_module, "PAGE_KEYS", 5)
    place = root(s3)
    for i in range(23):
        put(place / f"{i:03d}.json", b"{}")
    put(place.parent / "down-the-road", b"not below it, though its key begins so")
    s3.faults = {"cut": 0.3, "reset": 0.2}
    for _ in range(4):
        assert list(place.store.keys(place.key)) == [f"{place.key}/{i:03d}.json" for i in range(23)]
    assert s3.injected["cut"] and s3.injected["reset"]


def test_files_are_read_where_they_are_read(s3):
    data = octets(3_000_000)
    put(root(s3) / "file", data)
    s3.forget()
    with (root(s3) / "file").open("rb") as file:
        assert file.read(10) == data[:10]
        file.seek(-10, io.SEEK_END)
        assert file.read() == data[-10:]
        file.seek(1_500_000)
        assert file.read(100) == data[1_500_000:1_500_100]
    assert s3.bytes_sent < 1_000_000
    with (root(s3) / "file").open("rb") as file, pytest.raises(RemoteError, match="AccessDenied"):
        s3.refuses = lambda method, path: True
        file.seek(2_000_000)
        file.read(1)
    s3.forget()
    put(root(s3) / "empty", b"")
    with (root(s3) / "empty").open("rb") as file:
        assert file.read() == b""
    with pytest.raises(FileNotFoundError):
        (root(s3) / "missing").open("rb").read()


# What is hopeless is said at once


def one_line(path: str) -> str:
    with pytest.raises(RemoteError) as raised:
        ActivationStore.open(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    return str(raised.value)


def test_wrong_credentials_are_tried_once(s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    monkeypatch.setattr(bucket_module.time, "sleep", lambda seconds: pytest.fail("tried again"))
    assert "refuses (InvalidAccessKeyId: The AWS Access Key Id you provided" in one_line(f"s3://{s3.bucket}/store")
    with pytest.raises(RemoteError, match="refuses"):
        put(root(s3) / "x", b"x")


def test_a_missing_bucket_is_named(s3, monkeypatch):
    monkeypatch.setattr(bucket_module.time, "sleep", lambda seconds: pytest.fail("tried again"))
    assert one_line("s3://no-such-bucket/store") == "there is no bucket s3://no-such-bucket"
    for ask in (
        lambda: put(location("s3://no-such-bucket/x"), b"x"),
        lambda: location("s3://no-such-bucket/x").is_file(),  # of HEAD there is no body that would tell
        lambda: location("s3://no-such-bucket/x").is_dir(),
        lambda: reach(location("s3://no-such-bucket/x")),
        lambda: list(open_source("s3://no-such-bucket/speech").items()),
        lambda: load_model("s3://no-such-bucket/model.pt"),
    ):
        with pytest.raises(RemoteError, match="there is no bucket s3://no-such-bucket"):
            ask()


def test_a_store_that_can_not_be_reached_is_given_up_soon(s3, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        naps: list[float] = []
        monkeypatch.setattr(bucket_module.time, "sleep", naps.append)
        assert f"the object store at http://127.0.0.1:{closed.getsockname()[1]} can't be reached" in one_line("s3://bucket/store")
        assert len(naps) < bucket_module.TRIES_TO_REACH


def test_without_credentials_nobody_is_waited_for(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "there are no credentials for s3://bucket: set AWS_ACCESS_KEY_ID" in one_line("s3://bucket/store")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "there are no credentials for gs://bucket: set GOOGLE_APPLICATION_CREDENTIALS" in one_line("gs://bucket/store")
    assert not s3.log


def test_a_profile_gives_credentials_region_and_endpoint(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {s3.KEY}\naws_secret_access_key = {s3.SECRET}%\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3.url}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    put(root(s3) / "x", b"x")
    assert (root(s3) / "x").read_bytes() == b"x"


def test_gs_addresses_go_the_same_way(s3, monkeypatch):
    """Wiring only: the server is S3's, which answers the few verbs that both have. Nothing here has met Google's."""
    s3.refuses_other_keys = False
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", s3.url)
    store_at(location(f"gs://{s3.bucket}/store"))
    again = ActivationStore.open(f"gs://{s3.bucket}/store")
    assert again.verify() == (2 * again.axis(SITE).shards, [])
    with pytest.raises(RemoteError, match="there is no bucket gs://nosuchbucket"):
        ActivationStore.open("gs://nosuchbucket/store")


# Stores


@pytest.mark.slow
def test_a_store_has_the_same_bytes_as_on_a_disk(s3, tmp_path):
    local = store_at(tmp_path / "store", skip={2: "silent"})
    s3.faults = dict.fromkeys(FAULTS, 0.05)
    remote = store_at(root(s3) / "store", skip={2: "silent"})
    names = sorted(path.relative_to(local.path).as_posix() for path in local.path.rglob("*") if path.is_file())
    assert sorted(key.removeprefix(f"{remote.path.key}/") for key in remote.path.store.keys(remote.path.key)) == names
    for name in names:
        assert (remote.path / name).read_bytes() == (local.path / name).read_bytes(), name
    assert remote.verify() == local.verify() == (2 * local.axis(SITE).shards, [])
    assert remote.skipped(SITE) == {2: "silent"} and remote.committed(SITE, OTHER) == local.committed(SITE, OTHER)
    assert remote.totals(OTHER) == local.totals(OTHER) and remote.pending([SITE]) == {}
    assert np.array_equal(remote.stats(OTHER).mean, local.stats(OTHER).mean)
    for shard in local.committed(SITE):
        assert remote.spans(shard, SITE, OTHER) == local.spans(shard, SITE, OTHER)
        for site in (SITE, OTHER):
            start = shard * 256
            assert np.array_equal(remote.read(site, start + 64, start + 192), local.read(site, start + 64, start + 192))
            assert np.array_equal(remote.read(site, start, start + 256), local.read(site, start, start + 256))
    assert np.array_equal(remote.read_clip(OTHER, 3), local.read_clip(OTHER, 3))
    assert all(s3.injected[fault] for fault in FAULTS)


def test_an_object_comes_before_its_record_and_a_refused_one_gets_none(s3):
    place = root(s3) / "store"
    store_at(place, shards=[0])
    puts = [path for method, path in s3.log if method == "PUT"]
    for site in (SITE, OTHER):
        ours = [path for path in puts if f"{site}/c/0/0" in path or f"commits/{site}/" in path]
        assert [path.rpartition("/")[2] for path in ours] == ["0", "000000.json"]
    s3.refuses = lambda method, path: method == "PUT" and "/c/1/0" in path
    with pytest.raises(RemoteError, match=r"/encoder.blocks.0/c/1/0: the object store refuses \(AccessDenied"):
        store_at(place, shards=[1])
    store = ActivationStore.open(place)
    assert store.committed(SITE) == [0] and not store.is_committed(SITE, 1)
    s3.refuses = lambda method, path: False
    store_at(place)
    assert store.committed(SITE) == list(range(store.axis(SITE).shards)) and store.verify()[1] == []


def test_looking_for_one_record_is_one_request(s3):
    store = store_at(root(s3) / "store", shards=[0])
    s3.forget()
    assert store.is_committed(SITE, 0) and not store.is_committed(SITE, 1)
    assert s3.requests == {"HEAD": 2}


def test_the_index_of_a_shard_is_fetched_once(s3):
    store = store_at(root(s3) / "store")
    first = store.read(SITE, 0, 64)
    s3.forget()
    assert not np.array_equal(store.read(SITE, 64, 128), first)
    store.read(SITE, 128, 192)
    assert s3.requests == {"GET": 2}


def test_records_are_looked_up_ahead_and_kept(s3):
    store = store_at(root(s3) / "store")
    shards = store.committed(SITE, OTHER)
    assert store.clips.num_rows == 5
    store.remember(shards, SITE, OTHER)
    s3.forget()
    assert all(store.spans(shard, SITE, OTHER) for shard in shards)
    store.remember(shards, SITE, OTHER)
    assert not s3.log


def test_a_shard_that_was_written_again_is_read_anew(s3):
    store = store_at(root(s3) / "store")
    rows = store.read(SITE, 0, 64)
    (reader,) = store._readers.values()
    reader._index = reader._index[::-1] + 8  # as if another write had left another index
    assert np.array_equal(store.read(SITE, 0, 64), rows)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "record"])
def test_damage_is_found_named_and_repaired(s3, harm):
    place = root(s3) / "store"
    good = store_at(place)
    before = {key: good.path.store.get(key) for key in good.path.store.keys(place.key)}
    path = good.object_path(SITE, 1)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    if harm == "gone":
        path.unlink()
    elif harm == "record":
        put(good.record_path(SITE, 1), b"{")
    else:
        put(path, bytes(data) if harm == "flip" else bytes(data[:-1]))
    store = ActivationStore.open(place)
    with pytest.raises(StoreError, match=r"shard 1|c/1/0|000001\.json"):
        store.read(SITE, 256, 320)
    _, (bad,) = ActivationStore.open(place).verify()
    assert (bad.site, bad.shard) == (SITE, 1)
    assert ActivationStore.open(place).repair() == [bad]
    assert not store.is_committed(SITE, 1)
    store_at(place)
    assert {key: good.path.store.get(key) for key in good.path.store.keys(place.key)} == before


def test_a_store_that_fails_is_no_damage(s3):
    store = store_at(root(s3) / "store")
    s3.refuses = lambda method, path: True
    for ask in (store.verify, store.repair, lambda: store.read(SITE, 0, 64), lambda: store.committed(SITE)):
        with pytest.raises(RemoteError, match="refuses"):
            ask()


def test_checkpoints_come_back(s3):
    path = root(s3) / "checkpoint.safetensors"
    assert load_checkpoint(path, {"a": 1}) is None
    torch = pytest.importorskip("torch")
    save_checkpoint(path, {"a": 1}, Checkpoint(7, 1.0, 0.5, [State({"x": torch.arange(5.0)}, {"fvu": 0.25})]))
    found = load_checkpoint(path, {"a": 1})
    assert found is not None and found.position == 7 and found.states[0].tensors["x"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(HearsaeError, match="of another run"):
        load_checkpoint(path, {"a": 2})


# Datasets


def wav(seconds: float, rate: int = 16000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * rate)), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def test_an_audio_folder_is_the_same_as_on_a_disk(s3, tmp_path):
    shutil.copytree(micro.SPEECH / "test", tmp_path / "speech" / "test", ignore=lambda _, names: [n for n in names if n.endswith("9.flac")])
    (tmp_path / "speech" / "test" / "broken.wav").write_bytes(b"no audio")
    for path in (tmp_path / "speech").rglob("*"):
        if path.is_file():
            put(root(s3) / "speech" / path.relative_to(tmp_path / "speech").as_posix(), path.read_bytes())
    local, remote = open_source(str(tmp_path / "speech"), "test"), open_source(f"{root(s3)}/speech/", "test")
    s3.faults = dict.fromkeys(FAULTS, 0.03)
    items = list(local.items())
    assert list(remote.items()) == items
    assert sum(s3.injected.values())
    assert any(isinstance(item, SkippedSource) and "broken.wav" in item.source for item in items)
    assert reopen_source(remote.describe()).describe() == remote.describe()
    item = next(item for item in items if isinstance(item, SourceItem))
    assert np.array_equal(remote.read(item.source, 0, 0.25, 8000), local.read(item.source, 0, 0.25, 8000))
    with pytest.raises(SourceError, match="no split 'dev'; it has: test"):
        open_source(f"{root(s3)}/speech", "dev")
    with pytest.raises(SourceError, match="there is no such file"):
        remote.read("test/gone.flac", 0, 0.0, 100)


def test_planning_reads_headers_and_a_clip_reads_its_part(s3):
    put(root(s3) / "speech" / "long.wav", wav(400))
    source = open_source(f"{root(s3)}/speech")
    s3.forget()
    (item,) = source.items()
    assert isinstance(item, SourceItem) and item.n_samples == 400 * 16000
    assert s3.bytes_sent < 150_000 and s3.requests["GET"] == 1
    s3.forget()
    samples = source.read("long.wav", 0, 300.0, 16000)
    assert np.array_equal(samples, soundfile.read(io.BytesIO(wav(400)), start=300 * 16000, frames=16000, dtype="float32")[0])
    assert s3.bytes_sent < 6_000_000  # of 12.8


def test_a_short_clip_is_one_request(s3):
    put(root(s3) / "speech" / "short.wav", wav(5))
    source = open_source(f"{root(s3)}/speech")
    s3.forget()
    source.read("short.wav", 0, 1.0, 16000)
    assert s3.requests == {"GET": 1}


def test_a_store_that_refuses_makes_no_clip_skipped(s3):
    put(root(s3) / "speech" / "a.wav", wav(400))
    source = open_source(f"{root(s3)}/speech")
    s3.refuses = lambda method, path: path.endswith("a.wav")
    with pytest.raises(RemoteError, match="AccessDenied"):
        list(source.items())
    asked = iter([False])  # the first range arrives, further ones do not: libsndfile would take that for the end of the file
    s3.refuses = lambda method, path: next(asked, True)
    with pytest.raises(RemoteError, match="AccessDenied"):
        source.read("a.wav", 0, 300.0, 16000)


def test_names_in_metadata_do_not_lead_out(s3):
    outside = location(f"s3://{s3.bucket}/outside.wav")
    put(outside, wav(1))
    put(root(s3) / "speech" / "in.wav", wav(1))
    names = ["in.wav", "../../outside.wav", f"{outside}", "/outside.wav", "line\nbreak.wav"]
    put(root(s3) / "speech" / "metadata.jsonl", "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names).encode())
    source = open_source(f"{root(s3)}/speech")
    s3.forget()
    items = list(source.items())
    assert [item.source for item in items if isinstance(item, SourceItem)] == ["in.wav"]
    reasons = {item.source: item.reason for item in items if isinstance(item, SkippedSource)}
    assert len(reasons) == 4 and all("leads out" in reasons[name] for name in ("../../outside.wav", "/outside.wav"))
    assert not any("outside" in path for _, path in s3.log)
    with pytest.raises(SourceError, match="leads out"):
        source.read("../../outside.wav", 0, 0.0, 100)


def test_a_manifest_names_relative_absolute_and_remote_files(s3, tmp_path):
    other = location(f"s3://{s3.bucket}/elsewhere/b.wav")
    put(root(s3) / "a.wav", wav(1))
    put(other, wav(2))
    (tmp_path / "c.wav").write_bytes(wav(3))
    lines = [{"audio": name} for name in ("a.wav", str(other), str(tmp_path / "c.wav"), "../up.wav", "s3://", "http://example.org/x.wav")]
    text = "\n".join(map(json.dumps, lines)).encode()
    put(root(s3) / "list.jsonl", text)
    source = open_source(f"{root(s3)}/list.jsonl")
    items = list(source.items())
    assert [item.n_samples for item in items if isinstance(item, SourceItem)] == [16000, 32000, 48000]
    assert [item.source for item in items if isinstance(item, SkippedSource)] == ["../up.wav", "s3://", "http://example.org/x.wav"]
    assert len(source.read(str(other), 1, 0.5, 16000)) == 16000
    assert reopen_source(source.describe()).describe() == source.describe()
    (tmp_path / "list.jsonl").write_bytes(json.dumps({"audio": str(other)}).encode())
    (item,) = open_source(str(tmp_path / "list.jsonl")).items()
    assert isinstance(item, SourceItem) and item.n_samples == 32000


def test_a_parquet_file_of_audio_is_copied_once(s3, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    table = pa.table({"audio": [{"bytes": wav(1), "path": "a.wav"}, {"bytes": wav(2), "path": "b.wav"}], "text": ["one", "two"]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    put(root(s3) / "speech.parquet", memoryview(sink.getvalue()))
    s3.forget()
    for _ in range(2):
        source = open_source(f"{root(s3)}/speech.parquet")
        assert [(item.n_samples, item.text) for item in source.items()] == [(16000, "one"), (32000, "two")]
    assert s3.requests["GET"] == 1
    assert len(source.read("", 1, 1.0, 16000)) == 16000
    with pytest.raises(RemoteError, match="no bucket"):
        open_source("s3://no-such-bucket/speech.parquet")


def test_a_checkpoint_file_is_loaded_from_there(s3):
    put(root(s3) / "model.pt", micro.MODEL.read_bytes())
    s3.faults = {"cut": 0.3}
    loaded = load_model(f"{root(s3)}/model.pt", "cpu")
    assert loaded.sha256 == load_model("micro", "cpu").sha256
    s3.faults = {}
    with pytest.raises(HearsaeError, match=r"there is no checkpoint file at s3://.*/none.pt"):
        load_model(f"{root(s3)}/none.pt")
