"""`hearsae query`: every question, its answer in JSON and for people, and what it says of questions that make no sense."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fill_store, plan_of
from said import say
from scan_twin import SITE, save_sae

from analysis.query import activation_rows
from analysis.scan import scan
from cache.plan import SourceItem, make_plan
from cache.store import ActivationStore
from cluster.cli import main

WIDTH = 16
NAMES = ["it's.wav", "../../etc/passwd", "日本 語.wav", 'a "b".wav']


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two scans of a store with clips of such names, with timings; and `mute.zarr` without."""
    root = tmp_path_factory.mktemp("command")
    plan = make_plan([SourceItem(name, i, 16000, text=f"words of {i}") for i, name in enumerate(NAMES)], chunk_rows=64, shuffle=False)
    rows = lambda site, clip, n: np.random.Generator(np.random.PCG64(clip)).normal(1, 1, (n, WIDTH))  # noqa: E731
    store = fill_store(root / "acts.zarr", plan, {SITE: WIDTH}, rows)
    say(store, [(i, 0.1, 0.3, "danger") for i in range(4)], [(i, t, t + 0.2, phone) for i in range(4) for t, phone in ((0.1, "M"), (0.4, "T"))])
    scan(store, f"neurons:{SITE}", root / "neurons")
    scan(store, f"sae:{save_sae(root / 'sae')}", root / "latents")
    mute = fill_store(root / "mute.zarr", plan_of([1.0], chunk_rows=64), {SITE: WIDTH}, rows)
    scan(mute, f"neurons:{SITE}", root / "mute")
    return root


MOMENT = ["--clip", "2", "--time", "0.2"]
SPAN = ["--clip", "2", "--from", "0.1", "--to", "0.3"]
QUESTIONS = {
    "feature": (["--scan", "neurons", "--feature", "3"], {"value", "start_s", "word", "phone", "source"}),
    "moment": (["--scan", "latents", *MOMENT], {"feature", "value", "z", "density", "word", "phone"}),
    "moment by z": (["--scan", "neurons", "--clip", "it's.wav", "--frame", "3", "--by", "z"], {"feature", "value", "z"}),
    "span": (["--scan", "neurons", *SPAN, "--over", "max"], {"feature", "value", "z", "frames"}),
    "phone": (["--scan", "latents", "--phone", "M"], {"phone", "feature", "auc", "auc_shuffled"}),
    "word": (["--scan", "neurons", "--word", "Danger"], {"feature", "auc", "rate_inside", "rate_outside"}),
    "text": (["--scan", "neurons", "--text", "^dang"], {"feature", "auc"}),
    "like, codes": (["--scan", "latents", "--like", *MOMENT, "--one-per-clip"], {"cosine", "clip", "source", "start_s"}),
    "like, rows": (["--store", "acts.zarr", "--site", SITE, "--like", *MOMENT, "--uncentred"], {"cosine", "clip"}),
    "rows": (["--store", "acts.zarr", "--site", SITE, "--rows", *SPAN], {"frame", "start_s", "values"}),
    "values": (["--scan", "latents", "--rows", *SPAN], {"frame", "start_s", "values"}),
    "sql": (["--scan", "neurons", "latents", "--sql", "SELECT scan, count(*) n FROM features GROUP BY scan"], {"scan", "n"}),
    "sql of a store": (["--store", "acts.zarr", "--sql", "SELECT clip, label FROM words"], {"clip", "label"}),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_has_an_answer(root, monkeypatch, succeeds, capfd, name):
    monkeypatch.chdir(root)
    arguments, columns = QUESTIONS[name]
    said = succeeds("query", *arguments)
    assert columns <= said["rows"][0].keys() and 0 < said["seconds"] < 30
    assert main(["query", *arguments]) == 0
    out = capfd.readouterr().out
    assert len(out.splitlines()) >= 3 and out.splitlines()[-1].endswith(" s")


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_is_known_by_its_name_whatever_that_is(root, succeeds, name):
    rows = succeeds("query", "--scan", root / "neurons", "--clip", name, "--time", "0.5")["rows"]
    assert {row["source"] for row in rows} == {name}
    literal = name.replace("'", "''")
    assert succeeds("query", "--store", root / "acts.zarr", "--sql", f"SELECT source FROM clips WHERE source = '{literal}'")["rows"] == [
        {"source": name}
    ]


@pytest.mark.parametrize("ending", ["npy", "npz", "parquet"])
def test_rows_are_saved_as_they_are_stored(root, tmp_path, succeeds, ending):
    file = tmp_path / f"rows.{ending}"
    said = succeeds("query", "--store", root / "acts.zarr", "--site", SITE, "--rows", *SPAN, "--save", file)
    store = ActivationStore.open(root / "acts.zarr")
    stored = store.read_clip(SITE, 2)[5:15]
    assert said["shape"] == [10, WIDTH] and said["saved"] == str(file) and [row["frame"] for row in said["rows"]] == list(range(5, 15))
    assert (activation_rows(store, 2, 0.1, 0.3, SITE).values == stored).all()
    if ending == "parquet":
        table = pq.read_table(file)
        assert table["source"].to_pylist() == [NAMES[2]] * 10 and table.schema.field("values").type == pa.list_(pa.float32(), WIDTH)
        assert np.array_equal(np.array(table["values"].to_pylist(), np.float16), stored)
    else:
        loaded = np.load(file, allow_pickle=False)
        values = loaded if ending == "npy" else loaded["values"]
        assert values.dtype == np.float16 and np.array_equal(values, stored)
        if ending == "npz":
            assert loaded["start_s"].tolist() == pytest.approx([0.1 + 0.02 * i for i in range(10)]) and str(loaded["source"]) == NAMES[2]


def test_an_answer_of_sql_as_csv_is_nothing_but_csv(root, capfd):
    assert main(["query", "--store", str(root / "acts.zarr"), "--sql", "SELECT clip, source FROM clips ORDER BY clip", "--csv"]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[0] == "clip,source" and pd.read_csv(pd.io.common.StringIO(out))["source"].tolist() == NAMES


def test_the_phone_table_of_a_scan_answers_at_once(root, tmp_path, succeeds, refused):
    import shutil

    there = shutil.copytree(root / "latents", tmp_path / "latents")
    columns = {
        "feature": [0, 1, 2],
        "phone": ["M", "M", "M"],
        "kind": ["phone"] * 3,
        "frames": [9, 9, 9],
        "auc": [0.6, 0.9, 0.2],
        "auc_shuffled": [0.5] * 3,
    }
    pq.write_table(pa.table(columns), there / "phone_auc.parquet")
    said = succeeds("query", "--scan", there, "--phone", "M")
    assert [(row["feature"], row["auc"]) for row in said["rows"]] == [(1, 0.9), (0, 0.6)] and said["from"] == "phone_auc.parquet"
    assert "knows no phone or class 'ZH': it has M" in refused("query", "--scan", there, "--phone", "ZH")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--scan", "neurons"], "ask for --feature N, or for --clip C --time T"),
        (["--scan", "neurons", "--phone", "M", "--word", "danger"], "ask for --feature N"),
        (["--scan", "neurons", "--phone", "M", "--kind", "top"], "--kind has no part in a question of --phone: it goes with --feature"),
        (["--scan", "neurons", "--feature", "1", "--csv"], "--csv has no part in a question of --feature: it goes with --sql"),
        (["--scan", "neurons", *SPAN, "--time", "1"], "--clip needs --time"),
        (["--scan", "neurons", "--clip", "0", "--from", "0.1"], "--clip needs --time"),
        (["--scan", "neurons", *MOMENT, "--over", "max"], "--over goes with --from and --to"),
        (["--scan", "neurons", "--clip", "0", "--from", "0.3", "--to", "0.1"], "must end after it starts"),
        (["--scan", "neurons", "--clip", "0", "--from", "0.3", "--to", "1.1"], "1.1 s is outside clip 0, which goes from 0 to 1 s"),
        (["--clip", "0", "--time", "0"], "give the --scan to ask about"),
        (["--store", "acts.zarr", "--word", "danger"], "give the --scan to ask about"),
        (["--scan", "neurons", "latents", "--feature", "1"], "give one --scan: only --sql takes several"),
        (["--scan", "mute", "--word", "danger"], "has no times of words and phones: run 'hearsae align --store"),
        (["--scan", "neurons", "--word", "peril"], "nobody says the word 'peril'"),
        (["--scan", "neurons", "--text", "("], "is no regular expression that RE2 reads: missing ): ("),
        (["--like", "--store", "acts.zarr", *MOMENT], "--like needs a --site of the --store, or a --scan"),
        (["--like", "--scan", "neurons"], "--like needs --clip C and --time T"),
        (["--like", "--scan", "latents", *MOMENT, "--uncentred"], "codes are never centred"),
        (["--like", "--store", "acts.zarr", "--site", "x", *MOMENT], "has no site 'x'"),
        (["--rows", "--store", "acts.zarr", *SPAN], "--rows needs a --site"),
        (["--rows", "--store", "acts.zarr", "--site", SITE, "--clip", "0"], "--rows needs --clip C --from T --to T"),
        (["--rows", "--store", "acts.zarr", "--site", SITE, *SPAN, "--save", "a.pkl"], "give a name that ends in .npy, .npz, .parquet"),
        (["--rows", "--store", "acts.zarr", "--site", SITE, *SPAN, "--save", "acts.zarr/zarr.json/a.npy"], "can't write"),
        (["--sql", "SELECT 1"], "--sql needs a --store, or a --scan"),
        (["--scan", "neurons", "mute", "--sql", "SELECT 1"], "scans of several stores"),
        (["--store", "acts.zarr", "--sql", "SELECT * FROM read_text('/etc/passwd')"], "file system operations are disabled"),
    ],
)
def test_a_question_without_sense_gets_one_line(root, monkeypatch, refused, asked, words):
    monkeypatch.chdir(root)
    assert words in refused("query", *asked)


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (["--scan", "neurons", "--feature", "3"], set()),
        (["--scan", "neurons", *MOMENT], set()),
        (["--scan", "neurons", "--word", "danger"], set()),
        (["--store", "acts.zarr", "--site", SITE, "--like", *MOMENT], set()),
        (["--store", "acts.zarr", "--sql", "SELECT 1"], {"duckdb"}),
    ],
)
def test_a_question_loads_only_what_it_needs(root, arguments, loaded):
    heavy = ["torch", "ray", "whisper", "datasets", "numba", "duckdb"]
    project = Path(__file__).parents[2]
    paths = [str(project), str(Path(__file__).parent)]
    setup = f"import os, sys; sys.path[:0] = {paths}; import said; from cluster.cli import main"
    code = (
        f"{setup}; os.chdir({str(root)!r}); assert main(['query', *{arguments!r}]) == 0; print('LOADED', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.rsplit("LOADED", 1)[1].replace("'", '"'))) == loaded
