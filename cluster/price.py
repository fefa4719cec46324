"""What a capture will cost, before it starts: rows, bytes, GFLOP, and time from a short calibration on this hardware."""

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cache.capture import CaptureConfig, Worker, clips_per_pass, make_header, plan_capture
from cache.context import Context
from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS, Header, refuse_difference
from cache.model import choose_device, load_model
from cache.plan import Axis, Plan
from cache.sites import Site, all_sites
from cache.store import ActivationStore
from cluster.commands import duration, size
from cluster.pipeline import Pool, PoolOptions

MOST_SAMPLED_CLIPS = 4096
"""More than ten seconds of any hardware."""
IN_PROCESS = PoolOptions(no_ray=True)
CRC_BYTES = 4
INDEX_BYTES = 16
"""Of a shard's index, per chunk: offset and length."""


@dataclass(frozen=True)
class Calibration:
    """How fast one worker is on this hardware."""

    device: str
    windows: int
    """Forward passes of one clip each that were timed."""
    seconds: float
    stages: dict[str, float]
    """Seconds of decoding, computing and writing (to this machine's temporary folder) within `seconds`."""
    bytes_per_value: dict[str, float]
    """Site -> bytes stored per value, after the codec; without sites of which there were no rows."""


def price(
    config: CaptureConfig,
    seconds: float = 10.0,
    options: PoolOptions = IN_PROCESS,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """Plans a capture, times some of its clips in this process for about `seconds`, and says what the whole will take.

    seconds: 0 leaves out the calibration, and with it the estimate. options: how the work will be shared out; each worker is assumed to be as
    fast as the one timed here alone, and a cluster to have what this machine has, but for what the options say. price_per_hour: of one worker.
    Nothing is written at `config.out`. What a store there has already is not counted again.
    Raises HearsaeError where the capture itself would: no such model, site or dataset, a store made otherwise, no readable audio.
    """
    options.check()
    model = load_model(config.model, "cpu")
    source, plan, sites = plan_capture(config, model)
    header = make_header(config, model, source, plan)
    dims = model.dims_dict
    del model
    pending = _pending(config, header, sites)
    shards = sorted(set().union(*pending.values()))
    clips = plan.clips.filter(pa.array(np.isin(plan.clips["shard"].to_numpy(), shards)))
    n_tokens = plan.clips["n_tokens"].fill_null(0).to_numpy()
    rows = {"frame": plan.clips["n_frames"].to_numpy(), "token": n_tokens}
    pool = _pool(options, len(shards), uses_gpu=config.device != "cpu")
    timed = calibrate(config, header, sites, clips, seconds, pool.cpus) if shards and seconds > 0 else None
    tokens_of_one = round(n_tokens.sum() / max(1, (n_tokens > 0).sum()))
    windows = _windows(plan.clips, Context.from_json(header.context), dims["n_audio_ctx"])
    flop = {length: window_flop(dims | {"n_audio_ctx": length}, sites, tokens_of_one) for length in windows}
    per_window = sum(flop[length] * count for length, count in windows.items()) / plan.clips.num_rows
    estimate = _estimate(timed, clips.num_rows, len(shards), pool) if timed else None
    sizes = {site.name: _site_bytes(plan, rows[site.axis], site, config, range(plan.axes["frame"].shards), timed) for site in sites}
    missing = sum(_site_bytes(plan, rows[site.axis], site, config, pending[site.name], timed) for site in sites)
    free = _free_bytes(config.out)
    return {
        "out": str(config.out),
        "clips": plan.clips.num_rows,
        "skipped": plan.skipped.num_rows,
        "hours": sum(plan.clips["duration_s"].to_pylist()) / 3600,
        "frames": int(rows["frame"].sum()),
        "rows": {axis: int(rows[axis].sum()) for axis in plan.axes},
        "shards": plan.axes["frame"].shards,
        "shards_to_compute": len(shards),
        "windows": clips.num_rows,
        "sites": {site.name: {"axis": site.axis, "width": site.width, "bytes": sizes[site.name]} for site in sites},
        "bytes": sum(sizes.values()),
        "bytes_to_write": missing,
        "free_bytes": free,
        "fits": free is None or missing <= free,
        "window_seconds": sum(length * count for length, count in windows.items()) / plan.clips.num_rows * FRAME_SECONDS,
        "gflop_per_window": per_window / 1e9,
        "gflop": per_window * clips.num_rows / 1e9,
        "calibration": timed and {
            "device": timed.device,
            "windows": timed.windows,
            "seconds": timed.seconds,
            "windows_per_s": timed.windows / timed.seconds,
            "gflop_per_s": per_window * timed.windows / timed.seconds / 1e9,
            "seconds_by_stage": timed.stages,
        },
        "workers": pool.largest,
        "decoders": pool.decoders,
        "estimated_seconds": estimate,
        "price": estimate * pool.largest / 3600 * price_per_hour if estimate and price_per_hour else None,
    }  # fmt: skip


def price_text(result: dict[str, Any]) -> str:
    """The result of `price` for people."""
    rows = ", ".join(f"{n:,} {axis} rows" for axis, n in result["rows"].items())
    to_compute = "" if result["shards_to_compute"] == result["shards"] else f", {result['shards_to_compute']} of them still to compute"
    lines = [
        f"{result['clips']:,} clips, {result['hours']:.2f} hours of audio; {result['skipped']} skipped",
        f"{rows} in {result['shards']:,} shards{to_compute}",
        *(f"  {name}: width {site['width']}, {size(site['bytes'])}" for name, site in result["sites"].items()),
        f"  in all {size(result['bytes'])}",
    ]
    if result["free_bytes"] is not None:
        lines[-1] += f"; {size(result['free_bytes'])} free for {result['out']}"
    if not result["fits"]:
        lines.append(f"WARNING: the {size(result['bytes_to_write'])} to be written do not fit there")
    timed = result["calibration"]
    if not result["windows"]:
        return "\n".join([*lines, "nothing is left to compute"])
    lines.append(f"{result['gflop_per_window']:.3g} GFLOP per window of {result['window_seconds']:.3g} s, {result['gflop']:,.0f} GFLOP in all")
    if timed is None:
        return "\n".join(lines)
    lines += [
        f"calibration: one worker on {timed['device']}, {timed['windows']} windows in {timed['seconds']:.1f} s: "
        f"{timed['windows_per_s']:.3g} windows/s, {timed['gflop_per_s']:.3g} GFLOP/s",
        f"estimate: {duration(result['estimated_seconds'])} with {result['workers']} worker{'s' * (result['workers'] > 1)}, each as fast as one "
        "alone here (--workers for another number); starting Ray and loading models comes on top",
    ]
    if result["price"]:
        lines.append(f"price: {result['price']:.3g}, for {result['workers']} x {duration(result['estimated_seconds'])}")
    return "\n".join(lines)


def _windows(clips: pa.Table, context: Context, n_audio_ctx: int) -> Counter[int]:
    """How many of the clips the encoder hears in a window of so many positions."""
    return Counter(context.window(n_frames, n_audio_ctx) for n_frames in clips["n_frames"].to_pylist())


def _pool(options: PoolOptions, shards: int, uses_gpu: bool) -> Pool:
    """The workers that these options give on a cluster of this machine's cores and GPUs. Starts nothing."""
    if options.no_ray:
        return Pool(1, 1, options.cpus_per_worker, 0.0, 0)
    gpus = torch.cuda.device_count() if uses_gpu else 0
    cores = max(len(os.sched_getaffinity(0)), (options.workers or 0) * options.cpus_per_worker)
    return options.pool({"CPU": cores, "GPU": gpus}, max(1, shards), uses_gpu)


def _estimate(timed: "Calibration", windows: int, shards: int, pool: Pool) -> float:
    """Seconds until the last shard is done: the last round of shards keeps some workers idle, and decoders work beside them."""
    decode = timed.stages.get("decode", 0.0) if pool.decoders else 0.0
    per_shard = (timed.seconds - decode) / timed.windows * windows / shards
    decoding = decode / timed.windows * windows / pool.decoders if pool.decoders else 0.0
    return max(per_shard * math.ceil(shards / pool.largest), decoding)


# Computation


def window_flop(dims: dict[str, int], sites: Sequence[Site], n_tokens: int = 0) -> int:
    """Floating-point operations of Whisper's forward pass over one window, as far as the deepest of `sites`.

    A multiplication and an addition count as two, as `torch.utils.flop_counter` counts; what is not a convolution or a matrix product
    (mel spectrogram, norms, softmax, GELU, biases) is left out. With n = n_audio_ctx positions, width d, m keys:

    - the two convolutions: 2 * 2n * d * n_mels * 3  +  2 * n * d * d * 3
    - a projection (query, key, value, out): 2 * n * d * d each; attention itself: 2 * n * m * d for the scores and as much for the sums
    - each of the two layers of an MLP: 2 * n * d * 4d

    A decoder block has n = n_tokens positions, and cross-attention with m = n_audio_ctx keys, whose keys and values are n_audio_ctx projections.
    dims: fields of `whisper.ModelDimensions`. n_tokens: length of the decoder's input, for decoder sites.
    """
    deepest = max(site.order for site in sites)
    n, d = dims["n_audio_ctx"], dims["n_audio_state"]
    total = 2 * 2 * n * d * dims["n_mels"] * 3 + 2 * n * d * d * 3
    return total + sum(_own_flop(site, n, n_tokens) for site in all_sites(dims) if site.order <= deepest)


def _own_flop(site: Site, n_audio: int, n_tokens: int) -> int:
    """What a module computes itself, without the modules in it."""
    part = site.name.split(".", 3)[-1] if site.name.count(".") > 2 else ""
    crosses = part.startswith("cross_attn.")
    positions = n_audio if site.axis == "frame" else n_tokens
    keys = n_audio if crosses or site.axis == "frame" else n_tokens
    projection = 2 * positions * site.width * site.width
    match part.removeprefix("cross_"):
        case "attn.query" | "attn.key" | "attn.value":
            return projection
        case "attn.out":
            return projection + 4 * positions * keys * site.width
        case "mlp.0":
            return projection // 4  # its width is that of the hidden layer
        case "mlp.2":
            return 4 * projection
    return 0


# Size


def _site_bytes(plan: Plan, rows: np.ndarray, site: Site, config: CaptureConfig, shards: Sequence[int], timed: Calibration | None) -> int:
    """Bytes of a site's objects of `shards`: exact without a codec (but for clips that turn out unreadable), else as in the calibration."""
    axis = plan.axes[site.axis]
    in_shard = np.bincount(plan.clips["shard"].to_numpy(), weights=rows, minlength=axis.shards)[np.asarray(shards, dtype=int)]
    if config.codec != "none" and timed and site.name in timed.bytes_per_value:
        return int(in_shard.sum() * site.width * timed.bytes_per_value[site.name])
    chunks = np.ceil(in_shard / axis.chunk_rows)
    index = axis.shard_rows // axis.chunk_rows * INDEX_BYTES + CRC_BYTES
    item = np.dtype(config.dtype).itemsize
    return int((chunks * (axis.chunk_rows * site.width * item + CRC_BYTES) + index * (in_shard > 0)).sum())


def _free_bytes(out: Any) -> int | None:
    """Room on the file system where `out` will be; None in an object store, which has no end."""
    if not isinstance(out, Path):
        return None
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def _pending(config: CaptureConfig, header: Header, sites: Sequence[Site]) -> dict[str, list[int]]:
    """Site -> shards that the store at `config.out`, if there is one, lacks. Raises StoreError if it was made otherwise."""
    every = range(header.axes["frame"].shards)
    if not (config.out / "zarr.json").exists():
        return {site.name: list(every) for site in sites}
    store = ActivationStore.open(config.out)
    refuse_difference(config.out, store.header, header)
    done = {site.name: set(store.committed(site.name)) if site.name in store.sites else set() for site in sites}
    return {site.name: [shard for shard in every if shard not in done[site.name]] for site in sites}


# Time


def calibrate(config: CaptureConfig, header: Header, sites: Sequence[Site], clips: pa.Table, seconds: float, threads: int = 1) -> Calibration:
    """Captures the first of `clips` with a real worker into a temporary store, for about `seconds`, and times it.

    threads: of the worker. The first forward pass pays for what is set up once and is not counted, unless it alone takes as long.
    Raises SourceError or HearsaeError if none of the clips tried can be read.
    """
    device = choose_device(config.device)
    batch = clips_per_pass(config, device)
    sample, axes = _sample(clips.slice(0, MOST_SAMPLED_CLIPS), batch, header.axes)
    plan = Plan(sample, pa.table({"source": pa.array([], pa.string()), "source_row": pa.array([], pa.int64()), "reason": pa.array([], pa.string())}),
                axes, header.plan["seed"], header.plan["clip_seconds"])  # fmt: skip
    windows, spent, stages, reasons = 0, 0.0, dict[str, float](), list[str]()
    with TemporaryDirectory(prefix="hearsae-dry-run-") as folder:
        here = replace(config, out=Path(folder) / "store")
        store = ActivationStore.create(here.out, replace(header, axes=axes, plan=plan.summary(), sites={}), plan, sites)
        worker = Worker(here, threads, measures_deviation=False)
        started = time.perf_counter()
        for shard in range(axes["frame"].shards):
            start = time.perf_counter()
            result = worker.run(shard)
            took = time.perf_counter() - start
            reasons += [skip.reason for skip in result.skipped]
            if shard > 0 or took > seconds or axes["frame"].shards == 1:
                windows += len(store.shard_clips(shard)) - len(result.skipped)
                spent += took
                stages = {stage: stages.get(stage, 0.0) + s for stage, s in result.seconds.items()}
            if time.perf_counter() - started > seconds:
                break
        if not windows:
            raise HearsaeError(f"none of the {len(reasons)} clips tried can be read: {reasons[0]}")
        return Calibration(str(device), windows, spent, stages, _bytes_per_value(store, sites))


def _sample(clips: pa.Table, batch: int, axes: dict[str, Axis]) -> tuple[pa.Table, dict[str, Axis]]:
    """Clips with new addresses: one batch in the first shard, whole batches of at least a chunk in the others."""
    chunk_rows, lengths = axes["frame"].chunk_rows, clips["n_frames"].to_numpy()
    shard_rows = -(-batch * int(lengths.max()) // chunk_rows) * chunk_rows
    per_shard = max(1, shard_rows // int(lengths.max()) // batch) * batch
    number = np.arange(len(lengths))
    shard = np.where(number < batch, 0, 1 + (number - batch) // per_shard)
    new_axes = {"frame": Axis(shard_rows, chunk_rows, int(shard[-1]) + 1)}
    columns = {"clip": number, "shard": shard, "row_start": shard * shard_rows + _within(lengths, shard)}
    if "token" in axes:
        n_tokens = clips["n_tokens"].fill_null(0).to_numpy()
        token_chunk = axes["token"].chunk_rows
        token_rows = max(token_chunk, -(-int(np.bincount(shard, weights=n_tokens).max()) // token_chunk) * token_chunk)
        new_axes["token"] = Axis(token_rows, token_chunk, int(shard[-1]) + 1)
        columns["token_start"] = np.where(n_tokens > 0, shard * token_rows + _within(n_tokens, shard), 0)
    for name, values in columns.items():
        missing = n_tokens == 0 if name == "token_start" else None
        clips = clips.set_column(clips.schema.get_field_index(name), name, pa.array(values, pa.int64(), mask=missing))
    return clips, new_axes


def _within(lengths: np.ndarray, shard: np.ndarray) -> np.ndarray:
    """Where each clip begins in its shard, when clips fill it in order."""
    starts = np.cumsum(lengths) - lengths
    first = np.searchsorted(shard, np.arange(shard[-1] + 1))
    return starts - starts[first][shard]


def _bytes_per_value(store: ActivationStore, sites: Sequence[Site]) -> dict[str, float]:
    found = {}
    for site in sites:
        totals = store.totals(site.name)
        if totals.rows:
            found[site.name] = totals.object_bytes / (totals.rows * site.width)
    return found
