"""The static page: what `export` writes, from real stores, scans and sound."""

import base64
import io
import json
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import fill_store

from analysis.explorer.datafiles import histogram, javascript, sparkline
from analysis.explorer.export import KINDS, export, parse_features
from analysis.features import open_features
from analysis.grid import BINS, bin_edges, bin_of
from analysis.scan import ScanOptions, scan
from cache.audio import AudioFolder
from cache.errors import HearsaeError
from cache.header import header_bytes
from cache.plan import make_plan
from cache.store import ActivationStore
from sae.models import Dictionary, SaeConfig

SITE, TOKEN_SITE = "encoder.blocks.0.mlp.1", "decoder.blocks.0.mlp.1"
WIDTH = 40
RATE = 16000
CLICK_S = 1.305
CLICK_FRAME = 65
HOSTILE_TEXT = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u2028 & \"quoted\""
HOSTILE_NAME = "<img src=x onerror=document.title='owned'>.wav"
SOUNDS: dict[str, dict[str, Any]] = {
    "plain.wav": {"text": "plain words", "speaker": "ann"},
    HOSTILE_NAME: {"text": HOSTILE_TEXT, "speaker": "<b onclick=alert(1)>bob</b>"},
    "silent.wav": {},
    "gone.wav": {"text": "this sound is gone"},
}
OPTIONS = ScanOptions(top=3, ranges=4, quantiles=3, per_bin=2)


def make_sounds(folder: Path) -> None:
    """3 s of faint noise each, with a click at CLICK_S."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name in SOUNDS:
        samples = noise.normal(size=3 * RATE) * 0.003
        samples[round(CLICK_S * RATE)] = 0.9
        soundfile.write(folder / name, samples, RATE)
    lines = [json.dumps({"file_name": name} | row) for name, row in SOUNDS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def rows_of(site: str, clip: int, n: int) -> np.ndarray:
    """Feature 0 rises at the click, highest in clip 0; the last one is never active; the others are noise."""
    noise = np.random.default_rng([clip, n])
    rows = noise.normal(size=(n, WIDTH)) ** 3
    rows[:, 0] = (5 - 0.1 * clip) * np.exp(-(((np.arange(n) - CLICK_FRAME) / 3) ** 2))
    rows[:, -1] = -0.1
    return rows


def make_world(root: Path) -> Path:
    """Sounds, a store of them, scans of neurons, SAE latents and token neurons. The sound of one clip is gone afterwards."""
    make_sounds(root / "sounds")
    source = AudioFolder(root / "sounds")
    plan = make_plan(source.items(), tokenize=lambda text, language: list(range(len(text) % 7 + 3)))
    store = fill_store(root / "acts.zarr", plan, {SITE: WIDTH, TOKEN_SITE: WIDTH}, rows_of)
    (store.path / "zarr.json").write_bytes(header_bytes(replace(store.header, dataset=source.describe())))
    store = ActivationStore.open(store.path)
    make_sae(root / "sae")
    for name, spec in {"neurons": f"neurons:{SITE}", "latents": f"sae:{root / 'sae'}", "tokens": f"neurons:{TOKEN_SITE}"}.items():
        scan(store, spec, root / name, OPTIONS)
    (root / "sounds" / "gone.wav").unlink()
    return root


def make_sae(folder: Path) -> None:
    torch.manual_seed(0)
    sae = Dictionary(SaeConfig("topk", WIDTH, 64, k=4, site=SITE, model_sha256="0" * 64))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.normal_()
    sae.save(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("explorer") / "world")


@pytest.fixture(scope="session")
def page(world: Path) -> Path:
    export([world / "neurons", world / "latents", world / "tokens"], world / "page")
    return world / "page"


def registered(page: Path, name: str) -> Any:
    """The value that a data file registers."""
    text = (page / "data" / f"{name}.js").read_text("ascii")
    found, value = json.loads("[" + re.fullmatch(r"hearsae\.register\((.*)\);\n", text, re.S)[1] + "]")  # type: ignore[index]
    assert found == name
    return value


def unpacked(block: dict[str, Any]) -> dict[str, np.ndarray]:
    """The twin of `unpackExamples` in feature.js."""
    raw, n, at = zlib.decompress(base64.b64decode(block["examples"])), block["starts"][-1], 0
    columns = {}
    types = {name: "<f4" for name in ("value", "lo", "hi")} | {"clip": "<u4", "frame": "<u4"}
    for name, dtype in (types | {"first": "<u2", "stop": "<u2", "bin": "<u2", "kind": "u1"}).items():
        columns[name] = np.frombuffer(raw, dtype, n, at)
        at += columns[name].nbytes
    levels = np.frombuffer(raw, np.uint8, offset=at).reshape(n, -1)
    columns["trace"] = columns["lo"][:, None] + (columns["hi"] - columns["lo"])[:, None] * levels.astype(np.float64) / 255
    return columns


def all_examples(page: Path, scan_name: str) -> dict[str, np.ndarray]:
    """The columns of all blocks, with the features' numbers."""
    numbers = registered(page, f"{scan_name}/list")["feature"]
    parts = []
    for block in range(-(-len(numbers) // 16)):
        value = registered(page, f"{scan_name}/block{block}")
        parts.append(unpacked(value) | {"feature": np.repeat(numbers[16 * block : 16 * block + 16], np.diff(value["starts"]))})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# What the page holds


@pytest.mark.parametrize("name", ["neurons", "latents", "tokens"])
def test_page_holds_every_example_with_the_trace_that_the_store_gives(world: Path, page: Path, name: str) -> None:
    scan_name = {"neurons": "scan0", "latents": "scan1", "tokens": "scan2"}[name]
    wanted, found = pq.read_table(world / name / "examples.parquet"), all_examples(page, scan_name)
    for column in ("feature", "value", "clip", "frame", "bin"):  # the page's clip numbers are the store's where all clips have examples
        np.testing.assert_array_equal(found[column], wanted[column].to_numpy())
    assert [KINDS[kind] for kind in found["kind"]] == wanted["kind"].to_pylist()

    store = ActivationStore.open(world / "acts.zarr")
    info = json.loads((world / name / "scan.json").read_text())
    features, context = open_features(info["features"], store), 16 if name == "tokens" else 50
    assert found["trace"].shape[1] == 2 * context + 1
    for i in range(0, len(found["clip"]), 7):
        values = features.dense(store.read_clip(info["site"], int(found["clip"][i])))[:, found["feature"][i]]
        at = np.arange(-context, context + 1) + found["frame"][i]
        inside = (at >= 0) & (at < len(values))
        np.testing.assert_array_equal(inside, (np.arange(len(at)) >= found["first"][i]) & (np.arange(len(at)) < found["stop"][i]))
        np.testing.assert_allclose(found["trace"][i][inside], values[at[inside]], atol=np.ptp(values) / 500)


def test_list_has_a_row_for_every_feature(world: Path, page: Path) -> None:
    rows, features = registered(page, "scan0/list"), pq.read_table(world / "neurons" / "features.parquet")
    assert rows["feature"] == list(range(WIDTH))
    for name in ("density", "max", "mean_active"):
        wanted = features[name].to_pylist()
        assert rows[name] == [None if value is None else pytest.approx(value, rel=1e-3) for value in wanted]
    assert rows["mean_active"][-1] is None and rows["text"][-1] == -1 and set(rows["spark"][-1]) == {"0"}
    clips, found = registered(page, "clips"), all_examples(page, "scan0")
    strongest = {}
    for feature, clip, kind in zip(found["feature"], found["clip"], found["kind"], strict=True):
        if KINDS[kind] == "top":
            strongest.setdefault(feature, clip)
    assert [rows["texts"][text] if text >= 0 else None for text in rows["text"][:-1]] == [clips["text"][strongest[i]] for i in range(WIDTH - 1)]


def test_histogram_tears_no_count_apart_and_loses_none() -> None:
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32) * 3
    fine = np.bincount(bin_of(values), minlength=BINS)
    edges, used = bin_edges(), np.flatnonzero(fine)
    lo, step, counts = histogram(edges[used], edges[used + 1], fine[used])
    assert 17 <= len(counts) <= 64 and counts.sum() == len(values)
    ours = np.histogram(values, lo + step * np.arange(len(counts) + 1))[0]
    assert np.abs(ours - counts).sum() <= 2  # values that lie on an edge
    assert sparkline(edges[used], edges[used + 1], fine[used])[0] == "z"


def test_every_clip_is_stored_once_and_its_time_axis_is_exact(world: Path, page: Path) -> None:
    clips = registered(page, "clips")
    assert len(clips["source"]) == len(set(clips["source"])) == len(SOUNDS)
    heard = [number for number, why in enumerate(clips["silent"]) if why is None]
    assert sorted(path.name for path in (page / "data" / "audio").iterdir()) == [f"{number}.js" for number in heard]
    assert [clips["source"][number] for number, why in enumerate(clips["silent"]) if why] == ["gone.wav"]
    for number in heard:
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(registered(page, f"audio/{number}"))))
        assert rate == RATE and len(samples) == 3 * RATE
        assert abs(int(np.abs(samples).argmax()) - round(CLICK_S * RATE)) <= 1


def test_flac_is_exact(world: Path, tmp_path: Path) -> None:
    export([world / "neurons"], tmp_path / "page", features="0", audio="flac")
    clips = registered(tmp_path / "page", "clips")
    number = clips["source"].index("plain.wav")
    samples, _ = soundfile.read(io.BytesIO(base64.b64decode(registered(tmp_path / "page", f"audio/{number}"))), dtype="int16")
    np.testing.assert_array_equal(samples, soundfile.read(world / "sounds" / "plain.wav", dtype="int16")[0])


def test_page_without_audio_says_so(world: Path, tmp_path: Path) -> None:
    result = export([world / "neurons"], tmp_path / "page", features="0", audio="none")
    assert not (tmp_path / "page" / "data" / "audio").exists()
    assert set(registered(tmp_path / "page", "clips")["silent"]) == {"this page was made without audio"}
    assert result["clips_without_audio"] == 0


def test_clips_of_token_scans_bring_no_audio(world: Path, tmp_path: Path) -> None:
    export([world / "tokens"], tmp_path / "page")
    assert not (tmp_path / "page" / "data" / "audio").exists()
    assert registered(tmp_path / "page", "index")["scans"][0]["axis"] == "token"


def test_features_asked_for_are_those_exported(world: Path, tmp_path: Path) -> None:
    result = export([world / "neurons", world / "latents"], tmp_path / "page", features="0-2,20", context_s=0.2)
    assert result["features"] == 8
    for name in ("scan0", "scan1"):
        assert registered(tmp_path / "page", f"{name}/list")["feature"] == [0, 1, 2, 20]
        found = all_examples(tmp_path / "page", name)
        assert set(found["feature"]) == {0, 1, 2, 20} and found["trace"].shape[1] == 21


def test_result_tells_what_was_made(world: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = export([world / "neurons"], tmp_path / "page", progress=lambda *step: seen.append(step))
    assert result["index"] == str(tmp_path / "page" / "index.html") and Path(result["index"]).is_file()
    assert (result["scans"], result["features"], result["clips"], result["clips_without_audio"]) == (1, WIDTH, 4, 1)
    assert result["examples"] == pq.read_table(world / "neurons" / "examples.parquet").num_rows
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "page").rglob("*") if path.is_file())
    assert seen[-1] == ("audio", 4, 4) and (f"traces of neurons:{SITE}", 4, 4) in seen


# What data can't do


def test_data_files_are_ascii_and_can_open_or_end_nothing_in_html(page: Path) -> None:
    files = list((page / "data").rglob("*.js"))
    assert len(files) > 10
    for file in files:
        assert re.fullmatch(r"(data|scan\d+|clip|audio)/(index|clips|list|block\d+|\d+)\.js", f"{file.parent.name}/{file.name}")
        assert b"<" not in file.read_bytes()
        file.read_text("ascii")
    assert registered(page, "clips")["text"][registered(page, "clips")["source"].index(HOSTILE_NAME)] == HOSTILE_TEXT


def test_javascript_refuses_what_json_has_no_word_for() -> None:
    assert javascript("</script>\u2028") == '"\\u003c/script>\\u2028"'
    with pytest.raises(ValueError):
        javascript(float("nan"))


def test_page_names_nothing_outside_its_folder(page: Path) -> None:
    html = (page / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert name in ("#", "data:,") or (page / name).is_file()
    for file in [page / "index.html", *(page / "assets").iterdir()]:
        addresses = set(re.findall(r"\w+://[^\s\"'`]*", file.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}
        assert "innerHTML" not in file.read_text() and "eval(" not in file.read_text()


# Where it goes


def test_earlier_page_is_replaced(world: Path, tmp_path: Path) -> None:
    export([world / "neurons", world / "latents"], tmp_path / "page")
    (tmp_path / "page" / "mine.txt").write_text("kept")
    export([world / "latents"], tmp_path / "page", features="0-3")
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["assets", "data", "explorer.json", "index.html", "mine.txt"]
    assert not (tmp_path / "page" / "data" / "scan1").exists()


def test_same_scan_gives_the_same_data(world: Path, page: Path, tmp_path: Path) -> None:
    export([world / "neurons"], tmp_path / "page")
    written, again = ({file.relative_to(root): file for file in (root / "data" / "scan0").rglob("*.js")} for root in (page, tmp_path / "page"))
    assert again and written.keys() >= again.keys()
    for name, file in again.items():
        assert file.read_bytes() == written[name].read_bytes()


def test_interrupted_export_leaves_the_earlier_page(world: Path, tmp_path: Path) -> None:
    export([world / "neurons"], tmp_path / "page", features="0")
    before = {path: path.read_bytes() for path in (tmp_path / "page").rglob("*") if path.is_file()}

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "audio":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export([world / "latents"], tmp_path / "page", progress=interrupt)
    assert {path: path.read_bytes() for path in (tmp_path / "page").rglob("*") if path.is_file()} == before


def test_folder_of_other_things_is_refused_and_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "index.html").write_text("mine")
    with pytest.raises(HearsaeError, match="holds other things"):
        export([world / "neurons"], tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["index.html"]


def test_place_that_cant_be_written_is_named(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "page", Path("/proc/page")):
        with pytest.raises(HearsaeError, match=re.escape(str(out))):
            export([world / "neurons"], out, features="0")


# What it is made of


def copy_of(world: Path, name: str, root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A scan folder with another scan.json."""
    shutil.copytree(world / name, root / name)
    info = json.loads((root / name / "scan.json").read_text())
    change(info)
    (root / name / "scan.json").write_text(json.dumps(info))
    return root / name


def test_missing_scan_is_named(tmp_path: Path) -> None:
    with pytest.raises(HearsaeError, match=f"no scan at {tmp_path}"):
        export([tmp_path], tmp_path / "page")
    with pytest.raises(HearsaeError, match="at least one scan"):
        export([], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_store_that_moved_can_be_named(world: Path, tmp_path: Path) -> None:
    moved = copy_of(world, "neurons", tmp_path, lambda info: info.update(store="/nowhere/acts.zarr"))
    with pytest.raises(HearsaeError, match=r"/nowhere/acts\.zarr .*--store"):
        export([moved], tmp_path / "page")
    assert export([moved], tmp_path / "page", store=world / "acts.zarr", features="0")["examples"]


def test_another_store_is_refused(world: Path, tmp_path: Path) -> None:
    plan = make_plan(AudioFolder(world / "sounds").items())  # one sound is gone: a clip less
    other = fill_store(tmp_path / "other.zarr", plan, {SITE: WIDTH}, rows_of)
    with pytest.raises(HearsaeError, match="clips that it does not have"):
        export([world / "neurons"], tmp_path / "page", store=other.path)
    make_sounds(tmp_path / "sounds")
    plan = make_plan(AudioFolder(tmp_path / "sounds").items())
    other = fill_store(tmp_path / "loud.zarr", plan, {SITE: WIDTH}, lambda site, clip, n: 2 * rows_of(site, clip, n))
    with pytest.raises(HearsaeError, match="does not give the values of this scan"):
        export([world / "neurons"], tmp_path / "page", store=other.path)
    assert not list((tmp_path / "page").iterdir())


def test_damaged_examples_are_named(world: Path, tmp_path: Path) -> None:
    damaged = copy_of(world, "neurons", tmp_path, lambda info: None)
    (damaged / "examples.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(HearsaeError, match=r"examples\.parquet"):
        export([damaged], tmp_path / "page")


@pytest.mark.parametrize(("wanted", "numbers"), [(None, [0, 1, 2, 3, 4]), ("3", [3]), ("0-2", [0, 1, 2]), ("4, 1-2,1", [1, 2, 4])])
def test_features_are_numbers_and_ranges(wanted: str | None, numbers: list[int]) -> None:
    assert parse_features(wanted, 5).tolist() == numbers


@pytest.mark.parametrize("wanted", ["", "a", "1-", "-1", "5", "3-2", "0-5", "1,,2", "1.5", "²"])
def test_other_features_are_refused(wanted: str) -> None:
    with pytest.raises(HearsaeError, match="feature"):
        parse_features(wanted, 5)


def test_unknown_settings_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(HearsaeError, match="vorbis, flac or none"):
        export([world / "neurons"], tmp_path / "page", audio="mp3")
    with pytest.raises(HearsaeError, match="context"):
        export([world / "neurons"], tmp_path / "page", context_s=0)
