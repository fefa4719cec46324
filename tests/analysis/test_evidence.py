"""What phone evidence says of features that are known to be one thing or another, what it leaves in a scan's folder, and how it is read."""

import json
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import evidence_twin as twin
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import asset, fill_store, plan_of
from scan_twin import SITE, save_sae

from analysis.arpabet import CLASSES, MANNERS, PHONES, manner
from analysis.evidence import PhoneEvidence, measure
from analysis.features import Neurons, open_features
from analysis.phone_counts import count_shard, merge_counts
from analysis.phone_details import detail_shard, merge_details
from analysis.phone_figure import draw_mix
from analysis.phone_kernels import RANGES
from analysis.phone_labels import labels_of
from analysis.phone_scores import auc_table, jackknife, leave_one_out, polysemanticity, student_95
from analysis.phone_table import stretches
from analysis.phones import label_frames, phone_auc, read_alignments
from analysis.scan import Scan, ScanOptions, scan
from analysis.scan_folder import PHONE_FILES, remove
from cache.errors import HearsaeError
from cache.plan import SourceItem, make_plan
from cache.store import ActivationStore

SOUNDS = ("AE", "IY", "UW", "T", "D", "S", "M", "N", "L", "SIL")
ONE, TWO_LEVELS, EQUAL, NOISE, PERFECT, DELAYED, ZERO, NEGATIVE, SHUT, CLASS = range(10)
"""Features: a noisy detector of T; T at the top and M below; T and M at every level; nothing; exactly T; the same 40 ms late; always 0; always
below 0, highest in T; zero in T and below elsewhere, but for M, where it is active; all stops alike."""


def speech(store_clips: int = 72, seconds: float = 4.0) -> list[tuple[int, float, float, str]]:
    rng = np.random.default_rng(4)
    rows = []
    for clip in range(store_clips):
        bounds = np.round(np.cumsum(rng.uniform(0.05, 0.13, 60)), 2)
        rows += [(clip, start, end, str(rng.choice(SOUNDS))) for start, end in pairwise(bounds[bounds < seconds])]
    return rows


def made_up(frames_of: dict[int, list[str | None]], site: str, clip: int, n: int) -> np.ndarray:
    """Rows whose columns are the features above."""
    rng = np.random.default_rng(clip)
    said = np.array(frames_of[clip][:n])
    t, m, unit = said == "T", said == "M", rng.uniform(0, 1, n)
    rows = np.zeros((n, 10))
    noise = np.where(rng.uniform(size=n) < 0.1, 0.5 * unit, 0)
    rows[:, ONE] = np.where(t, 0.1 + 0.9 * unit, noise)
    rows[:, TWO_LEVELS] = np.where(t, 0.6 + 0.4 * unit, np.where(m, 0.1 + 0.4 * unit, noise / 2))
    rows[:, EQUAL] = np.where(t | m, 0.1 + 0.9 * unit, noise)
    rows[:, NOISE] = np.where(rng.uniform(size=n) < 0.3, unit, 0)
    rows[:, PERFECT] = t
    rows[:, DELAYED] = np.r_[[0, 0], t[:-2]]
    rows[:, NEGATIVE] = t - 2
    rows[:, SHUT] = np.where(t, 0, np.where(m & (unit < 0.5), 1, -1))
    rows[:, CLASS] = t | (said == "D")
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """72 clips of 24 speakers."""
    items = [SourceItem(f"s{i}.wav", 0, 64000, speaker=f"speaker {i % 24}") for i in range(72)]
    plan = make_plan(items, shard_rows=2048, chunk_rows=512)
    frames: dict[int, list[str | None]] = {}
    for clip in range(72):
        own = [(round(start * 1000), round(end * 1000), label) for c, start, end, label in speech() if c == clip]
        frames[clip] = [next((p for start, end, p in own if start <= 20 * i + 10 < end), None) for i in range(200)]
    return fill_store(tmp_path_factory.mktemp("speech") / "acts.zarr", plan, {SITE: 10}, partial(made_up, frames))


@pytest.fixture(scope="module")
def labels(store):
    return labels_of(twin.phone_table(speech()), store.clips)


@pytest.fixture(scope="module")
def scanned(store, labels, tmp_path_factory) -> Scan:
    out = tmp_path_factory.mktemp("scan") / "out"
    scanned = scan(store, f"neurons:{SITE}", out, ScanOptions(top=3, per_bin=2))
    measure(open_features(f"neurons:{SITE}", store), store, labels, out)
    return scanned


@pytest.fixture(scope="module")
def evidence(scanned) -> PhoneEvidence:
    return PhoneEvidence.open(scanned)


@pytest.fixture(scope="module")
def rows(evidence) -> list[dict]:
    return evidence.scores.to_pylist()


# Features that are known


def test_a_perfect_detector_is_perfect_in_everything(rows):
    row = rows[PERFECT]
    assert row["phone"] == "T" and row["auc"] == row["auc_lo"] == row["auc_hi"] == row["auc_active"] == 1
    assert row["f1"] == row["precision"] == row["recall"] == row["threshold"] == 1
    assert -10 <= row["onset_ms"] <= 10 and row["onset_ms_lo"] <= row["onset_ms"] <= row["onset_ms_hi"]
    assert row["pmi"] == pytest.approx(np.log2(len(SOUNDS)), abs=0.3) and row["pmi_lo"] < row["pmi"] < row["pmi_hi"]
    assert row["polysemanticity"] == 0 and row["phones_at_top"] == 1
    assert row["auc_shuffled"] < 0.56 and row["p_value"] == pytest.approx(1 / 9)


def test_a_late_detector_is_late(rows):
    assert rows[DELAYED]["phone"] == "T" and rows[DELAYED]["onset_ms"] - rows[PERFECT]["onset_ms"] == pytest.approx(40, abs=2.5)
    assert 0.3 < rows[DELAYED]["f1"] < 0.9


def test_a_noisy_detector_of_one_phone_is_not_polysemantic(rows):
    row = rows[ONE]
    assert row["phone"] == "T" and row["auc"] > 0.9 and row["phones_at_top"] == 1
    assert row["polysemanticity_lo"] == 0 and row["polysemanticity"] < 0.05


def test_a_detector_whose_lower_range_is_another_phone_is(rows):
    row = rows[TWO_LEVELS]
    assert row["phone"] == "T" and row["phones_at_top"] == 1
    assert row["polysemanticity_lo"] > 0.9


def test_two_phones_at_every_level_are_two_at_the_top_and_no_change(rows):
    assert rows[EQUAL]["phone"] in ("T", "M") and rows[EQUAL]["phones_at_top"] == pytest.approx(2, abs=0.1)
    assert rows[EQUAL]["polysemanticity"] < 0.05


def test_noise_tells_nothing(rows):
    row = rows[NOISE]
    assert row["auc"] < 0.56 and row["p_value"] > 0.2 and row["f1"] < 0.4 and abs(row["selectivity"]) < 0.2
    assert row["polysemanticity"] is None and row["phones_at_top"] is None


def test_what_is_never_active_follows_no_phone(rows, evidence):
    """Whatever its values below zero do: every phone's AUC is there to be read, but none is the feature's own."""
    auc = {row["phone"]: row["auc"] for row in evidence.auc.to_pylist() if row["feature"] == NEGATIVE}
    assert auc["T"] == 1
    for row in (rows[NEGATIVE], rows[ZERO]):
        assert row["phone"] is None and row["auc"] is None and row["p_value"] is None and row["phone_class"] is None
        assert all(row[name] is None for name in ("threshold", "f1", "precision", "recall", "pmi", "onset_ms", "polysemanticity"))


def test_a_phone_that_shuts_a_feature_off_is_not_its_phone(rows, evidence):
    auc = {row["phone"]: row["auc"] for row in evidence.auc.to_pylist() if row["feature"] == SHUT and row["kind"] == "phone"}
    assert auc["T"] > auc["M"] and rows[SHUT]["phone"] == "M"


def test_a_class_is_told_as_one(rows):
    row = rows[CLASS]
    assert row["phone_class"] in ("stop",) and row["class_auc"] == 1 and row["auc"] < 1
    assert row["selectivity"] > 2


# Statistics


def test_students_quantile_is_that_of_tables():
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (19, 2.093), (100, 1.984)):
        assert student_95(freedom) == pytest.approx(quantile, rel=0.004)


@pytest.mark.parametrize("sizes", [[100] * 20, [20, 300, 50, 80, 120, 10, 200, 90, 60, 100]])
def test_intervals_hold_the_truth_as_often_as_they_say(sizes):
    """Groups whose rate differs from group to group, as speakers do; the truth is the rate of all speakers."""
    rng = np.random.default_rng(0)
    sizes, covered, n = np.array(sizes), 0, 600
    for _ in range(n):
        counts = np.stack([rng.binomial(sizes, np.clip(rng.normal(0.4, 0.05, len(sizes)), 0, 1)), sizes], axis=1)
        both = leave_one_out(counts)
        value, low, high = jackknife(both[:, 0] / both[:, 1], sizes.astype(float), 0, 1)
        assert low <= value <= high
        covered += low <= 0.4 <= high
    assert 0.9 <= covered / n <= 0.99


def test_one_group_gives_no_interval():
    value, low, high = jackknife(np.array([0.7, np.nan, 0.7]), np.array([30, 0]))
    assert value == 0.7 and np.isnan([low, high]).all()


@pytest.mark.parametrize("dilution", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("frames", [400, 4000])
def test_frames_at_random_do_not_change_the_score(dilution, frames):
    """The lower activations, of the same phone or of another one, mixed with the base rate."""
    rng = np.random.default_rng(1)
    base = rng.dirichlet(np.full(40, 5.0))
    counts = np.round(1e6 * base).astype(np.int64)

    def score(lower_phone: int) -> float:
        # A phone lasts four frames: they come together.
        mix = dilution * base + (1 - dilution) * np.eye(40)[lower_phone]
        strata = np.stack([4 * rng.multinomial(50, np.eye(40)[3]), 4 * rng.multinomial(frames // 4, mix)])
        return float(polysemanticity(strata, counts)[0])

    same, other = [score(3) for _ in range(50)], [score(7) for _ in range(50)]
    assert np.mean(same) < 0.05 and np.mean(other) > 0.85


def test_lower_activations_that_follow_the_base_rate_alone_are_no_change():
    base = np.full(40, 1000)
    strata = np.stack([np.eye(40, dtype=int)[3] * 200, np.full(40, 100)])
    change, at_top = polysemanticity(strata, base)
    assert change == 0 and at_top == 1
    assert np.isnan(polysemanticity(strata[::-1], base)[0])


def test_every_phone_has_one_manner_and_one_voicing():
    assert all(sum(phone in CLASSES[name] for name in MANNERS) == 1 and manner(phone) is not None for phone in PHONES)
    assert CLASSES["voiced"] | CLASSES["unvoiced"] == PHONES and not CLASSES["voiced"] & CLASSES["unvoiced"]
    heights = CLASSES["front vowel"] | CLASSES["central vowel"] | CLASSES["back vowel"] | CLASSES["diphthong"]
    assert heights == CLASSES["vowel"] and manner("SIL") is None and manner("X") is None


# The folder


@pytest.mark.parametrize("kind", ["neurons", "sae"])
def test_any_split_over_workers_gives_the_same_bytes(tmp_path, kind):
    store = twin.made_up_store(tmp_path / "acts.zarr")
    spec = f"neurons:{SITE}" if kind == "neurons" else f"sae:{save_sae(tmp_path / 'sae', d_in=8, d_sae=24)}"
    features, labels = open_features(spec, store), labels_of(twin.timings(store), store.clips)
    rng = np.random.default_rng(2)

    def shuffled(function, merge):
        left = [function(shard) for shard in store.committed(SITE)]
        while len(left) > 1:
            a, b = rng.choice(len(left), 2, replace=False)
            left = [part for i, part in enumerate(left) if i not in (a, b)] + [merge(left[a], left[b])]
        return left[0]

    measure(features, store, labels, tmp_path / "here")
    for i in range(3):
        measure(features, store, labels, tmp_path / f"there{i}", reduce_shards=shuffled)
        for name in PHONE_FILES:
            assert (tmp_path / f"there{i}" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


def test_counts_that_a_scan_made_serve_as_the_first_pass(store, labels, scanned, tmp_path):
    features = open_features(f"neurons:{SITE}", store)
    counts = count_shard(features, store, labels, 0)
    for shard in store.committed(SITE)[1:]:
        counts = merge_counts(counts, count_shard(features, store, labels, shard))
    measure(features, store, labels, tmp_path / "out", counts=counts)
    assert all((tmp_path / "out" / name).read_bytes() == (scanned.path / name).read_bytes() for name in PHONE_FILES)
    with pytest.raises(HearsaeError, match="changed while it was scanned"):
        measure(features, store, labels, tmp_path / "out", counts=count_shard(features, store, labels, 0))


def test_the_tables_have_a_row_for_everything_and_null_where_there_is_no_answer(evidence, scanned, labels):
    assert evidence.scores["feature"].to_pylist() == list(range(10))
    table = evidence.auc
    assert table.num_rows == 10 * (len(SOUNDS) + len(CLASSES)) and set(table["kind"].to_pylist()) == {"phone", "class"}
    of_one = [row for row in table.to_pylist() if row["feature"] == ONE]
    assert [row["phone"] for row in of_one] == [*sorted(SOUNDS), *CLASSES]
    assert {row["phone"]: row["auc"] for row in of_one}["glide"] is None
    counts = evidence.counts(TWO_LEVELS).to_pylist()
    assert counts == sorted(counts, key=lambda row: (row["phone"], row["lo"])) and all(row["frames"] > 0 for row in counts)
    frames = {phone: sum(row["frames"] for row in counts if row["phone"] == phone) for phone in SOUNDS}
    assert frames == evidence.base == {row["phone"]: row["frames"] for row in of_one if row["kind"] == "phone"}
    assert all((row["lo"] == 0) == (row["hi"] == 0) or row["lo"] < row["hi"] for row in counts)
    assert not any("nan" in str(value) for name in evidence.scores.column_names for value in evidence.scores[name].to_pylist())


def test_the_mix_of_a_feature_is_that_of_all_frames(evidence, scanned, store):
    mix = evidence.mix(TWO_LEVELS)
    edges = scanned.features["range_edges"][TWO_LEVELS].as_py()
    np.testing.assert_allclose(mix.edges, edges)
    assert mix.frames.shape == (RANGES, len(SOUNDS)) and mix.base.sum() == pytest.approx(1)
    assert mix.frames.sum() == sum(row["frames"] for row in evidence.counts(TWO_LEVELS).to_pylist() if row["lo"] >= 0 and row["hi"] > 0)
    assert [stretch.phone for stretch in stretches(mix)][:2] == ["T", "M"]
    assert evidence.mix(ZERO).frames.sum() == 0 and stretches(evidence.mix(ZERO)) == []
    with pytest.raises(HearsaeError, match="there is no feature 10"):
        evidence.mix(10)


def test_a_scan_without_phones_says_so(scanned, tmp_path):
    other = tmp_path / "scan"
    other.mkdir()
    for path in scanned.path.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    remove(other, PHONE_FILES)
    assert not PhoneEvidence.exists(Scan.open(other)) and PhoneEvidence.exists(scanned)
    with pytest.raises(HearsaeError, match=r"has no phones: run 'hearsae align' on its store, then 'hearsae scan' again"):
        PhoneEvidence.open(Scan.open(other))
    (other / "phone_scores.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(HearsaeError, match="can't be read"):
        _ = PhoneEvidence.open(Scan.open(other)).scores


def test_a_decoder_site_has_no_phones(tmp_path, labels):
    site = "decoder.blocks.0"
    store = fill_store(
        tmp_path / "acts.zarr", plan_of([1.0, 2.0], tokenize=lambda text, language: range(5)), {site: 4}, lambda site, clip, n: np.ones((n, 4))
    )
    with pytest.raises(HearsaeError, match="has tokens, not frames"):
        measure(open_features(f"neurons:{site}", store), store, labels, tmp_path / "out")


def test_labels_of_other_clips_are_refused(store, tmp_path):
    labels = labels_of(twin.phone_table([(0, 90.0, 91.0, "T")]), store.clips)
    with pytest.raises(HearsaeError, match=r"no frame of .* lies in a phone"):
        measure(open_features(f"neurons:{SITE}", store), store, labels, tmp_path / "out")


# The command


def test_the_command_lists_features_and_counts_detectors(scanned, succeeds, tmp_path):
    found = succeeds("phones", scanned.path, "--features", "0-2,4", "--out", tmp_path / "rows.csv")
    assert [row["feature"] for row in found["rows"]] == [0, 1, 2, 4] and found["rows"][1]["ranges"].startswith("T 100")
    assert found["summary"]["features"] == 10 and found["summary"]["auc"]["above_0.9"] >= 4 and found["summary"]["auc_shuffled"]["above_0.8"] == 0
    assert (tmp_path / "rows.csv").read_text().startswith('"feature","phone","auc"')
    best = succeeds("phones", scanned.path)
    assert best["rows"][0]["auc"] == 1 and len(best["rows"]) == 8  # those that are ever active
    poly = succeeds("phones", scanned.path, "--polysemantic", "3", "--out", tmp_path / "rows.parquet") if best["summary"]["significant"] else None
    assert poly is None or pq.read_table(tmp_path / "rows.parquet").num_rows == len(poly["rows"])


def test_the_command_says_it_to_people(scanned, capfd):
    from cluster.cli import main

    assert main(["phones", str(scanned.path), "--features", "1"]) == 0
    out = capfd.readouterr().out
    assert "from high to low activation" in out and "of 10 features, AUC above 0.8 / above 0.9:" in out
    (line,) = [line for line in out.splitlines() if line.startswith("1 ")]
    assert line.split()[1] == "T" and "T 100" in line and "M" in line


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_figure_is_drawn_and_the_same_each_time(scanned, succeeds, tmp_path, suffix):
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        assert succeeds("phones", scanned.path, "--feature", TWO_LEVELS, "--figure", path)["figure"] == str(path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second and first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_the_figure_shows_each_ranges_shares_frames_and_the_base_rate(evidence):
    mix = evidence.mix(TWO_LEVELS)
    (axes,) = draw_mix(mix, "title of $ dollars").axes
    heights = {(round(bar.get_x() + bar.get_width() / 2, 3)): 0.0 for bar in axes.patches}
    for bar in axes.patches:
        heights[round(bar.get_x() + bar.get_width() / 2, 3)] += bar.get_height()
    assert set(heights) == {*np.flatnonzero(mix.frames.sum(axis=1)).tolist(), RANGES + 0.5}
    assert all(height == pytest.approx(1) for height in heights.values())
    texts = [text.get_text() for text in axes.texts]
    assert [text.replace(",", "") for text in texts if text.replace(",", "").isdigit()] == [str(n) for n in mix.frames.sum(axis=1)]
    assert "T 100%" in texts and "base rate" in texts


def test_matplotlib_is_loaded_only_where_something_is_drawn():
    code = "import sys, analysis.phone_figure, cluster.commands.phones; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_what_the_command_can_not_do_is_one_line(scanned, store, refused, tmp_path):
    assert "--feature N and --figure" in refused("phones", scanned.path, "--feature", 1)
    assert "must end in .png or .svg" in refused("phones", scanned.path, "--feature", 1, "--figure", tmp_path / "a.pdf")
    assert "must end in .csv or .parquet" in refused("phones", scanned.path, "--out", tmp_path / "a.txt")
    assert "there is no feature 99" in refused("phones", scanned.path, "--features", "99")
    assert "exclude each other" in refused("phones", scanned.path, "--features", "1", "--polysemantic", 3)
    assert "must be at least 1" in refused("phones", scanned.path, "--polysemantic", 0)
    plain = scan(store, f"neurons:{SITE}", tmp_path / "plain", ScanOptions(top=1, per_bin=1))
    assert "run 'hearsae align'" in refused("phones", plain.path)


# Real speech


def test_real_neurons_have_the_auc_of_all_pairs_within_the_stated_error(tmp_path, succeeds):
    """The error that docs/phones.md states, on 12 clips."""
    from cache.location import location

    site, speech = "encoder.blocks.2.mlp.1", asset("speech")
    weights = asset("whisper/tiny.en.encoder.pt")
    path = tmp_path / "acts.zarr"
    succeeds("cache", "--dataset", speech / "test", "--model", weights, "--sites", site, "--limit", 12, "--out", path, "--no-ray")
    store = ActivationStore.open(location(str(path)))
    names = {Path(source).name: source for source in store.clips["source"].to_pylist()}
    alignments = {names[Path(name).name]: found for name, found in read_alignments(speech / "alignments.jsonl").items() if Path(name).name in names}
    lines = (json.loads(line) for line in (speech / "alignments.jsonl").read_text().splitlines())
    of_clip = {source: clip for clip, source in enumerate(store.clips["source"].to_pylist())}
    found = {of_clip[names[Path(line["file_name"]).name]]: line["phones"] for line in lines if Path(line["file_name"]).name in names}
    labels = labels_of(twin.phone_table([(clip, *segment) for clip in sorted(found) for segment in found[clip]]), store.clips)
    features = open_features(f"neurons:{site}", store)
    exact = phone_auc(store, features, label_frames(store, site, alignments))
    counts = count_shard(features, store, labels, store.committed(site)[0])
    for shard in store.committed(site)[1:]:
        counts = merge_counts(counts, count_shard(features, store, labels, shard))
    table = auc_table(counts, labels.phones)
    assert exact.phones == labels.phones and (exact.frames == counts.frames).all() and counts.frames.sum() > 2000
    often = counts.frames >= 30
    error = np.abs(table.auc[:, : table.n_phones] - exact.auc)[:, often]
    tied = phone_auc(store, _TinyTie(site, features.count), label_frames(store, site, alignments))
    error_beside_tiny = np.abs(table.auc[:, : table.n_phones] - tied.auc)[:, often]
    assert error.mean() < 0.005 and error_beside_tiny.mean() < 0.0015 and error_beside_tiny.max() < 0.03


class _TinyTie(Neurons):
    """Neurons whose values below the grid, smaller than 2^-12 in size, are one value for either sign: they tie in one bin."""

    def dense(self, rows: np.ndarray) -> np.ndarray:
        values = super().dense(rows)
        return np.where((np.abs(values) < 2.0**-12) & (values != 0), np.copysign(np.float32(2.0**-13), values), values)


def test_a_shard_alone_and_details_of_it_are_plain_values(store, labels):
    """What workers send each other can be pickled, and one of two passes may run elsewhere than the other."""
    import pickle

    from analysis.phone_scores import targets

    features = open_features(f"neurons:{SITE}", store)
    counts = pickle.loads(pickle.dumps(count_shard(features, store, pickle.loads(pickle.dumps(labels)), 0)))
    sought = pickle.loads(pickle.dumps(targets(counts, auc_table(counts, labels.phones))))
    details = pickle.loads(pickle.dumps(detail_shard(features, store, labels, sought, 0)))
    assert (details.frames.sum(axis=0) == counts.frames).all() and (merge_details(details, details).frames == 2 * details.frames).all()
