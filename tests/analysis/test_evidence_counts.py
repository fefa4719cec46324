"""What the two passes of phone evidence count, against loops over every frame."""

import pickle
from functools import reduce

import evidence_twin as twin
import numpy as np
import pytest
from scan_twin import SITE, save_sae

from analysis.features import open_features
from analysis.phone_counts import PhoneCounts, count_shard, merge_counts, no_counts, spread
from analysis.phone_details import PhoneDetails, Targets, detail_shard, histograms, merge_details, no_details
from analysis.phone_kernels import BINS, LATENCY_US, RANGES, WINDOW_US, ZERO, bin_lo_hi, bin_of
from analysis.phone_labels import GROUPS, LEAST_SHIFT, PhoneLabels, groups_of, labels_of, rotation
from analysis.phone_scores import auc_table, may_be_best, median_latency_ms, pmi, targets, tolerant_f1
from cache.errors import HearsaeError
from cache.store import ActivationStore


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    store = twin.made_up_store(tmp_path_factory.mktemp("acts") / "acts.zarr")
    assert len(store.committed(SITE)) >= 4
    return store


@pytest.fixture(scope="module")
def labels(store) -> PhoneLabels:
    return labels_of(twin.timings(store), store.clips, seed=3)


@pytest.fixture(scope="module", params=["neurons", "random", "sae"])
def features(request, store, tmp_path_factory):
    spec = f"sae:{save_sae(tmp_path_factory.mktemp('sae') / 'sae', d_in=8, d_sae=24)}" if request.param == "sae" else f"{request.param}:{SITE}"
    return open_features(spec, store)


@pytest.fixture(scope="module")
def parts(features, store, labels) -> list[PhoneCounts]:
    return [count_shard(features, store, labels, shard) for shard in store.committed(SITE)]


@pytest.fixture(scope="module")
def counts(parts) -> PhoneCounts:
    return reduce(merge_counts, parts)


@pytest.fixture(scope="module")
def clips(store, features, labels) -> list[twin.Clip]:
    return twin.clips(store, features, twin.timings(store), labels)


@pytest.fixture(scope="module")
def sought(features, counts, labels) -> Targets:
    """As the first pass finds them, but that also a few frames make a top, and that every other feature detects seldom."""
    found = targets(counts, auc_table(counts, labels.phones))
    top_from = np.where(counts.high > 0, counts.high / 2.0, np.inf)
    seldom = np.isfinite(found.threshold) & (np.arange(features.count) % 2 == 0)
    threshold = np.where(seldom, 0.9 * counts.high, found.threshold).astype(np.float32)
    return found._replace(top_from=top_from, lower_from=top_from / 5, threshold=threshold)


@pytest.fixture(scope="module")
def details(features, store, labels, sought) -> PhoneDetails:
    return reduce(merge_details, [detail_shard(features, store, labels, sought, shard) for shard in store.committed(SITE)])


# Labels


def test_stress_is_taken_off_and_what_is_not_arpabet_stays(store):
    rows = [(0, 0.0, 0.1, "AH0"), (0, 0.1, 0.2, "AH1"), (0, 0.2, 0.3, "T"), (0, 0.3, 0.4, "ah1"), (0, 0.4, 0.5, "T1"), (0, 0.5, 0.6, "5")]
    assert labels_of(twin.phone_table(rows), store.clips).phones == ("5", "AH", "T", "T1", "ah1")


def test_a_store_without_phones_is_one_line(store):
    with pytest.raises(HearsaeError, match="run 'hearsae align'"):
        labels_of(twin.timings(store).slice(0, 0), store.clips)


def test_shuffled_labels_turn_a_clip_by_half_a_second_or_more_and_depend_on_seed_and_clip():
    turns = {(seed, clip, n): rotation(seed, clip, n) for seed in range(3) for clip in range(40) for n in (1, 2, 3, 74, 75, 76, 1500)}
    assert all(min(LEAST_SHIFT, n // 3) <= turn <= n - min(LEAST_SHIFT, n // 3) for (_, _, n), turn in turns.items())
    assert len({turns[0, clip, 1500] for clip in range(40)}) > 30 and [turns[0, c, 1500] for c in range(40)] != [turns[1, c, 1500] for c in range(40)]


def test_a_speakers_clips_are_in_one_group_and_the_groups_are_evenly_filled(store):
    clips = store.clips
    group = groups_of(clips)
    speakers = clips["speaker"].to_pylist()
    assert all(len({group[i] for i in range(len(group)) if speakers[i] == speaker}) == 1 for speaker in "abc") and len(set(group)) == 3
    unknown = clips.set_column(clips.column_names.index("speaker"), "speaker", [[None] * clips.num_rows])
    assert len(set(groups_of(unknown))) == clips.num_rows < GROUPS


# First pass


def test_bins_are_told_by_comparison_with_their_edges():
    lo, hi = bin_lo_hi()
    assert len(lo) == BINS and (lo[1:] == hi[:-1]).all() and (lo[ZERO], hi[ZERO]) == (0, 0)
    edges = lo[ZERO + 2 :].astype(np.float32)
    for values in (edges, np.nextafter(edges, np.float32(0)), np.array([0, 1e-40, 1e-9, 7e4, 1e30], np.float32)):
        for signed in (values, -values):
            assert bin_of(signed).tolist() == [twin.bin_number(float(value)) for value in signed]


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_labelled_frame_is_counted_once(counts, clips, features, labels, shuffled):
    assert labels.phones == twin.PHONES and counts.rows == sum(len(clip.labels) for clip in clips)
    assert any(None in clip.labels for clip in clips)
    for some, by_phone in spread(counts, shuffled):
        for feature in range(some.start, some.stop):
            expected = np.zeros((len(labels.phones), BINS), int)
            for (phone, bin_), frames in twin.counts(clips, feature, shuffled).items():
                expected[labels.phones.index(phone), bin_] = frames
            np.testing.assert_array_equal(by_phone[feature - some.start], expected)
    values = np.concatenate([clip.values for clip in clips])
    np.testing.assert_array_equal(counts.high, values.max(axis=0))


def test_auc_is_the_share_of_pairs_in_the_right_order_of_bins(counts, clips, features, labels):
    table = auc_table(counts, labels.phones)
    for track, auc in (("labels", table.auc), ("shuffled", table.shuffled)):
        said = np.array([label for clip in clips for label in getattr(clip, track)])
        bins = bin_of(np.concatenate([clip.values for clip in clips]))[said != None]  # noqa: E711
        said = said[said != None]  # noqa: E711
        for name, members in (("IY", {"IY"}), ("SIL", {"SIL"}), ("vowel", {"AE", "IY"}), ("unvoiced", {"T"}), ("voiced", {"AE", "IY", "ZH"})):
            column, inside = table.names.index(name), np.isin(said, list(members))
            assert table.frames[column] == inside.sum()
            for feature in range(features.count):
                expected = twin.auc(bins[inside, feature].tolist(), bins[~inside, feature].tolist())
                assert auc[feature, column] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(table.auc[:, table.names.index("nasal")]).all()


def test_the_best_phone_is_no_silence_and_one_in_which_the_feature_is_active(counts, labels, sought, clips):
    table = auc_table(counts, labels.phones)
    allowed = may_be_best(table, False, table.responds)
    assert not allowed[:, labels.phones.index("SIL")].any()
    values, said = np.concatenate([clip.values for clip in clips]), np.array([label for clip in clips for label in clip.labels])
    known = said != None  # noqa: E711
    for feature, phone in enumerate(sought.phone):
        shares = {name: (values[said == name, feature] > 0).mean() for name in labels.phones if name != "SIL"}
        candidates = [name for name, share in shares.items() if share >= (values[known, feature] > 0).mean() and share > 0]
        best = max(candidates, key=lambda name: table.auc[feature, labels.phones.index(name)]) if candidates else None
        assert (labels.phones[phone] if phone >= 0 else None) == best


def test_the_threshold_gives_the_best_f1_of_all_edges(counts, clips, labels):
    sought = targets(counts, auc_table(counts, labels.phones))
    lo, _ = bin_lo_hi()
    values, said = np.concatenate([clip.values for clip in clips]), np.array([label for clip in clips for label in clip.labels])
    known = said != None  # noqa: E711

    def f1(feature, phone, edge):
        active = (values[:, feature] >= edge) & (values[:, feature] > 0) & known
        return 2 * (active & (said == phone)).sum() / (active.sum() + (said == phone).sum())

    for feature, phone in enumerate(sought.phone):
        if phone < 0 or counts.high[feature] <= 0:
            assert np.isinf(sought.threshold[feature])
            continue
        best = max(f1(feature, labels.phones[phone], edge) for edge in lo[ZERO + 1 :])
        assert f1(feature, labels.phones[phone], sought.threshold[feature]) == best > 0


# Second pass


def test_the_second_pass_counts_what_loops_over_frames_count(details, sought, clips, features, labels, counts):
    names = ["detected", "hits", "near hits", "found"]
    seen = 0
    for feature in range(features.count):
        if sought.phone[feature] < 0 or not np.isfinite(sought.threshold[feature]):
            assert not details.latency[feature].any()
            continue
        phone = labels.phones[sought.phone[feature]]
        expected = twin.detail(clips, feature, phone, sought.threshold[feature], float(counts.high[feature]), sought.top_from[feature])
        seen += sum(expected.latency.values())
        for group in range(GROUPS):
            assert details.detected[feature, group].tolist() == [expected.detected[group, name] for name in names]
            latency = np.zeros_like(details.latency[feature, group])
            for (g, ms), n in expected.latency.items():
                latency[(ms * 1000 - WINDOW_US[0]) // LATENCY_US] += n * (g == group)
            np.testing.assert_array_equal(details.latency[feature, group], latency)
            for i, stratum in enumerate(("top", "lower")):
                assert details.strata[feature, group, i].tolist() == [expected.strata[group, stratum, p] for p in labels.phones]
        assert details.ranges[feature].tolist() == [[expected.ranges[i, p] for p in labels.phones] for i in range(RANGES)]
    assert seen > 50


def test_histograms_by_group_add_up_to_those_of_the_first_pass(details, sought, counts):
    by_phone = np.concatenate([part for _, part in spread(counts)])
    by_phone[..., ZERO] = 0
    for feature, histogram in enumerate(histograms(details, sought)):
        if sought.phone[feature] < 0:
            continue
        own = slice(sought.first_bin[feature], sought.first_bin[feature] + sought.n_bins[feature])
        members = sought.members[sought.class_of[feature]]
        expected = by_phone[feature].sum(axis=0), by_phone[feature, sought.phone[feature]], by_phone[feature, members].sum(axis=0)
        np.testing.assert_array_equal(histogram.sum(axis=0), [part[own] for part in expected])
        assert all(part.sum() == part[own].sum() for part in expected)


def test_frames_beside_a_phone_count_as_its_in_the_base_too(details, clips, labels):
    for q, phone in enumerate(labels.phones):
        expected = np.zeros((GROUPS, len(labels.phones)), int)
        for clip in clips:
            for frame, label in enumerate(clip.labels):
                if label is not None:
                    near = phone in clip.labels[max(0, frame - 1) : frame + 2]
                    expected[clip.group, q if near else labels.phones.index(label)] += 1
        np.testing.assert_array_equal(details.near_frames[:, q], expected)


# Merging


def test_any_order_and_grouping_of_shards_gives_the_same_counts(parts, counts, features, labels):
    rng = np.random.default_rng(0)
    empty = no_counts(features.count, len(labels.phones))
    for _ in range(5):
        left = [pickle.loads(pickle.dumps(part)) for part in (*parts, empty)]
        while len(left) > 1:
            a, b = rng.choice(len(left), 2, replace=False)
            left = [part for i, part in enumerate(left) if i not in (a, b)] + [merge_counts(left[a], left[b])]
        for one, other in zip(_arrays(left[0]), _arrays(counts), strict=True):
            np.testing.assert_array_equal(one, other)


def _arrays(counts: PhoneCounts) -> list[np.ndarray]:
    return [np.array(counts.rows), counts.frames, counts.high, np.array(counts.first_bin), counts.table, *counts.cells, *counts.shuffled]


def test_details_of_no_rows_change_nothing(details, sought):
    for one, other in zip(merge_details(no_details(sought), details), details, strict=True):
        np.testing.assert_array_equal(one, other)


# What is made of the counts


def test_f1_and_pmi_of_counts():
    precision, recall, f1 = tolerant_f1(np.array([50, 30, 40, 60]), np.array(80))
    assert (precision, recall) == (0.8, 0.75) and f1 == pytest.approx(2 * 0.8 * 0.75 / 1.55)
    assert pmi(np.array(30), np.array(50), np.array(80), np.array(1000)) == pytest.approx(np.log2(30 * 1000 / (50 * 80)))
    assert np.isnan(pmi(np.array(0), np.array(50), np.array(80), np.array(1000)))


def test_the_median_latency_is_interpolated_in_its_bin():
    latency = np.zeros(60, int)
    latency[[18, 20, 25]] = [1, 2, 1]  # from -10, 0 and 25 ms on
    assert median_latency_ms(latency) == 2.5
    assert np.isnan(median_latency_ms(np.zeros(60, int)))
