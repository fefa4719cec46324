"""SQL over a store and scans: it reads what is there, and nothing else on the machine."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import fill_store, plan_of
from said import say
from scan_twin import SITE

from analysis.moments import stretch_at
from analysis.neighbours import nearest_rows
from analysis.query import activation_rows, feature_moments
from analysis.scan import Scan, ScanOptions, scan
from analysis.tables import run_sql
from analysis.written_rows import save_rows
from cache.errors import HearsaeError
from cache.location import location, put
from cache.store import ActivationStore


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sql")


@pytest.fixture(scope="module")
def store(root) -> ActivationStore:
    rows = lambda site, clip, n: np.random.Generator(np.random.PCG64(clip)).normal(0, 1, (n, 4))  # noqa: E731
    made = fill_store(root / "acts.zarr", plan_of([1.0, 0.5, 0.7], chunk_rows=64, shuffle=False), {SITE: 4}, rows)
    say(made, [(0, 0.1, 0.3, "it's"), (1, 0.0, 0.2, "éàü")], [(0, 0.1, 0.3, "M")])
    return made


@pytest.fixture(scope="module")
def scans(root, store) -> list[Scan]:
    silent = ScanOptions(no_phones=True)
    return [scan(store, f"neurons:{SITE}", root / "it's; DROP", silent), scan(store, f"random:{SITE}", root / "random", silent)]


def test_the_tables_are_those_of_the_folders(store, scans):
    answer = run_sql("SELECT feature, kind, value FROM examples WHERE scan = 'random' ORDER BY feature, kind, bin, rank", store, scans)
    frame = pd.read_parquet(scans[1].path / "examples.parquet")
    assert answer.columns == ("feature", "kind", "value")
    assert [tuple(row.values()) for row in answer.rows] == list(frame[list(answer.columns)].itertuples(index=False, name=None))
    counts = run_sql("SELECT scan, count(*) AS n, sum(feature) AS total FROM features GROUP BY scan ORDER BY scan", store, scans)
    assert counts.rows == [{"scan": "it's; DROP", "n": 4, "total": 6}, {"scan": "random", "n": 4, "total": 6}]


def test_tables_of_store_and_scans_can_be_joined(store, scans):
    statement = """
        SELECT w.label, c.source, e.feature FROM words w JOIN clips c USING (clip)
        JOIN examples e ON e.clip = w.clip AND e.start_s + 0.01 >= w.start_s AND e.start_s + 0.01 < w.end_s
        WHERE e.scan = 'random' AND w.label = 'it''s'"""
    rows = run_sql(statement, store, scans).rows
    assert rows and {(row["label"], row["source"]) for row in rows} == {("it's", "s0.wav")}


def test_values_are_what_json_has(store):
    (row,) = run_sql("SELECT 1 a, 2 a, 'nan'::DOUBLE b, sum(1) c, 1.5 d, [1.5, 'inf'::DOUBLE] e, {'x': 1} f, DATE '2020-01-01' g, NULL h", store).rows
    assert row == {"a": 1, "a_1": 2, "b": None, "c": 1, "d": 1.5, "e": [1.5, None], "f": {"x": 1}, "g": "2020-01-01", "h": None}
    assert run_sql("SELECT clip FROM clips WHERE false", store) == (("clip",), [])


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_blob('{secret}')",
        "SELECT * FROM read_parquet('{parquet}')",
        "SELECT * FROM parquet_metadata('{parquet}')",
        "SELECT * FROM sniff_csv('{secret}')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM query('SELECT * FROM read_text(''{secret}'')')",
        "SELECT * FROM read_csv('https://127.0.0.1/x')",
        "SELECT getenv('HOME')",
        "COPY clips TO '{out}'",
        "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "CREATE TABLE a AS SELECT 1",
        "INSERT INTO clips VALUES (1)",
        "DROP VIEW features",
        "PRAGMA database_list",
        "SELECT 1; COPY clips TO '{out}'",
        "SELECT * FROM secret_of_the_caller",
        "SELEC",
        "",
        "SELECT '",
        "SELECT \x00",
    ],
)
def test_nothing_is_read_or_written_outside(store, scans, tmp_path, statement):
    secret_of_the_caller = pd.DataFrame({"a": ["secret"]})
    secret = tmp_path / "secret.txt"
    secret.write_text("".join(secret_of_the_caller["a"]))
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "a.parquet")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(HearsaeError) as refused:
        run_sql(statement.format(secret=secret, parquet=tmp_path / "a.parquet", out=tmp_path / "out"), store, scans)
    assert "\n" not in str(refused.value) and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("SELECT * FROM phone_auc", "there is no table phone_auc here: run 'hearsae align' on the store, then 'hearsae scan' again"),
        ("SELECT * FROM nope", "Table with name nope does not exist! Tables: clips, words, phones, features, examples"),
        ("SELECT nope FROM clips", 'Referenced column "nope" not found'),
    ],
)
def test_what_is_not_there_is_said(store, scans, statement, complaint):
    with pytest.raises(HearsaeError, match=complaint):
        run_sql(statement, store, scans)
    with pytest.raises(HearsaeError, match="there is no table examples here: name a scan with --scan"):
        run_sql("SELECT * FROM examples", store)


def test_scans_in_folders_of_the_same_name_have_their_paths(root, store, scans, tmp_path):
    other = scan(store, f"neurons:{SITE}", tmp_path / "random")
    names = {row["scan"] for row in run_sql("SELECT DISTINCT scan FROM features", store, [scans[1], other]).rows}
    assert names == {str(scans[1].path), str(other.path)}


def test_tables_and_activations_in_an_object_store_are_asked_as_those_on_a_disk(s3, store, scans, tmp_path):
    place = location(f"s3://{s3.bucket}/there")
    for folder in (store.path, scans[1].path):
        for file in (file for file in folder.rglob("*") if file.is_file()):
            put(place / folder.name / file.relative_to(folder).as_posix(), file.read_bytes())
    there, scanned = ActivationStore.open(place / store.path.name), Scan.open(place / "random")
    for statement in ("SELECT source FROM clips ORDER BY clip", "SELECT * FROM Examples JOIN words USING (clip) ORDER BY ALL"):
        assert run_sql(statement, there, [scanned]) == run_sql(statement, store, [scans[1]])
    where = stretch_at(there, SITE, "s0.wav", 0.1)
    assert nearest_rows(there, SITE, where, 5) == nearest_rows(store, SITE, where, 5)
    assert feature_moments(scanned, 1, "top", there) == feature_moments(scans[1], 1, "top", store)
    save_rows(place / "rows.npy", activation_rows(there, "s0.wav", 0.1, 0.2, SITE))
    assert np.array_equal(np.load(io.BytesIO((place / "rows.npy").read_bytes())), store.read_clip(SITE, 0)[5:10])
