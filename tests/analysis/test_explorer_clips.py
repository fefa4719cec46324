"""What the static page holds of whole clips: their strongest features over time, their words and phones."""

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_explorer import CLICK_FRAME, HOSTILE_NAME, HOSTILE_TEXT, make_world, registered

from analysis.explorer.clip_pages import STRIPS, said_in
from analysis.explorer.export import export
from analysis.explorer.reuse import is_current, made_from, remember
from analysis.features import open_features
from analysis.scan_folder import Scan
from cache.location import location
from cache.store import ActivationStore
from cache.timings import INTERVALS, UNALIGNED, write_timings

HOSTILE_WORD = "<img src=x onerror=\"document.title='owned'\">\u2028"
HOSTILE_PHONE = "</script><script>document.title='owned'</script>"
PEAK_PHONE = "K"
"""Spoken at the click."""


def add_timings(store: ActivationStore) -> None:
    """Three words of clip 0 and four phones, one of them at the click; hostile ones in clip 1; none in the others."""
    clip_0, clip_1 = store.clips["start_s"].to_pylist()[:2]
    words = [(0, 0.2, 1.0, "plain"), (0, 1.0, 1.5, "words"), (0, 2.6, 2.9, "late"), (1, 1.0, 1.6, HOSTILE_WORD)]
    phones = [(0, 0.2, 0.6, "P"), (0, 0.6, 1.25, "L"), (0, 1.25, 1.35, PEAK_PHONE), (0, 1.35, 1.5, "SIL"), (1, 1.2, 1.4, HOSTILE_PHONE)]

    def table(rows: list[tuple[int, float, float, str]]) -> pa.Table:
        shifted = [(clip, start + (clip_0, clip_1)[clip], end + (clip_0, clip_1)[clip], label) for clip, start, end, label in rows]
        return pa.Table.from_pylist([dict(zip(INTERVALS.names, row, strict=True)) for row in shifted], INTERVALS)

    unaligned = pa.Table.from_pylist([{"clip": 2, "reason": "no text"}], UNALIGNED)
    write_timings(store, table(words), table(phones), unaligned, {"method": "jsonl", "phone_set": "other"})


def make_said_world(root: Path) -> Path:
    """The world of test_explorer whose store has timings, and its page."""
    world = make_world(root)
    add_timings(ActivationStore.open(world / "acts.zarr"))
    export([world / "neurons", world / "latents", world / "tokens"], world / "page")
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_said_world(tmp_path_factory.mktemp("clips") / "world")


def strips_of(page: Path, scan: str, clip: int) -> tuple[dict[str, Any], np.ndarray]:
    """A clip's data and its values [features, frames]; the twin of what clip.js unpacks."""
    found = registered(page, f"{scan}/clip/{clip}")
    levels = np.frombuffer(zlib.decompress(base64.b64decode(found["levels"])), np.uint8).reshape(len(found["feature"]), found["frames"])
    lo, hi = (np.array(found[name])[:, None] for name in ("lo", "hi"))
    return found, lo + (hi - lo) * levels / 255


def said_of(page: Path, tier: str, clip: int) -> list[tuple[str, int, int]]:
    """Label, start and end in ms; the twin of what tiers.js unpacks."""
    said = registered(page, "clips")["said"]
    n, clips = said[tier]["count"], len(registered(page, "clips")["source"])
    raw = np.frombuffer(zlib.decompress(base64.b64decode(said[tier]["columns"])), "<u4")
    first, (later, length, label) = raw[: clips + 1], raw[clips + 1 :].reshape(3, n)
    start = np.cumsum(later, dtype=np.uint32)
    end = start + length
    return [(said["labels"][label[i]], int(start[i]), int(end[i])) for i in range(first[clip], first[clip + 1])]


@pytest.mark.parametrize(("scan", "folder"), [("scan0", "neurons"), ("scan1", "latents")])
def test_clip_page_holds_the_strongest_features_with_the_values_that_the_store_gives(world: Path, scan: str, folder: str) -> None:
    scanned, store = Scan.open(world / folder), ActivationStore.open(world / "acts.zarr")
    features = open_features(scanned.info["features"], store)
    mean, std = (scanned.features[name].to_numpy() for name in ("mean", "std"))
    shown = np.unique(pq.read_table(world / folder / "examples.parquet")["clip"].to_numpy())
    assert len(list((world / "page" / "data" / scan / "clip").iterdir())) == len(shown)
    for clip in shown.tolist():
        values = features.dense(store.read_clip(features.site, clip))
        found, strips = strips_of(world / "page", scan, clip)
        peak = values.max(axis=0)
        z = np.where((peak > 0) & (std > 0), (peak - mean) / np.where(std > 0, std, 1), -np.inf)
        assert found["feature"] == np.argsort(-z, kind="stable")[: min(STRIPS, np.isfinite(z).sum())].tolist()
        assert found["z"] == pytest.approx(z[found["feature"]], rel=1e-3)
        expected = values[:, found["feature"]].T
        quantum = np.ptp(expected, axis=1, keepdims=True) / 255
        assert (np.abs(strips - expected) <= 0.51 * quantum + 1e-5).all()
        assert found["peak"] == expected.argmax(axis=1).tolist()
    assert strips_of(world / "page", "scan0", 0)[0]["peak"][strips_of(world / "page", "scan0", 0)[0]["feature"].index(0)] == CLICK_FRAME


def test_clip_page_names_only_features_that_the_page_holds(world: Path, tmp_path: Path) -> None:
    export([world / "neurons"], tmp_path / "page", features="3-5,39", audio="none")
    found, strips = strips_of(tmp_path / "page", "scan0", 0)
    assert set(found["feature"]) == {3, 4, 5}  # 39 is never above zero
    assert strips.shape == (3, 150)


def test_token_scan_has_no_clip_pages(world: Path) -> None:
    assert not (world / "page" / "data" / "scan2" / "clip").exists()


def test_words_and_phones_are_written_once_in_the_clips_own_time(world: Path) -> None:
    page = world / "page"
    assert said_of(page, "words", 0) == [("plain", 200, 1000), ("words", 1000, 1500), ("late", 2600, 2900)]
    assert said_of(page, "phones", 0) == [("P", 200, 600), ("L", 600, 1250), (PEAK_PHONE, 1250, 1350), ("SIL", 1350, 1500)]
    assert said_of(page, "words", 1) == [(HOSTILE_WORD, 1000, 1600)]
    assert said_of(page, "phones", 2) == []


def test_times_are_taken_from_the_clips_start_and_clips_may_be_any_selection() -> None:
    rows = {"clip": [0, 2, 2, 5], "start_s": [0.0, 30.0, 30.5, 9.9], "end_s": [1.0, 30.5, 31.0, 10.25], "label": ["a", "b", "c", "d"]}
    said = said_in(pa.table(rows, INTERVALS), np.array([2, 3, 5]), np.array([30.0, 0.0, 10.0]))
    assert said.first.tolist() == [0, 2, 2, 3]
    assert said.start_ms.tolist() == [0, 500, 0]  # the last begins before its clip
    assert said.end_ms.tolist() == [500, 1000, 250]
    assert said.label == ["b", "c", "d"]


def test_page_of_a_store_without_timings_has_none(world: Path, tmp_path: Path) -> None:
    plain = make_world(tmp_path / "world")
    export([plain / "neurons"], tmp_path / "page", audio="none")
    assert registered(tmp_path / "page", "clips")["said"] is None


def test_page_made_before_the_store_got_timings_is_not_served_again(tmp_path: Path) -> None:
    plain = make_world(tmp_path / "world")
    export([plain / "neurons"], tmp_path / "page", audio="none")
    remember(tmp_path / "page", made_from([location(plain / "neurons")], {}))
    assert is_current(tmp_path / "page", made_from([location(plain / "neurons")], {}))
    add_timings(ActivationStore.open(plain / "acts.zarr"))
    assert not is_current(tmp_path / "page", made_from([location(plain / "neurons")], {}))


def test_no_byte_of_the_clips_data_can_end_a_script(world: Path) -> None:
    text = (world / "page" / "data" / "clips.js").read_bytes()
    assert text.isascii() and b"<" not in text
    assert HOSTILE_TEXT in registered(world / "page", "clips")["text"]
    assert HOSTILE_NAME in registered(world / "page", "clips")["source"]
