"""Times that others made: what each kind of file says reaches the right clips, and what is malformed is named."""

import json

import numpy as np
import pytest
from conftest import fill_store

from analysis.align import tables
from analysis.timing_export import export_times
from analysis.timing_files import import_times
from cache.errors import HearsaeError
from cache.location import location
from cache.plan import SourceItem, make_plan
from cache.timings import write_timings

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2 ! seconds
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "anna - words"
        xmin = 0
        xmax = 2
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 1.25
            text = "say ""hi"" now"
    item [2]:
        class = "IntervalTier"
        name = "anna - phones"
        xmin = 0
        xmax = 2
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = "sp"
        intervals [2]:
            xmin = 0.5
            xmax = 1.0
            text = "HH"
        intervals [3]:
            xmin = 1.0
            xmax = 1.25
            text = "AY1"
    item [3]:
        class = "TextTier"
        name = "tones"
        xmin = 0
        xmax = 2
        points: size = 1
        points [1]:
            number = 0.7
            mark = "H*"
"""
SHORT = 'File type = "ooTextFile"\n"TextGrid"\n\n0\n2\n<exists>\n1\n"IntervalTier"\n"phones"\n0\n2\n2\n0\n0.5\n"spn"\n0.5\n1.25\n"{}"\n'


def store_of(path, seconds, **settings):
    """A store of sources of these names and lengths."""
    items = [SourceItem(name, 0, round(s * 16000), text="some words") for name, s in seconds.items()]
    return fill_store(path, make_plan(items, **settings), {"encoder.blocks.0": 4}, lambda site, clip, n: np.ones((n, 4)))


def said(store, table):
    """Source -> its intervals."""
    found: dict = {}
    for clip, start, end, label in sorted(table):
        found.setdefault(store.clips["source"][clip].as_py(), []).append((start, end, label))
    return found


def imported(store, *paths):
    return import_times(store.clips, [str(path) for path in paths])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_textgrid_is_read_in_each_of_praats_encodings(tmp_path, encoding):
    store = store_of(tmp_path / "s", {"train/a.wav": 2.0})
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "a.TextGrid").write_bytes(mark + LONG.encode(encoding))
    found = imported(store, tmp_path / "a.TextGrid")
    assert said(store, found.aligned.words) == {"train/a.wav": [(0.5, 1.25, 'say "hi" now')]}
    assert said(store, found.aligned.phones) == {"train/a.wav": [(0.0, 0.5, "SIL"), (0.5, 1.0, "HH"), (1.0, 1.25, "AY")]}
    assert (found.method, found.phone_set) == ("textgrid", "arpabet")


def test_the_short_format_says_the_same_and_other_phone_sets_are_kept(tmp_path):
    store = store_of(tmp_path / "s", {"a.wav": 2.0})
    (tmp_path / "a.TextGrid").write_text(SHORT.format("tʃʰ"), encoding="utf-8")
    found = imported(store, tmp_path / "a.TextGrid")
    assert said(store, found.aligned.phones) == {"a.wav": [(0.0, 0.5, "SIL"), (0.5, 1.25, "tʃʰ")]}
    assert found.phone_set == "other"


def test_a_tree_of_textgrids_goes_to_the_sources_of_its_paths(tmp_path):
    store = store_of(tmp_path / "s", {"train/anna/1.flac": 2.0, "train/bob/1.flac": 2.0, "train/bob/2.flac": 2.0})
    for name in ("anna/1", "bob/1", "carl/9", "eve/2"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / f"{name}.TextGrid").write_text(SHORT.format(name.split("/")[0][0] + "x"))
    found = imported(store, tmp_path / "tree")
    assert {source: rows[-1][2] for source, rows in said(store, found.aligned.phones).items()} == {
        "train/anna/1.flac": "ax",
        "train/bob/1.flac": "bx",
    }
    assert found.strangers == ["carl/9", "eve/2"]
    assert [store.clips["source"][clip].as_py() for clip, _ in found.aligned.failures] == ["train/bob/2.flac"]


def test_a_name_that_fits_two_sources_or_a_source_that_two_names_fit_is_refused(tmp_path):
    (tmp_path / "1.TextGrid").write_text(SHORT.format("S"))
    with pytest.raises(HearsaeError, match=r"fit several sources, 'anna/1.flac' and 'bob/1.flac'"):
        imported(store_of(tmp_path / "s", {"anna/1.flac": 2.0, "bob/1.flac": 2.0}), tmp_path / "1.TextGrid")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"file_name": f"{n}/1.wav", "words": [], "phones": []}) + "\n" for n in "ab"))
    with pytest.raises(HearsaeError, match=r"'a/1.wav' and 'b/1.wav' both"):
        imported(store_of(tmp_path / "t", {"1.flac": 2.0}), tmp_path / "t.jsonl")


def test_ctm_files_are_words_or_phones_by_name_or_by_what_stands_before_the_path(tmp_path):
    store = store_of(tmp_path / "s", {"a.wav": 2.0})
    (tmp_path / "x.ctm").write_text(";; made by hand\na 1 0.10 0.25 hi 0.9\na 1 0.4 0.1 <eps>\n")
    (tmp_path / "phones.ctm").write_text("a 1 0.10 0.05 HH_B\na 1 0.15 0.20 AY1_E 1.0\n\na 1 0.35 0.1 sil\n")
    found = imported(store, tmp_path / "x.ctm", tmp_path / "phones.ctm")
    assert said(store, found.aligned.words) == {"a.wav": [(0.1, 0.35, "hi")]}
    assert said(store, found.aligned.phones) == {"a.wav": [(0.1, 0.15, "HH"), (0.15, 0.35, "AY"), (0.35, 0.45, "SIL")]}
    told = imported(store, f"phones:{tmp_path / 'x.ctm'}")
    assert told.aligned.words == []
    assert told.phone_set == "other"


def test_a_piece_of_a_source_gets_what_is_said_in_it(tmp_path):
    store = store_of(tmp_path / "s", {"a.wav": 4.0}, clip_seconds=2.0)
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"file_name": "a.wav", "words": [[1.5, 2.5, "across"], [3.0, 9.0, "late"]], "phones": [[1.5, 2.5, "AH0"]]})
    )
    words = sorted((start, end, label) for _, start, end, label in imported(store, tmp_path / "t.jsonl").aligned.words)
    assert words == [(1.5, 2.0, "across"), (2.0, 2.5, "across"), (3.0, 4.0, "late")]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.TextGrid", "hello", r"a.TextGrid:1: it ends where a quoted text"),
        ("a.TextGrid", SHORT.format("S").replace("\n2\n0\n0.5", "\n1000000000\n0\n0.5"), r"a.TextGrid:\d+: it ends"),
        ("a.TextGrid", SHORT.format("S").replace("\n0.5\n1.25\n", "\n0.5\n0.25\n"), r"a.TextGrid:18: 0.5 to 0.25 is no stretch"),
        ("a.TextGrid", SHORT.format("S").replace("\n1.25\n", "\n1e999\n"), r"a.TextGrid:17: that number"),
        ("a.TextGrid", SHORT.format("S")[:-3], r"there should be a quoted text, not '\"'"),
        ("a.TextGrid", SHORT.format("S").replace("phones", "gestures"), r"its tiers: gestures"),
        ("a.ctm", "a 1 0 1 hi\na 1 x 1 hi\n", r"a.ctm:2: not a line of CTM"),
        ("a.ctm", "a 1 nan 1 hi\n", r"a.ctm:1: .*no stretch of time"),
        ("a.ctm", "a 1 0 1\n", r"a.ctm:1: .*5 or 6"),
        ("a.jsonl", '{"file_name": "a", "words": [[1, 0, "x"]], "phones": []}', r"a.jsonl:1: .*no stretch"),
        ("a.jsonl", '{"file_name": "a", "words": [], "phones": [[1e999, 2, "x"]]}', r"a.jsonl:1"),
        ("a.jsonl", "[" * 100000, r"a.jsonl:1"),
        ("a.jsonl", "", r"there are no times"),
        ("a.txt", "x", r"can't be imported"),
    ],
)
def test_what_is_malformed_is_named_by_file_and_line(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(HearsaeError, match=why):
        imported(store_of(tmp_path / "s", {"a.wav": 2.0}), tmp_path / name)


def timed_store(tmp_path, names):
    store = store_of(tmp_path / "s", dict.fromkeys(names, 4.0), clip_seconds=2.0)
    rows = [{"file_name": n, "words": [[0.5, 2.25, f"w{n[-5]}"]], "phones": [[0.0, 0.5, "SIL"], [0.5, 1.1, "HH"], [1.1, 4.0, "AY"]]} for n in names]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = imported(store, tmp_path / "t.jsonl")
    return store, found, write_timings(store, *tables(found.aligned), {"method": "jsonl", "phone_set": "arpabet"})


@pytest.mark.parametrize(("form", "files"), [("textgrid", ["."]), ("ctm", ["words.ctm", "phones.ctm"]), ("jsonl", ["times.jsonl"])])
def test_what_is_exported_is_imported_again(tmp_path, form, files):
    store, found, timings = timed_store(tmp_path, ["x/a.wav", "x/b.wav", "y/a.wav"])
    assert export_times(store, timings, tmp_path / "out", form) == 3
    again = imported(store, *(tmp_path / "out" / file for file in files)).aligned
    assert sorted(again.words) == sorted(found.aligned.words)
    assert sorted(again.phones) == sorted(found.aligned.phones)
    with pytest.raises(HearsaeError, match="not empty"):
        export_times(store, timings, tmp_path / "out", form)


@pytest.mark.parametrize(("form", "files"), [("textgrid", [""]), ("ctm", ["/words.ctm", "/phones.ctm"])])
def test_files_of_times_may_be_in_an_object_store(tmp_path, s3, form, files):
    store, found, timings = timed_store(tmp_path, ["x/a.wav", "y/a.wav"])
    folder = f"s3://{s3.bucket}/times"
    export_times(store, timings, location(folder), form)
    again = imported(store, *(folder + file for file in files)).aligned
    assert sorted(again.phones) == sorted(found.aligned.phones)
    with pytest.raises(HearsaeError, match="not empty"):
        export_times(store, timings, location(folder), form)


def test_no_name_leads_out_of_the_folder(tmp_path):
    store, _, timings = timed_store(tmp_path, ["../../a.wav", "/etc/b.wav"])
    export_times(store, timings, tmp_path / "in" / "out", "textgrid")
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.TextGrid"))
    assert written == ["in/out/a.TextGrid", "in/out/etc/b.TextGrid"]


def test_what_a_format_can_not_say_is_refused(tmp_path):
    store, _, timings = timed_store(tmp_path, ["a b.wav"])
    with pytest.raises(HearsaeError, match="no spaces: use --format jsonl"):
        export_times(store, timings, tmp_path / "out", "ctm")
    store, _, timings = timed_store(tmp_path / "two", ["a.wav", "a.mp3"])
    with pytest.raises(HearsaeError, match="use --format jsonl"):
        export_times(store, timings, tmp_path / "out", "textgrid")
