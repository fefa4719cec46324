"""Shared parts: real stores with made-up rows, micro's speech, and the optional assets (real speech, real Whisper weights)."""

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from s3_server import S3, running_s3
from whisper.model import AudioEncoder, ModelDimensions, Whisper

from cache import micro
from cache.header import Header
from cache.plan import Plan, SourceItem, make_plan
from cache.sites import Site
from cache.store import ActivationStore, Skip
from cluster.cli import main

ASSETS = Path(os.environ.get("HEARSAE_ASSETS", Path(__file__).parents[1].parent / "shared" / "assets"))


def asset(name: str) -> Path:
    """A file or folder of the optional assets; skips the test where they are not there."""
    path = ASSETS / name
    if not path.exists():
        pytest.skip(f"needs {name} of the assets (set HEARSAE_ASSETS)")
    return path


def micro_audio(count: int, split: str = "test") -> list[np.ndarray]:
    """The first clips of micro's speech: float32 at 16 kHz."""
    return [soundfile.read(file, dtype="float32")[0] for file in sorted((micro.SPEECH / split).glob("*.flac"))[:count]]


def nearly(value: Any) -> Any:
    """JSON to compare with `==`, whose numbers need not be the same to the last digit: products round differently with other threads."""
    if isinstance(value, dict):
        return {name: nearly(one) for name, one in value.items()}
    if isinstance(value, list):
        return [nearly(one) for one in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value


def plan_of(seconds: list[float], **settings) -> Plan:
    """A plan of sources of these durations, `s0.wav`, `s1.wav`, ... with texts `words of s0`, ... by speakers a, b, c in turn."""
    items = [SourceItem(f"s{i}.wav", 0, round(s * 16000), text=f"words of s{i}", speaker="abc"[i % 3]) for i, s in enumerate(seconds)]
    return make_plan(items, **settings)


def fill_store(
    path: Path,
    plan: Plan,
    widths: dict[str, int],
    rows_of: Callable[[str, int, int], np.ndarray],
    skip: dict[int, str] | None = None,
    dtype: str = "float16",
    shards: list[int] | None = None,
) -> ActivationStore:
    """A real store whose rows are `rows_of(site, clip, n) -> [n, width]`; `skip` names clips to leave out, `shards` those to commit."""
    sites = [Site(name, "token" if name.startswith("decoder.") else "frame", width, i) for i, (name, width) in enumerate(widths.items())]
    model = {"name": "made-up", "sha256": "0" * 64, "dims": {"n_vocab": 51864}, "has_decoder": True}
    header = Header(model=model, dataset={}, axes=plan.axes, plan=plan.summary(), dtype=dtype)
    store = ActivationStore.create(path, header, plan, sites)
    for shard, missing in store.pending(widths).items():
        if shards is not None and shard not in shards:
            continue
        for site in missing:
            axis = store.axis(site)
            rows = np.zeros((axis.shard_rows, widths[site]), dtype)
            skips = [Skip(clip, skip[clip]) for clip in store.shard_clips(shard) if skip and clip in skip]
            for clip in store.shard_clips(shard):
                span = store.planned_span(store.sites[site]["axis"], clip)
                if not (skip and clip in skip) and span.stop > span.start:
                    first = span.start - shard * axis.shard_rows
                    rows[first : first + span.stop - span.start] = rows_of(site, clip, span.stop - span.start)
            store.write_shard(site, shard, rows, skips, {})
    return ActivationStore.open(path)


@pytest.fixture(scope="session")
def tiny_whisper() -> Callable[..., Path]:
    """`tiny_whisper(path, encoder_only=False, seed=0, **dims) -> path`: writes a small Whisper of random weights in openai-whisper's format."""
    return write_tiny_whisper


def write_tiny_whisper(path: Path, encoder_only: bool = False, seed: int = 0, **dims: int) -> Path:
    """The English-only Whisper that the fixture `tiny_whisper` writes, 2 + 2 blocks of width 32. dims: fields of ModelDimensions to change."""
    small = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 32, "n_audio_head": 2, "n_audio_layer": 2}
    small |= {"n_vocab": 51864, "n_text_ctx": 64, "n_text_state": 32, "n_text_head": 2, "n_text_layer": 2}
    full = ModelDimensions(**small | dims)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if encoder_only:
            encoder = AudioEncoder(full.n_mels, full.n_audio_ctx, full.n_audio_state, full.n_audio_head, full.n_audio_layer)
            weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        else:
            model = Whisper(full)
            torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)  # the only one that Whisper leaves as memory had it
            weights = model.state_dict()
    data = io.BytesIO()  # written to a path, the file's bytes would depend on its name
    torch.save({"dims": vars(full), "model_state_dict": weights}, data)
    path.write_bytes(data.getvalue())
    return path


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Runs a command that must fail with one line on stderr and nothing on stdout; returns the line."""

    def run(*arguments: Any) -> str:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert (status, out) == (1, ""), (status, out, err)
        assert err.startswith("hearsae: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return run


@pytest.fixture
def succeeds(capfd) -> Callable[..., Any]:
    """Runs a command with --json that must succeed, with one JSON object on stdout and nothing else anywhere; returns the object."""

    def run(*arguments: Any) -> Any:
        capfd.readouterr()
        status = main([*map(str, arguments), "--json"])
        out, err = capfd.readouterr()
        assert (status, err) == (0, ""), (status, out, err)
        return json.loads(out)

    return run


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3]:
    with running_s3() as server:
        yield server


_buckets = itertools.count()


@pytest.fixture
def s3(_s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An S3 server on loopback that this process's environment names, and no other; `s3.bucket` is a new bucket."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR"))]:
        monkeypatch.delenv(name)
    for name, value in _s3_server.environment.items():
        monkeypatch.setenv(name, value)
    _s3_server.bucket = f"bucket{next(_buckets)}"
    _s3_server.make_bucket(_s3_server.bucket)
    _s3_server.forget()
    return _s3_server
