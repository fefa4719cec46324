"""Sources and decoding: what is read, at what length, and what is said of what can't be."""

import io
import json
import os
import re
import shutil
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import fill_store

from cache import micro
from cache.audio import load_clip, open_source, reopen_source
from cache.decode import decode, header_samples
from cache.errors import HearsaeError, SourceError
from cache.plan import SkippedSource, SourceItem, make_plan

RATE = 16000


def tone(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """float32 [n] or [n, channels]: 220 Hz and some noise."""
    t = np.arange(round(seconds * rate)) / rate
    wave = (0.3 * np.sin(2 * np.pi * 220 * t) + 0.03 * np.random.default_rng(0).standard_normal(len(t))).astype(np.float32)
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def write(path: Path, wave: np.ndarray, rate: int = RATE, **form: str) -> Path:
    soundfile.write(path, wave, rate, **form)
    return path


def cut(path: Path, part: float = 0.5) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * part)])
    return path


def items(source) -> dict[str, SourceItem | SkippedSource]:
    return {item.source: item for item in source.items()}


def why_skipped(source) -> dict[str, str]:
    """What planning skips, and what only decoding finds."""
    reasons = {}
    for item in source.items():
        if isinstance(item, SkippedSource):
            reasons[item.source] = item.reason
            continue
        try:
            source.read(item.source, item.source_row, item.offset_samples / RATE, item.n_samples)
        except SourceError as error:
            reasons[item.source] = str(error)
    return reasons


# Decoding


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 192000])
@pytest.mark.parametrize("form", ["wav", "flac"])
def test_every_rate_becomes_16_khz_of_the_announced_length(tmp_path, rate, form):
    path = write(tmp_path / f"a.{form}", tone(1.3, rate), rate)
    n = header_samples(path)
    assert abs(n - 1.3 * RATE) <= 1
    samples = decode(path, 0, n)
    assert samples.shape == (n,) and samples.dtype == np.float32
    assert np.abs(np.fft.rfft(samples * np.hanning(n))).argmax() == round(220 * n / RATE)


def test_channels_are_averaged(tmp_path):
    waves = np.stack([tone(0.5) * (channel + 1) / 8 for channel in range(8)], axis=1)
    path = write(tmp_path / "a.wav", waves, subtype="FLOAT")
    np.testing.assert_allclose(decode(path, 0, 8000), waves.mean(axis=1), atol=1e-7)


def test_a_part_is_decoded_as_it_lies_in_the_whole(tmp_path):
    path = write(tmp_path / "a.flac", tone(3))
    np.testing.assert_array_equal(decode(path, 1.25, 8000), decode(path, 0, 48000)[20000:28000])


@pytest.mark.parametrize("form", [{"format": "MP3"}, {"format": "OGG", "subtype": "VORBIS"}, {"format": "OGG", "subtype": "OPUS"}])
@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_lossy_files_last_as_long_as_their_headers_say(tmp_path, form, rate):
    if (form.get("subtype"), rate) == ("OPUS", 44100):
        pytest.skip("Opus has no 44.1 kHz")
    path = write(tmp_path / "a", tone(3.3, rate), rate, **form)
    n = header_samples(path)
    assert abs(n - 3.3 * RATE) <= 2
    assert len(decode(path, 2.0, n - 2 * RATE)) == n - 2 * RATE


def mp3_without_a_length(path: Path, mode: str) -> Path:
    """5 s of MP3 from its second frame on: the first holds the length."""
    with soundfile.SoundFile(path, "w", 44100, 1, format="MP3", bitrate_mode=mode, compression_level=0.5) as file:
        file.write(tone(5, 44100))
    data = path.read_bytes()
    path.write_bytes(data[[match.start() for match in re.finditer(b"\xff\xfb", data[:3000])][1] :])
    return path


def test_an_mp3_that_does_not_say_its_length_is_counted_or_refused(tmp_path):
    path = mp3_without_a_length(tmp_path / "a.mp3", "CONSTANT")
    n = header_samples(path)
    assert n == header_samples(io.BytesIO(path.read_bytes()))
    assert abs(n - 5 * RATE) < 0.1 * RATE
    assert len(decode(path, 0, n)) == n
    with pytest.raises(SourceError, match="varying bitrate"):
        header_samples(mp3_without_a_length(tmp_path / "b.mp3", "VARIABLE"))


def test_wav_written_into_a_pipe_is_read(tmp_path):
    path = write(tmp_path / "a.wav", tone(1))
    data = bytearray(path.read_bytes())
    for field in (4, data.index(b"data") + 4):
        data[field : field + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert header_samples(path) == RATE


def test_bad_files_are_skipped_each_with_its_reason(tmp_path):
    write(tmp_path / "good.wav", tone(1))
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no sound\n" * 50)
    (tmp_path / "headless.wav").write_bytes(b"RIFF\0\0\0\0WAVE")
    for name, value in (("nan", np.nan), ("inf", np.inf), ("loud", 1e30)):
        wave = tone(1)
        wave[500] = value
        write(tmp_path / f"{name}.wav", wave, subtype="FLOAT")
    write(tmp_path / "nothing.wav", np.zeros(0, np.float32))
    cut(write(tmp_path / "cut.flac", tone(3)))
    cut(write(tmp_path / "cut.wav", tone(3)))
    cut(write(tmp_path / "cut.aiff", tone(3)))
    (tmp_path / "film.m4a").write_bytes(b"\0\0\0 ftypM4A " + b"\0" * 400)
    (tmp_path / "gone.wav").symlink_to("/nonexistent")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    source = open_source(str(tmp_path))
    expected = {
        "empty.wav": "can't be decoded",
        "text.wav": "can't be decoded",
        "headless.wav": "can't be decoded",
        "nan.wav": "NaN",
        "inf.wav": "NaN or infinite",
        "loud.wav": "full scale is 1",
        "cut.flac": "can't be decoded",
        "cut.wav": "ends after 1.50 s; 3.00 s",
        "cut.aiff": "ends after 1.50 s; 3.00 s",
        "film.m4a": "can't be decoded",
        "gone.wav": "no such file",
        "pipe.wav": "not a file",
    }
    reasons = why_skipped(source)
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[name] for name, words in expected.items())
    plan = make_plan(source.items())
    assert {"source": "nothing.wav", "source_row": 0, "reason": "it has no samples"} in plan.skipped.to_pylist()


def test_what_comes_before_the_cut_is_kept(tmp_path):
    path = cut(write(tmp_path / "a.wav", tone(4)))
    assert header_samples(path) == 4 * RATE
    assert len(decode(path, 0, RATE)) == RATE
    with pytest.raises(SourceError, match="ends after"):
        decode(path, 1.5, RATE)


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_absurd_rates_are_refused(tmp_path, rate):
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 2036, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * 2 % 2**32, 2, 16, b"data", 2000)
    (tmp_path / "a.wav").write_bytes(head + b"\0" * 2000)
    with pytest.raises(SourceError, match="samples a second"):
        header_samples(tmp_path / "a.wav")


# Folders and metadata


def test_names_are_taken_as_they_are(tmp_path):
    names = ["ünïcødé 音声 😀.flac", "two\nlines.wav", "-rf *;$(touch pwned).wav", "<b>bold</b>.wav".replace("/", "∕"), ".hidden.wav", "UPPER.WAV"]
    for name in names:
        write(tmp_path / name, tone(0.1), format="WAV")
    with open(os.fsencode(tmp_path) + b"/bad\xff.wav", "wb") as file:
        file.write((tmp_path / ".hidden.wav").read_bytes())
    found = items(open_source(str(tmp_path)))
    assert {name for name, item in found.items() if isinstance(item, SourceItem)} == set(names)
    assert [item.reason for item in found.values() if isinstance(item, SkippedSource)] == ["its name is not valid UTF-8"]


def test_metadata_gives_text_and_speaker_and_leads_nowhere_else(tmp_path):
    write(tmp_path / "a.wav", tone(0.1))
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.wav", tone(0.1))
    write(tmp_path / "c.wav", tone(0.1))
    rows = [{"file_name": "./a.wav", "transcription": "one", "speaker_id": 3, "mood": "good"}]
    rows += [{"file_name": name} for name in ("gone.wav", "../outside.wav", "/etc/passwd", "sub/../../outside.wav", "nul\0.wav")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.wav,two,too many\n")
    found = items(open_source(str(tmp_path)))
    assert found["a.wav"] == SourceItem("a.wav", 0, 1600, text="one", speaker="3", extra={"mood": "good"})
    assert (found["sub/b.wav"].text, found["c.wav"].text) == ("two", None)
    skipped = {name: item.reason for name, item in found.items() if isinstance(item, SkippedSource)}
    assert skipped.keys() == {"gone.wav", "../outside.wav", "/etc/passwd", "sub/../../outside.wav", "nul\0.wav"}
    assert "no such file" in skipped["gone.wav"] and "leads out" in skipped["../outside.wav"] and "leads out" in skipped["/etc/passwd"]
    with pytest.raises(SourceError, match="leads out"):
        open_source(str(tmp_path)).read("../outside.wav", 0, 0.0, 100)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", b'{"file_name":"a.wav"}\n{"file_name": oops}\n', "metadata.jsonl:2: not JSON"),
        ("metadata.jsonl", b'{"text":"hello"}\n', "metadata.jsonl:1: there is no file_name"),
        ("metadata.jsonl", b"[1]\n", "metadata.jsonl:1: not a JSON object"),
        ("metadata.jsonl", b'{"file_name":"a.wav","text":"\xff"}\n', "not UTF-8"),
        ("metadata.jsonl", b'{"file_name":"a.wav","text":"\\ud800"}\n', "metadata.jsonl:1: not Unicode"),
        ("metadata.jsonl", b'{"a":' * 5000 + b"1" + b"}" * 5000, "metadata.jsonl:1: can't be read"),
        ("metadata.jsonl", b'{"file_name":"a.wav","n":' + b"9" * 5000 + b"}", "metadata.jsonl:1: can't be read"),
        ("metadata.csv", b"name,text\na.wav,hello\n", "metadata.csv:2: there is no file_name"),
        ("metadata.csv", b"file_name,text\na.wav,\xff\n", "metadata.csv can't be read"),
        ("metadata.parquet", b"PAR1", "metadata.parquet can't be read"),
    ],
)
def test_metadata_that_can_not_be_read_names_the_place(tmp_path, name, content, words):
    write(tmp_path / "a.wav", tone(0.1))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=re.escape(words)):
        list(open_source(str(tmp_path)).items())


def test_odd_columns_are_kept_as_text(tmp_path):
    values = [{"n": 1, "mixed": 1, "big": 10**30, "none": {}}, {"n": 2, "mixed": "s", "big": 1, "none": {}}]
    plan = make_plan([SourceItem(f"{i}.wav", 0, 16000, extra=extra) for i, extra in enumerate(values)], shuffle=False)
    pq.write_table(plan.clips, tmp_path / "clips.parquet")
    clips = pq.read_table(tmp_path / "clips.parquet")
    assert [clips[name].to_pylist() for name in ("n", "mixed", "big", "none")] == [[1, 2], ["1", "s"], [str(10**30), "1"], ["{}", "{}"]]


def test_a_folder_without_audio_and_splits_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(SourceError, match="no audio files"):
        list(open_source(str(tmp_path)).items())
    for split in ("test", "..", "/etc", "../" + tmp_path.name):
        with pytest.raises(SourceError, match=r"has no split .*; it has: train"):
            open_source(str(tmp_path), split)
    for spec in ("", "/nonexistent", "./nonexistent", str(tmp_path / "a.jsonl"), str(tmp_path / "a.parquet"), "/dev/null"):
        with pytest.raises(SourceError):
            open_source(spec)


# The speech that comes with hearsae


def test_one_file_is_a_dataset_with_what_is_said_of_it(tmp_path):
    for name in ("a.wav", "b.wav"):
        write(tmp_path / name, tone(1.0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "text": "hello", "age": 7}\n{"file_name": "b.wav", "text": "bye"}\n')
    source = open_source(str(tmp_path / "a.wav"))
    (item,) = source.items()
    assert (item.source, item.n_samples, item.text, item.extra) == ("a.wav", RATE, "hello", {"age": 7})
    again = reopen_source(json.loads(json.dumps(source.describe())))
    assert np.array_equal(again.read("a.wav", 0, 0.0, RATE), decode(tmp_path / "a.wav", 0.0, RATE))
    (tmp_path / "notes.m4a").touch()
    assert "notes.m4a" in why_skipped(open_source(str(tmp_path / "notes.m4a")))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SourceError, match="neither a folder, an audio file"):
        open_source(str(tmp_path / "notes.txt"))


def test_micro_has_words_by_speakers_who_are_in_one_split_only():
    splits = {split: list(open_source("micro", split).items()) for split in ("train", "test")}
    found = [item for items in splits.values() for item in items]
    assert all(isinstance(item, SourceItem) and item.text and item.speaker and item.extra["accent"] for item in found)
    assert not {item.speaker for item in splits["train"]} & {item.speaker for item in splits["test"]}
    times = [json.loads(line) for line in (micro.SPEECH / "alignments.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in times) == sorted(item.source for item in found)
    with pytest.raises(SourceError, match=r"no split 'dev'; it has: test, train"):
        open_source("micro", "dev")


def test_micro_is_a_name_and_with_a_slash_a_path(tmp_path, monkeypatch):
    (tmp_path / "micro").mkdir()
    write(tmp_path / "micro" / "mine.wav", tone(1))
    monkeypatch.chdir(tmp_path)
    assert items(open_source("./micro")).keys() == {"mine.wav"}
    assert "mine.wav" not in items(open_source("micro"))


def test_micro_is_found_again_from_a_store_by_another_installation(tmp_path, monkeypatch):
    source = open_source("micro", "test")
    described = json.loads(json.dumps(source.describe()))
    assert described["kind"] == "micro" and str(micro.SPEECH) not in json.dumps(described)
    item = next(source.items())
    here = source.read(item.source, 0, 0.0, item.n_samples)
    monkeypatch.setattr(micro, "SPEECH", Path(shutil.copytree(micro.SPEECH, tmp_path / "speech")))
    np.testing.assert_array_equal(reopen_source(described).read(item.source, 0, 0.0, item.n_samples), here)
    with open(tmp_path / "speech" / "alignments.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(SourceError, match="another in this version of hearsae"):
        reopen_source(described)
    shutil.rmtree(tmp_path / "speech")
    with pytest.raises(SourceError, match="this installation of hearsae lacks the speech of micro"):
        reopen_source(described)


# Manifests


def test_a_manifest_names_parts_of_files(tmp_path):
    write(tmp_path / "a.wav", tone(2))
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "b.wav", tone(1))
    rows = [
        {"audio_filepath": str(tmp_path / "a.wav"), "offset": 0.5, "duration": 1.0, "text": "one"},
        {"audio": "b.wav", "offset": "0.25"},
        {"audio": "b.wav", "duration": 1.01},
        {"audio": "b.wav", "duration": 3},
        {"audio": "b.wav", "offset": 5},
        {"audio": "b.wav", "offset": -1},
        {"audio": "b.wav", "duration": 0},
        {"audio": "../a.wav"},
        {"audio": "gone.wav"},
        {"audio": "/dev/zero"},
    ]
    manifest = tmp_path / "here" / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(manifest))
    found = list(source.items())
    lengths = [item.n_samples if isinstance(item, SourceItem) else item.reason for item in found]
    assert lengths[:4] == [16000, 12000, 16160, 48000]
    for reason, words in zip(lengths[4:], ["nothing is left"] * 3 + ["leads out", "no such file", "not a file"], strict=True):
        assert words in reason
    np.testing.assert_array_equal(source.read(found[0].source, 0, 0.5, 16000), decode(tmp_path / "a.wav", 0, 32000)[8000:24000])
    assert len(source.read("b.wav", 2, 0.0, 16160)) == 16160  # one hundredth of a second more than there is: rounding
    with pytest.raises(SourceError, match="ends after"):
        source.read("b.wav", 3, 0.0, 48000)
    with pytest.raises(SourceError, match="leads out"):
        source.read("../a.wav", 7, 0.0, 16000)


@pytest.mark.parametrize("value", ['"x"', "NaN", "Infinity", "[1]", "{}"])
def test_durations_that_are_no_numbers_name_the_line(tmp_path, value):
    (tmp_path / "m.jsonl").write_text('{"audio":"a.wav","duration":' + value + "}")
    with pytest.raises(SourceError, match=r"m\.jsonl:1: offset and duration must be numbers"):
        list(open_source(str(tmp_path / "m.jsonl")).items())


def test_lengths_that_nothing_has_are_skipped():
    plan = make_plan([SourceItem("a", 0, 16000), SourceItem("b", 0, 16000 * 10**9), SourceItem("c", 0, 10**300)])
    assert [row["source"] for row in plan.skipped.to_pylist()] == ["b", "c"]
    assert "hours" in plan.skipped["reason"][0].as_py()


# Datasets


@pytest.fixture
def rows(tmp_path):
    """Rows of a dataset: two that are audio, three that are not."""
    good = [write(tmp_path / "x.flac", tone(1)).read_bytes(), write(tmp_path / "y.wav", tone(0.5, 44100), 44100).read_bytes()]
    audio = [{"bytes": data, "path": "x.flac"} for data in good] + [{"bytes": b"junk", "path": None}, {"bytes": None, "path": None}, None]
    return {"audio": audio, "sentence": [f"text {i}" for i in range(5)], "clip": list(range(5))}


def check_rows(source) -> None:
    found = list(source.items())
    assert [item.n_samples for item in found[:2]] == [16000, 8000]
    assert [item.text for item in found[:2]] == ["text 0", "text 1"]
    assert [item.reason.split(" (")[0] for item in found[2:]] == ["it can't be decoded", "the row has no audio", "the row has no audio"]
    again = reopen_source(source.describe())
    for item in found[:2]:
        assert len(again.read(item.source, item.source_row, 0.0, item.n_samples)) == item.n_samples
    assert len(again.read(found[0].source, 0, 0.0, 16000)) == 16000  # back to the first row, in a stream too


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_saved_to_disk(tmp_path, rows, streaming):
    saved = datasets.Dataset.from_dict(rows)
    saved.save_to_disk(tmp_path / "disk")
    check_rows(open_source(str(tmp_path / "disk"), streaming=streaming))
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    check_rows(open_source(str(tmp_path / "splits"), "test", streaming=streaming))
    with pytest.raises(SourceError, match=r"several splits.* train, test"):
        open_source(str(tmp_path / "splits"), streaming=streaming)
    with pytest.raises(SourceError, match="no split 'dev'; it has: train, test"):
        open_source(str(tmp_path / "splits"), "dev", streaming=streaming)


def test_a_dataset_whose_audio_would_be_decoded_is_read_as_bytes(tmp_path):
    audio = [{"bytes": write(tmp_path / "x.wav", tone(1)).read_bytes(), "path": "x.wav"}]
    datasets.Dataset.from_dict({"audio": audio}).cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "disk")
    (item,) = open_source(str(tmp_path / "disk")).items()
    assert isinstance(item, SourceItem)
    assert (item.n_samples, item.extra) == (16000, {"file": "x.wav"})


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_of_bytes(tmp_path, rows, streaming):
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    check_rows(open_source(str(tmp_path / "a.parquet"), streaming=streaming))
    pq.write_table(pa.table({**rows, "audio": [row and row["bytes"] for row in rows["audio"]]}), tmp_path / "plain.parquet")
    check_rows(open_source(str(tmp_path / "plain.parquet"), streaming=streaming))


def test_datasets_without_audio_or_of_nothing_are_refused(tmp_path, capfd):
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="no audio column; its columns are: text, n"):
        open_source(str(tmp_path / "a.parquet"))
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 junk")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    capfd.readouterr()
    for path in ("junk.parquet", "broken"):
        with pytest.raises(SourceError, match="can't be loaded"):
            open_source(str(tmp_path / path))
    assert capfd.readouterr() == ("", "")


def test_a_hub_dataset_without_a_network_fails_at_once_and_quietly(capfd, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    with pytest.raises(SourceError, match=r"no network here \(hub.invalid is unknown\)"):
        open_source("nobody/nothing")
    assert capfd.readouterr() == ("", "")


# Hearing a clip again


def test_a_clip_is_found_again_from_the_store(tmp_path):
    folder = tmp_path / "sound"
    folder.mkdir()
    write(folder / "a.flac", tone(1.5))
    source = open_source(str(folder))
    plan = make_plan(source.items(), clip_seconds=1.0)
    store = fill_store(tmp_path / "store", plan, {"encoder.blocks.0": 4}, lambda site, clip, n: np.ones((n, 4)))
    whole = decode(folder / "a.flac", 0, 24000)
    for clip in range(2):
        first = round(store.clips["start_s"][clip].as_py() * RATE)
        np.testing.assert_array_equal(load_clip(store, clip, source), whole[first : first + RATE])
    (folder / "a.flac").unlink()
    with pytest.raises(SourceError, match="no such file"):
        load_clip(store, 0, source)
    with pytest.raises(HearsaeError, match="kind"):
        load_clip(store, 0)  # this made-up store names no source
