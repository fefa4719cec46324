"""A scan's parts, and finding top examples beside other ways to do it.

    python benchmarks/scan.py --store STORE --sae DIR [--site SITE] [--clips 20] [--features 64] [--rounds 3] [--profile]

Everything runs on one thread, on the blocks of the first shards of the store; contenders take turns, and the median is given.

- Finding the 20 strongest moments of every latent, at most one a clip, from rows in memory:
  `loop`: for every clip encode densely with plain torch, then in Python for every feature push (value, clip, frame) on a heap. It is run for
  `--features` features of `--clips` clips and extrapolated linearly in the features, apart from encoding, which it needs once.
  `blog`: the same as the repository of "Interpreting Whisper" does it: on all 1500 frames of the window, with a running mean and the
  transcript decoded from its tokens for each pair of a clip and a feature; extrapolated likewise.
  `torch.topk`: encode densely, largest value of every clip, a running merge by topk. `duckdb`: encode sparsely, then SQL over (feature,
  value, clip). `scan`: a scan's own loops, with everything else that it finds, pairs too. `top alone`: of these the one that finds the top.
  Each one's values are compared with those of the scan, to 1e-4: encoding in other batches may move their last bits. "Beyond encoding" of
  ours and of duckdb also holds what turns results into Python lists, a fixed cost that weighs less on more clips.
- `--profile` splits whole scans, of the latents and of `--site`, into their parts.
"""

import argparse
import heapq
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numba import njit
from whisper.tokenizer import get_tokenizer

from analysis import coactivation, kernels
from analysis import scan as scan_module
from analysis.blocks import Block
from analysis.features import open_features
from analysis.scan import ScanOptions, scan
from cache.store import ActivationStore

K = 20
FRAMES_OF_WINDOW = 1500
OPTIONS = ScanOptions(top=K)
Moments = dict[int, list[tuple[float, int]]]
"""Feature -> (value, clip), best first."""


def clips_of(store: ActivationStore, site: str, n: int) -> list[tuple[int, np.ndarray]]:
    spans = (span for shard in store.committed(site) for span in store.spans(shard, site))
    return [(span.clip, store.read_clip(site, span.clip)) for span in islice(spans, n)]


def block_of(clips: list[tuple[int, np.ndarray]], codes: Any) -> Block:
    lengths = np.array([len(rows) for _, rows in clips])
    first_row, numbers = np.concatenate([[0], np.cumsum(lengths)]), np.array([clip for clip, _ in clips], np.int32)
    frame = (np.arange(first_row[-1]) - np.repeat(first_row[:-1], lengths)).astype(np.int32)
    start = np.searchsorted(codes.row, np.arange(first_row[-1] + 1))
    return Block(numbers, first_row, np.repeat(numbers, lengths), frame, None, start, codes.latent, codes.value)


class Contenders:
    """Each takes rows of clips in memory and gives every feature's moments."""

    def __init__(self, store: ActivationStore, spec: str, clips: list[tuple[int, np.ndarray]], loop_features: int) -> None:
        self.store, self.clips, self.loop_features = store, clips, loop_features
        self.features: Any = open_features(spec, store)
        self.rows = np.concatenate([rows for _, rows in clips])
        self.encode_s = 0.0
        self.tokenizer = get_tokenizer(multilingual=False)
        self.tokens = [self.tokenizer.encode(text or "") for text in store.clips["text"].to_pylist()]

    def encode(self) -> None:
        """What nobody can do without: sparse encoding of all rows."""
        self.features.sparse(self.rows)

    def scan(self) -> Moments:
        block = block_of(self.clips, self.features.sparse(self.rows))
        counter = coactivation.PairCounter(self.features.count, OPTIONS.coactive_among)
        found = scan_module._scan_block(block, self.store, self.features.count, OPTIONS, counter)
        return {f: [(value, clip) for value, clip, *_ in row if clip >= 0] for f, row in enumerate(found.top.tolist())}

    def top_alone(self) -> Moments:
        """The scan's own loop without runs, candidates and pairs: sums, histogram, top and bottom."""
        block = block_of(self.clips, self.features.sparse(self.rows))
        rows = scan_module._rows(block, self.store, OPTIONS)
        tally = kernels.new_tally(self.features.count, K)
        columns = kernels.by_feature(block.start, block.latent, block.value, self.features.count)
        _moments_of_all(*columns, rows, kernels._scratch(rows, 1), tally)
        return {f: [(value, clip) for value, clip, *_ in row if clip >= 0] for f, row in enumerate(tally.top.tolist())}

    @torch.no_grad()
    def loop(self) -> Moments:
        heaps: dict[int, list[tuple[float, int, int]]] = {feature: [] for feature in range(self.loop_features)}
        self.encode_s = 0.0
        for clip, rows in self.clips:
            before = time.perf_counter()
            values = self.features.dictionary.encode(torch.from_numpy(rows).float())
            self.encode_s += time.perf_counter() - before
            for feature, heap in heaps.items():
                value, frame = values[:, feature].max(dim=0)
                item = (value.item(), -clip, frame.item())
                if item[0] > 0 and len(heap) < K:
                    heapq.heappush(heap, item)
                elif item[0] > 0:
                    heapq.heappushpop(heap, item)
        return {feature: [(value, -clip) for value, clip, _ in sorted(heap, reverse=True)] for feature, heap in heaps.items()}

    @torch.no_grad()
    def blog(self) -> Moments:
        """What the post's repository does for every clip and feature, on Whisper's whole window: it keeps no clip's length."""
        heaps: dict[int, list[tuple[float, int]]] = {feature: [] for feature in range(self.loop_features)}
        means = dict.fromkeys(heaps, 0.0)
        self.encode_s = 0.0
        for n, (clip, rows) in enumerate(self.clips):
            window = np.zeros((FRAMES_OF_WINDOW, rows.shape[1]), np.float32)
            window[: len(rows)] = rows
            before = time.perf_counter()
            values = self.features.dictionary.encode(torch.from_numpy(window))
            values[len(rows) :] = 0  # theirs are ranked as well; here all find the same
            self.encode_s += time.perf_counter() - before
            for feature, heap in heaps.items():
                column = values[:, feature]
                most = torch.max(column).item()
                means[feature] = (means[feature] * n + torch.mean(column).item()) / (n + 1)
                self.tokenizer.decode(self.tokens[clip])
                if len(heap) < K:
                    heapq.heappush(heap, (most, clip))
                else:
                    heapq.heappushpop(heap, (most, clip))
        return {feature: sorted((item for item in heap if item[0] > 0), reverse=True) for feature, heap in heaps.items()}

    @torch.no_grad()
    def topk(self) -> Moments:
        best = torch.zeros(K, self.features.count)
        clip_of = torch.full((K, self.features.count), -1)
        for clip, rows in self.clips:
            value = self.features.dictionary.encode(torch.from_numpy(rows).float()).max(dim=0).values
            best, index = torch.cat([best, value[None]]).topk(K, dim=0)
            clip_of = torch.cat([clip_of, torch.full((1, self.features.count), clip)]).gather(0, index)
        pairs = zip(best.t().tolist(), clip_of.t().tolist(), strict=True)
        return {f: [(v, c) for v, c in zip(values, clips, strict=True) if v > 0] for f, (values, clips) in enumerate(pairs)}

    def duckdb(self) -> Moments:
        import duckdb
        import pyarrow as pa

        codes = self.features.sparse(self.rows)
        clip = np.repeat([clip for clip, _ in self.clips], [len(rows) for _, rows in self.clips])[codes.row]
        triples = pa.table({"feature": codes.latent, "value": codes.value, "clip": clip})
        connection = duckdb.connect(config={"threads": 1})
        connection.register("triples", triples)
        per_clip = "select feature, clip, max(value) as value from triples group by feature, clip"
        ranked = f"select *, row_number() over (partition by feature order by value desc, clip) as r from ({per_clip})"
        rows = connection.execute(f"select feature, value, clip from ({ranked}) where r <= {K} order by feature, r").fetchnumpy()
        found: Moments = {f: [] for f in range(self.features.count)}
        for feature, value, clip in zip(*(rows[name].tolist() for name in ("feature", "value", "clip")), strict=True):
            found[feature].append((value, clip))
        return found


@njit
def _moments_of_all(first, row, value, rows, scratch, tally):
    for feature in range(len(first) - 1):
        a, b = first[feature], first[feature + 1]
        kernels._moments(feature, row[a:b], value[a:b], rows, 0, scratch, tally)


def differing(found: Moments, wanted: Moments) -> int:
    """Features whose values differ by more than 1e-4 of the value."""
    values = ((sorted(v for v, _ in moments), sorted(v for v, _ in wanted[f])) for f, moments in found.items())
    return sum(len(a) != len(b) or not np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in values)


def compare(store: ActivationStore, spec: str, n_clips: int, loop_features: int, rounds: int) -> None:
    features = open_features(spec, store)
    contenders = Contenders(store, spec, clips_of(store, features.site, n_clips), loop_features)
    ways: dict[str, Callable[[], Any]] = {
        "encode": contenders.encode,
        "scan": contenders.scan,
        "top alone": contenders.top_alone,
        "loop": contenders.loop,
        "blog": contenders.blog,
        "torch.topk": contenders.topk,
        "duckdb": contenders.duckdb,
    }
    contenders.scan(), contenders.top_alone()  # compile
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Moments] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            before = time.perf_counter()
            found[name] = way()
            taken = time.perf_counter() - before
            if name in ("loop", "blog"):  # encoding once, the heaps for all features
                taken = contenders.encode_s + (taken - contenders.encode_s) * features.count / loop_features
            seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    million = 1e6 / len(contenders.rows)
    print(f"{len(contenders.rows)} rows of {n_clips} clips, {features.count} latents, median of {rounds} rounds")
    print(f"loop, blog: {loop_features} latents, extrapolated")
    print(f"  {'':12} {'s a million rows':>17} {'beyond encoding':>16} {'of scan':>8} {'beyond, of scan':>16}  latents that differ")
    own = medians["scan"] - medians["encode"]
    for name, taken in medians.items():
        beyond = taken - medians["encode"]
        wrong = "" if name == "encode" else str(differing(found[name], found["scan"]))
        print(f"  {name:12} {taken * million:17.2f} {beyond * million:16.2f} {taken / medians['scan']:8.2f} {beyond / own:16.2f}  {wrong}")


# Where a scan's time goes


@contextmanager
def timed(parts: dict[str, float], names: dict[str, tuple[Any, str]]) -> Iterator[None]:
    """Adds up the time within functions that do not call each other."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - before

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in names.items():
            stack.enter_context(patch.object(owner, attribute, wrap(name, getattr(owner, attribute))))
        yield


def profile(store: ActivationStore, spec: str) -> None:
    features = open_features(spec, store)
    names = {
        "reading": (ActivationStore, "read"),
        "values": (type(features), "dense" if spec.startswith("neurons") else "sparse"),
        "tally, top, candidates": (kernels, "tally_dense" if spec.startswith("neurons") else "tally_sparse"),
        "pairs": (coactivation.PairCounter, "add_dense" if spec.startswith("neurons") else "add_sparse"),
        "fixed point": (scan_module, "fixed_point"),
        "merge": (scan_module, "merge"),
        "writing": (scan_module, "write_scan"),
    }
    with tempfile.TemporaryDirectory() as folder:
        scan(store, spec, Path(folder) / "warm", OPTIONS)
        parts: dict[str, float] = {}
        before = time.perf_counter()
        with timed(parts, names):
            done = scan(store, spec, Path(folder) / "out", OPTIONS)
        total = time.perf_counter() - before
    parts["other"] = total - sum(parts.values())
    print(f"{spec}: {done.info['count']} features, {done.info['rows']} rows, {total:.2f} s")
    for name, taken in parts.items():
        print(f"  {name:24} {taken:6.2f} s  {taken / total:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--site", help="site whose neurons are scanned too, with --profile")
    parser.add_argument("--profile", action="store_true")
    for name, default in {"clips": 20, "features": 64, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = ActivationStore.open(args.store)
    print(f"one thread, load {os.getloadavg()[0]:.1f}")
    if args.profile:
        for spec in [f"sae:{args.sae}", *([f"neurons:{args.site}"] if args.site else [])]:
            profile(store, spec)
    else:
        compare(store, f"sae:{args.sae}", args.clips, args.features, args.rounds)


if __name__ == "__main__":
    main()
