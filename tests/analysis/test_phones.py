"""Phones of frames, and the AUC of features, against brute force."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import fill_store, plan_of
from scan_twin import SITE, save_sae

from analysis.features import open_features
from analysis.phones import (
    UNLABELLED,
    Alignment,
    FrameLabels,
    PhoneTable,
    Segment,
    best_phone,
    frame_phones,
    label_frames,
    phone_auc,
    read_alignments,
)
from cache.errors import HearsaeError

SECONDS = [0.5, 0.31, 0.8, 0.42, 0.6]
PHONES = ["SIL", "AE", "T", "IY", "ZH"]
INDEX = {phone: i for i, phone in enumerate(PHONES)}


def alignments(seed=0) -> dict[str, Alignment]:
    """Of the clips s0 ... s3, phones of 10 to 90 ms; the first begins late, and s4 has none."""
    rng = np.random.default_rng(seed)
    found = {}
    for i, seconds in enumerate(SECONDS[:4]):
        bounds = np.round(0.017 + np.cumsum(rng.uniform(0.01, 0.09, 40)), 3)
        bounds = np.r_[bounds[bounds < seconds], seconds]
        phones = [Segment(start, end, str(rng.choice(PHONES))) for start, end in pairwise(bounds)]
        found[f"s{i}.wav"] = Alignment([], phones)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five clips in several shards, one of them skipped; column 0 is constant, the others are of few distinct values, so that many tie."""
    rng = np.random.default_rng(1)

    def rows_of(site, clip, n):
        rows = rng.integers(-3, 4, (n, 8)) / 2
        rows[:, 0] = 1
        return rows

    plan = plan_of(SECONDS, shard_rows=64, chunk_rows=32)
    skipped = {plan.clips["source"].to_pylist().index("s1.wav"): "unreadable"}
    return fill_store(tmp_path_factory.mktemp("acts") / "acts.zarr", plan, {SITE: 8}, rows_of, skip=skipped)


def brute_labels(store, found):
    """(clip, frame, label) of every stored frame, by the rule, in exact arithmetic of thousandths."""
    rows = []
    for shard in store.committed(SITE):
        for span in store.spans(shard, SITE):
            phones = found.get(store.clips["source"][span.clip].as_py(), Alignment([], [])).phones
            for frame in range(span.stop - span.start):
                middle = 20 * frame + 10
                inside = [phone for start, end, phone in phones if round(start * 1000) <= middle < round(end * 1000)]
                rows.append((span.clip, frame, inside[0] if inside else None))
    return rows


def brute_auc(values, is_phone):
    inside, outside = values[is_phone][:, None], values[~is_phone][None]
    return ((inside > outside) + (inside == outside) / 2).mean()


def test_a_frame_belongs_to_the_phone_that_holds_its_middle():
    phones = [Segment(0.0, 0.03, "SIL"), Segment(0.03, 0.05, "AE"), Segment(0.05, 0.055, "T"), Segment(0.09, 0.13, "IY")]
    # middles: 10, 30 (AE starts there), 50 (AE ends there), 70 (no phone), 90, 110, 130 ms (the end of IY)
    labels = frame_phones(phones, 7, 0.0, INDEX)
    assert [PHONES[label] if label != UNLABELLED else None for label in labels] == ["SIL", "AE", "T", None, "IY", "IY", None]


def test_a_middle_on_a_boundary_never_falls_to_the_earlier_phone():
    for frame in range(1500):
        boundary = float(f"{0.02 * frame + 0.01:.2f}")
        labels = frame_phones([Segment(0.0, boundary, "AE"), Segment(boundary, 31.0, "T")], 1500, 0.0, INDEX)
        assert (labels[:frame] == INDEX["AE"]).all() and (labels[frame:] == INDEX["T"]).all()


def test_a_clip_that_starts_later_in_its_file_sees_the_phones_of_its_own_time():
    phones = [Segment(30.0, 30.1, "AE"), Segment(30.1, 31.0, "T")]
    labels = frame_phones(phones, 10, 30.0, INDEX)
    assert (labels[:5] == INDEX["AE"]).all() and (labels[5:] == INDEX["T"]).all()


def test_every_stored_frame_is_labelled_in_the_order_of_its_address(store):
    found = alignments()
    labels = label_frames(store, SITE, found)
    expected = [phone for _, _, phone in brute_labels(store, found)]
    assert [labels.phones[label] if label != UNLABELLED else None for label in labels.label] == expected
    assert None in expected and len(set(expected)) == len(PHONES) + 1 and list(labels.phones) == sorted(PHONES)


@pytest.mark.parametrize("kind", ["neurons", "random", "sae"])
@pytest.mark.parametrize("buffer_bytes", [1, 1000, 1 << 20])
def test_auc_is_the_share_of_pairs_in_the_right_order(store, tmp_path, kind, buffer_bytes):
    spec = f"{kind}:{SITE}" if kind != "sae" else f"sae:{save_sae(tmp_path / 'sae', d_in=8, d_sae=24)}"
    features, labels = open_features(spec, store), label_frames(store, SITE, alignments())
    table = phone_auc(store, features, labels, buffer_bytes)
    rows = np.concatenate([store.read_clip(SITE, clip) for shard in store.committed(SITE) for clip, _, _ in store.spans(shard, SITE)])
    values, used = features.dense(rows), labels.label != UNLABELLED
    assert table.auc.shape == (features.count, len(PHONES))
    for i in range(len(PHONES)):
        is_phone = labels.label[used] == i
        assert table.frames[i] == is_phone.sum() > 0
        for feature in range(features.count):
            assert table.auc[feature, i] == pytest.approx(brute_auc(values[used, feature], is_phone), abs=1e-12)
    if kind == "neurons":
        np.testing.assert_array_equal(table.auc[0], 0.5)  # a constant says nothing
    if kind == "sae":
        assert (values == 0).mean() > 0.2 and (values > 0).any()


def test_a_perfect_detector_has_auc_1(tmp_path):
    found = alignments()
    plan = plan_of(SECONDS, shard_rows=64, chunk_rows=32)

    def detector(site, clip, n):
        phones = found.get(plan.clips["source"][clip].as_py(), Alignment([], [])).phones
        return np.stack([frame_phones(phones, n, 0.0, INDEX) == i for i in range(len(PHONES))], axis=1)

    store = fill_store(tmp_path / "acts.zarr", plan, {SITE: len(PHONES)}, detector)
    table = phone_auc(store, open_features(f"neurons:{SITE}", store), label_frames(store, SITE, found))
    best = best_phone(table)
    assert [table.phones[phone] for phone in best.phone] == PHONES
    np.testing.assert_array_equal(best.auc, 1.0)


def test_best_phone_considers_only_what_it_is_told_to():
    table = PhoneTable(("A", "B", "SIL"), np.array([50, 5, 100]), np.array([[0.7, 0.9, 0.95], [0.2, 0.6, 0.5]]))
    assert best_phone(table).phone.tolist() == [2, 1] and best_phone(table).auc.tolist() == [0.95, 0.6]
    assert best_phone(table, without=["SIL"]).phone.tolist() == [1, 1]
    assert best_phone(table, without=["SIL"], least_frames=10).auc.tolist() == [0.7, 0.2]
    assert best_phone(table, without=["SIL"], least_frames=10, either_sign=True).auc.tolist() == [0.7, 0.8]
    with pytest.raises(HearsaeError, match="no phone has 200 frames"):
        best_phone(table, least_frames=200)


def test_a_phone_without_frames_is_never_best(store):
    labels = label_frames(store, SITE, alignments())
    more = FrameLabels((*labels.phones, "OY"), labels.label)
    table = phone_auc(store, open_features(f"neurons:{SITE}", store), more)
    assert np.isnan(table.auc[:, -1]).all() and table.frames[-1] == 0
    np.testing.assert_array_equal(best_phone(table).auc, best_phone(phone_auc(store, open_features(f"neurons:{SITE}", store), labels)).auc)


def test_alignments_are_read_by_file_name(tmp_path: Path):
    path = tmp_path / "alignments.jsonl"
    path.write_text(json.dumps({"file_name": "train/a.flac", "words": [[0.1, 0.2, "a"]], "phones": [[0.1, 0.2, "AX"]], "more": 1}) + "\n")
    assert read_alignments(path) == {"train/a.flac": Alignment([Segment(0.1, 0.2, "a")], [Segment(0.1, 0.2, "AX")])}


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"file_name": "a", "words": [], "phones": [[0, 1]]}', '{"file_name": "a", "words": 3, "phones": []}']
)
def test_what_is_no_alignment_is_one_line(tmp_path: Path, line):
    path = tmp_path / "alignments.jsonl"
    path.write_text('{"file_name": "b", "words": [], "phones": []}\n' + line)
    with pytest.raises(HearsaeError, match=r"alignments.jsonl, line 2 is no alignment"):
        read_alignments(path)


def test_alignments_that_are_not_there_or_of_other_speech_are_one_line(tmp_path: Path, store):
    with pytest.raises(HearsaeError, match="can't be read: No such file"):
        read_alignments(tmp_path / "none.jsonl")
    with pytest.raises(HearsaeError, match=r"no clip of .* has an alignment"):
        label_frames(store, SITE, {"other.wav": Alignment([], [Segment(0, 1, "AE")])})
