"""A decoder's examples in the page: words in their transcripts, heard where their time is known."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_explorer import registered
from test_explorer_browser import Chromium, chromium, nothing_went_wrong  # noqa: F401

from analysis.explorer.export import export
from analysis.scan_folder import Scan
from cluster.cli import main

pytestmark = pytest.mark.browser

SITE = "decoder.blocks.1.mlp.1"
FEATURE = 137
CONTEXT = 60
"""Of example.js: characters before a token."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two scans of micro's decoder neurons: of Whisper's own text with times, and of the dataset's."""
    root = tmp_path_factory.mktemp("tokens")
    speech = ("--dataset", "micro", "--split", "test", "--limit", 12)
    run("transcribe", *speech, "--model", "micro", "--out", root / "own.jsonl", "--no-ray")
    given = {"own": ("--dataset", root / "own.jsonl"), "given": speech}
    for name, dataset in given.items():
        run("cache", *dataset, "--model", "micro", "--sites", SITE, "--out", root / f"{name}.zarr", "--no-ray")
        run("scan", "--store", root / f"{name}.zarr", "--features", f"neurons:{SITE}", "--out", root / name, "--top", 8, "--no-ray")
    export([root / name for name in given], root / "page", features=str(FEATURE))
    return root


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


def cards(browser: Chromium, selector: str) -> list[str | None]:
    """What is found in each of the strongest examples' cards; None where there is nothing."""
    return browser.run(
        f"return [...document.querySelectorAll('.top .example')].map(card => card.querySelector({json.dumps(selector)})?.textContent ?? null)"
    )


def top(folder: Path, name: str) -> list[dict]:
    return [row for row in Scan.open(folder / name).examples(FEATURE).to_pylist() if row["kind"] == "top"]


def test_the_token_stands_out_in_its_transcript(chromium: Chromium, folder: Path) -> None:  # noqa: F811
    for number, name in enumerate(("own", "given")):
        chromium.open(folder / "page", f"#scan{number}/feature/{FEATURE}")
        rows = top(folder, name)
        assert len(rows) == 8
        assert cards(chromium, "mark") == [row["token"].strip() for row in rows]
        for row, shown in zip(rows, cards(chromium, ".words"), strict=True):
            assert shown.endswith(row["text"][-20:]) and row["text"][max(0, (row["token_start"] or 0) - CONTEXT) :] in shown


def test_what_has_a_time_is_heard_and_nothing_else(chromium: Chromium, folder: Path) -> None:  # noqa: F811
    chromium.open(folder / "page", f"#scan0/feature/{FEATURE}")
    rows = top(folder, "own")
    assert {row["start_s"] is None for row in rows} == {True, False}
    timed = [row["start_s"] is not None for row in rows]
    assert [place is not None for place in cards(chromium, "button.player")] == timed
    facts = [f"token {row['frame']}" + (f" at {row['start_s']:.2f} s" if time else "") for row, time in zip(rows, timed, strict=True)]
    assert cards(chromium, ".facts span") == facts
    chromium.run("document.querySelector('.top button.player').click()")
    chromium.wait("document.querySelector('.example.playing')")
    chromium.wait("!document.querySelector('.example.playing')")
    chromium.open(folder / "page", f"#scan1/feature/{FEATURE}")
    assert cards(chromium, "button.player") == [None] * 8 and all("at" not in fact for fact in cards(chromium, ".facts span"))


def test_the_sound_of_a_token_is_where_it_is_said(chromium: Chromium, folder: Path) -> None:  # noqa: F811
    chromium.open(folder / "page", f"#scan0/feature/{FEATURE}")
    row = next(row for row in top(folder, "own") if row["start_s"] is not None)
    chromium.run("window.spans = []; hearsae.play = async (clip, span) => { spans.push(span); };")
    chromium.run("document.querySelector('.top button.player').click()")
    (span,) = chromium.run("return spans")
    assert span["start"] == pytest.approx(row["start_s"] - 0.25) and span["end"] == pytest.approx(row["end_s"] + 0.25)


def test_the_list_names_the_token_of_the_strongest_example(folder: Path) -> None:
    listed = registered(folder / "page", "scan0/list")
    assert listed["texts"][listed["text"][0]] == f"{top(folder, 'own')[0]['token'].strip()} · {top(folder, 'own')[0]['text']}"


def test_a_scan_from_before_there_were_tokens_is_shown_as_it_was(chromium: Chromium, folder: Path) -> None:  # noqa: F811
    old = folder / "old"
    old.mkdir()
    for file in (folder / "own").iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    table = pq.read_table(old / "examples.parquet")
    kept = table.drop(["token", "next_token", "token_start", "token_end"])
    for name in ("start_s", "end_s"):
        kept = kept.set_column(kept.column_names.index(name), name, pa.nulls(kept.num_rows, pa.float64()))
    pq.write_table(kept, old / "examples.parquet")
    export([old], folder / "old-page", features=str(FEATURE))
    chromium.open(folder / "old-page", f"#scan0/feature/{FEATURE}")
    assert cards(chromium, ".words") == [row["text"] for row in top(folder, "own")] and cards(chromium, "mark") == [None] * 8
