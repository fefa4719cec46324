"""`hearsae experiment erase`: where three features carry a concept it finds the three, and without them nothing; micro's phones are found too."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import fill_store, plan_of

from analysis.concepts import PARTS, choose_samples, open_track, sample_values
from analysis.erasure import first_below, grid
from analysis.features import open_features
from cache.plan import SourceItem, make_plan
from cache.store import ActivationStore
from cache.timings import INTERVALS, UNALIGNED, write_timings

SITE = "encoder.blocks.0"
WIDTH = 16
CARRIERS = {2, 5, 7}
"""The columns that are larger while /s/ is said. Column 11 is larger in clips of colour red, whoever speaks; column 13 tells the speakers apart."""
PHONE_FRAMES = 5


def said(clip: int, n: int) -> np.ndarray:
    """What is said in each frame of a clip: phones of five frames."""
    drawn = np.random.default_rng(clip).choice(["S", "AA", "T", "IY"], -(-n // PHONE_FRAMES))
    return np.repeat(drawn, PHONE_FRAMES)[:n]


def planted_store(path, speakers=8, clips=64) -> ActivationStore:
    colour = np.where(np.random.default_rng(0).permutation(clips) % 2, "red", "blue").tolist()
    items = [SourceItem(f"s{i}.wav", 0, 16000, text="x", speaker=f"p{i % speakers}", extra={"colour": colour[i]}) for i in range(clips)]
    plan = make_plan(items, shard_rows=1024, chunk_rows=256)
    red = np.array(plan.clips["colour"].to_pylist()) == "red"
    speaker = np.array([int(name[1:]) for name in plan.clips["speaker"].to_pylist()])

    def rows_of(site, clip, n):
        rows = np.random.default_rng(1000 + clip).standard_normal((n, WIDTH))
        for column in CARRIERS:
            rows[:, column] += 2.0 * (said(clip, n) == "S")
        rows[:, 11] += 2.0 * red[clip]
        rows[:, 13] += 3.0 * speaker[clip]
        return rows

    store = fill_store(path, plan, {SITE: WIDTH}, rows_of)
    phones = []
    for clip in range(clips):
        labels = said(clip, 50)[::PHONE_FRAMES]
        phones += [{"clip": clip, "start_s": 0.1 * i, "end_s": 0.1 * (i + 1), "label": str(label)} for i, label in enumerate(labels)]
    nothing = INTERVALS.empty_table()
    write_timings(store, nothing, pa.Table.from_pylist(phones, schema=INTERVALS), UNALIGNED.empty_table(), {"method": "x", "phone_set": "arpabet"})
    return ActivationStore.open(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("planted") / "acts.zarr")


@pytest.fixture(scope="module")
def erased(planted, tmp_path_factory):
    from cluster.cli import main

    out = tmp_path_factory.mktemp("erase") / "report"
    arguments = [
        "--store",
        str(planted.path),
        "--features",
        f"neurons:{SITE}",
        "--concept",
        "phone:S",
        "--k",
        "1",
        "3",
        "--no-ray",
        "--out",
        str(out),
    ]
    assert main(["experiment", "erase", *arguments]) == 0
    summary = json.loads((out / "result.json").read_text())["summary"]
    return summary, summary["results"][0], pq.read_table(out / "rows.parquet").to_pylist(), out


def scores(rows, order, m=None, k=None):
    (row,) = (row for row in rows if row["order"] == order and row["m"] == m and row["k"] == k)
    return row["balanced_accuracy"]


def test_a_sparse_probe_finds_the_three_features_that_carry_a_concept(erased):
    _, result, rows, _ = erased
    assert set(result["features"]["3"]) == CARRIERS
    assert scores(rows, "chosen", k=3) > 0.93
    assert scores(rows, "chosen", k=1) < scores(rows, "chosen", k=3) - 0.05
    assert scores(rows, "shuffled", k=3) < 0.55 and result["control"]["by_k_shuffled"]["3"] == scores(rows, "shuffled", k=3)


def test_without_these_three_nothing_is_left_of_it(erased):
    _, result, rows, _ = erased
    assert result["alive"] == WIDTH and result["works"]
    assert scores(rows, "ranked", m=0) > 0.93
    assert result["until_chance"] == 3 and result["until_chance_share"] == 3 / WIDTH
    assert 1 < result["until_half"] <= 3
    assert scores(rows, "ranked", m=WIDTH) == 0.5


def test_features_that_go_in_random_order_take_longer_and_shuffled_labels_fail_at_once(erased):
    summary, result, rows, _ = erased
    assert result["until_chance_random"] > 3
    assert all(row["balanced_accuracy"] < 0.6 for row in rows if row["kind"] == "erase" and row["order"] == "shuffled")
    assert summary["control"][f"neurons:{SITE}"]["dense_shuffled"] < 0.55 < result["dense"]["balanced_accuracy"]


def test_a_probe_that_is_not_trained_again_fails_no_later(erased):
    _, result, rows, _ = erased
    assert scores(rows, "silenced", m=0) == scores(rows, "ranked", m=0)
    assert result["until_chance_silenced"] <= result["until_chance"]


def test_the_report_has_its_pictures_and_one_row_for_each_k_and_m(erased):
    _, _, rows, out = erased
    assert {"erasure.png", "sparse.svg", "index.html", "rows.parquet"} <= {path.name for path in out.iterdir()}
    assert sorted(row["k"] for row in rows if row["kind"] == "probe" and row["order"] == "chosen") == [1, 3]
    ms = [row["m"] for row in rows if row["kind"] == "erase" and row["order"] == "ranked"]
    assert len(ms) == len(set(ms)) and set(grid(WIDTH)) <= set(ms)


def test_a_column_of_the_clips_is_a_concept_too_and_neurons_stand_beside_other_features(planted, succeeds, tmp_path):
    result = succeeds("experiment", "erase", "--store", planted.path, "--features", f"random:{SITE}", "--concept", "colour=red", "--folds", "4",
                      "--no-ray", "--out", tmp_path / "r")["summary"]  # fmt: skip
    other, neurons = result["results"]
    assert (result["pool"], result["by"], result["clips"]) == ("mean", "speaker", 64)
    assert neurons["basis"] == f"neurons:{SITE}" and neurons["features"]["1"] == [11] and neurons["until_chance"] == 1
    assert other["basis"] == f"random:{SITE}" and other["until_chance"] > 1  # no direction of a random basis has it alone


def test_no_speaker_is_in_two_parts_unless_it_is_the_concept(planted):
    speaker = np.array(planted.clips["speaker"].to_pylist())
    for concept, pooled in (("phones", False), ("colour", True)):
        samples = choose_samples(planted, SITE, open_track(planted, concept), 10**6, pooled)
        heard = [set(speaker[samples.clip[samples.part == part]]) for part in range(PARTS)]
        assert sum(map(len, heard)) == len(set.union(*heard)) == 8
    samples = choose_samples(planted, SITE, open_track(planted, "speaker"), 10**6, True)
    assert all(set(speaker[samples.clip[samples.part == part]]) == set(speaker) for part in range(PARTS))


def test_samples_are_no_more_than_wanted_half_of_them_with_a_single_concept_and_labelled_as_said(planted):
    track = open_track(planted, "phone:S")
    samples = choose_samples(planted, SITE, track, 400, False)
    assert len(samples.clip) == 400 and track.concepts["phone:S"][samples.label].sum() == 200
    assert [track.names[label] for label in samples.label] == [said(c, 50)[f] for c, f in zip(samples.clip, samples.frame, strict=True)]
    again, other = choose_samples(planted, SITE, track, 400, False), choose_samples(planted, SITE, track, 400, False, seed=1)
    assert (again.frame == samples.frame).all() and (again.clip == samples.clip).all()
    assert (other.clip != samples.clip).any()
    assert set(choose_samples(planted, SITE, track, 400, False, limit=5).clip) == set(range(5))


def test_the_values_of_samples_are_those_of_the_store(planted):
    features = [open_features(f"neurons:{SITE}", planted), open_features(f"random:{SITE}", planted)]
    whole = {clip: planted.read_clip(SITE, clip).astype(np.float32) for clip in range(planted.clips.num_rows)}
    for pool in ("none", "mean", "max"):
        track = open_track(planted, "phone:S" if pool == "none" else "colour")
        samples = choose_samples(planted, SITE, track, 300, pool != "none")
        parts = [sample_values(planted, features, samples, pool, shard) for shard in planted.committed(SITE)]
        for number, one in enumerate(features):
            of_clip = {clip: one.dense(rows) for clip, rows in whole.items()}
            wanted = [
                of_clip[c][f] if pool == "none" else getattr(of_clip[c], pool)(0) for c, f in zip(samples.clip.tolist(), samples.frame, strict=True)
            ]
            np.testing.assert_allclose(np.concatenate([part[number] for part in parts]), np.array(wanted), rtol=1e-5, atol=1e-5)


def test_what_must_go_is_counted_to_where_the_accuracy_stays_down():
    line = [(0, 0.9), (1, 0.5), (2, 0.8), (5, 0.55), (10, 0.5)]
    assert first_below(line, 0.6) == 5
    assert first_below(line, 0.52) == 10
    assert first_below(line, 0.95) == 0
    assert grid(3) == [0, 1, 2, 3]
    assert grid(100)[:5] == [0, 1, 2, 5, 10] and grid(100)[-2:] == [90, 100]


@pytest.fixture(scope="module")
def micro_store(tmp_path_factory):
    from cluster.cli import main

    path = tmp_path_factory.mktemp("micro") / "acts.zarr"
    assert main(["cache", "--split", "train", "--limit", "48", "--sites", "encoder.blocks.2", "--out", str(path), "--no-ray", "--dataset", "micro",
                 "--model", "micro"]) == 0  # fmt: skip
    assert main(["align", "--store", str(path), "--import", "micro", "--no-ray"]) == 0
    return path


@pytest.mark.slow
def test_micro_hears_an_s_whoever_says_it(micro_store, succeeds, tmp_path):
    result = succeeds("experiment", "erase", "--store", micro_store, "--features", "neurons:encoder.blocks.2", "--concept", "phone:S", "--no-ray",
                      "--out", tmp_path / "r")["summary"]  # fmt: skip
    (found,) = result["results"]
    assert found["dense"]["balanced_accuracy"] > 0.9
    assert found["by_k"]["1"] < found["by_k"]["20"]
    assert abs(found["control"]["dense_shuffled"] - 0.5) < 0.1
    assert found["until_chance_random_share"] >= found["until_chance_share"] > 0.3  # it is spread over many neurons


def test_what_cannot_be_probed_is_refused_in_a_line(planted, refused, tmp_path):
    def says(*arguments, store=planted.path):
        return refused("experiment", "erase", "--store", store, "--features", f"neurons:{SITE}", "--no-ray", "--out", tmp_path / "r", *arguments)

    assert "use phones, phone:AA, class:vowel, or a column" in says("--concept", "mood")
    assert "no class 'loud'" in says("--concept", "class:loud")
    assert "nobody says 'ZH'" in says("--concept", "phone:ZH")
    assert "no clip" in says("--concept", "colour=green") and "red" in says("--concept", "colour=green")
    assert "not pooled" in says("--concept", "phone:S", "--pool", "max")
    assert "can't be probed" in says("--concept", "text")
    assert "between 1 and 4" in says("--folds", "5")
    assert "at least 1" in says("--k", "0")
    few = fill_store(tmp_path / "few.zarr", plan_of([1.0] * 9), {SITE: 4}, lambda site, clip, n: np.ones((n, 4)))
    assert "3 speakers, and 4 are needed" in says("--concept", "text", store=few.path)
    assert "run 'hearsae align" in says("--concept", "phones", store=few.path)
    nameless = make_plan([SourceItem(f"s{i}.wav", 0, 16000, text="x") for i in range(4)])
    unknown = fill_store(tmp_path / "unknown.zarr", nameless, {SITE: 4}, lambda site, clip, n: np.ones((n, 4)))
    assert "does not say who speaks" in says("--concept", "text", store=unknown.path)
    assert not (tmp_path / "r").exists()
