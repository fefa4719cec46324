"""Capture: from a dataset to a store. `prepare` plans, a `Worker` makes one shard at a time, `summarise` counts.

Every shard is a pure function of (store, shard), so shards can be made in any order, anywhere, any number of times.
"""

import ctypes
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from cache.audio import Source, load_clip, open_source
from cache.context import Context, chosen_context
from cache.deviation import DeviationSums, clips_to_compare, compare, take_due
from cache.encoder import best_arithmetic, encode
from cache.errors import HearsaeError, ModelError, SourceError
from cache.header import FRAME_SECONDS, Header
from cache.location import Location, reach
from cache.model import LoadedModel, capture_decoder, fast_matmul, load_model, log_mel_of
from cache.plan import Plan, make_plan
from cache.shard_writer import ShardWriter
from cache.sites import Site, match_sites
from cache.store import ActivationStore, Skip

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h"""
ENCODED = "encoder.ln_post"
"""What the decoder reads."""
BATCH = {"cpu": 1, "cuda": 16}
"""Clips per forward pass. Whole windows gain nothing by batching on a CPU."""
BATCH_OF_TRIMMED = {"cpu": 8, "cuda": 64}
"""The same of trimmed windows, which are short: alone they wait for the weights."""
BATCHES_AHEAD = 4
"""Of clips that are decoded before the first is computed where only clips of one length share a batch: enough to find some."""


@dataclass(frozen=True)
class CaptureConfig:
    """Runs Whisper over a dataset and keeps activations in a store. The same command again finishes what is missing."""

    dataset: str
    """micro (the speech inside hearsae), or a folder of audio (./micro), an audio file, one saved by `datasets`, a .jsonl manifest, .parquet file
    or hub dataset."""
    model: str
    """micro (the toy inside hearsae), a name of openai-whisper (tiny.en, ...: downloads it), or a checkpoint file in its format (./micro).
    random:SEED:MODEL: that model with weights drawn anew, as a control."""
    sites: tuple[str, ...]
    """Sites or patterns: encoder.blocks.2, 'encoder.blocks.*.mlp.1', ..."""
    out: Location
    """The store to create or continue."""
    split: str | None = None
    """Split of the dataset."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    streaming: bool = False
    """Stream a hub dataset instead of downloading it first; keeps its order."""
    limit: int | None = None
    """Use the first so many files or rows only."""
    clip_seconds: float = 30.0
    """Cut audio into clips of at most this length (at most 30)."""
    context: Literal["padded", "trimmed"] = "padded"
    """What Whisper hears behind a clip: padded: silence up to its window of 30 s, as it was trained; trimmed: --margin seconds of that, much
    quicker for short clips, and other activations: by how much is measured, printed and stored. Encoder sites only."""
    margin: float | None = None
    """With --context trimmed: seconds of silence behind a clip, in steps of 0.02; default: 1."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored activations."""
    codec: Literal["none", "lz4", "zstd"] = "none"
    """Compression of the stored chunks (with bitshuffle)."""
    shard_rows: int | None = None
    """Rows per shard; default: 65536 for large sets, less for small ones."""
    chunk_rows: int = 4096
    """Rows per chunk, the unit of reading."""
    seed: int = 0
    """Of the order of the clips."""
    device: str = "auto"
    """auto, cpu or cuda."""
    batch: int | None = None
    """Clips per forward pass; default: 1 on a CPU, 16 on a GPU; 8 and 64 if trimmed (those of one length)."""
    strict: bool = False
    """Stop at the first clip that can't be read, instead of recording and skipping it."""


@dataclass(frozen=True)
class Prepared:
    """What a run needs to know before it starts."""

    store: ActivationStore
    sites: list[Site]
    pending: dict[int, list[str]]
    """Shard -> sites that it lacks."""


class ShardResult(NamedTuple):
    """What one shard came to."""

    shard: int
    computed: bool
    """False if it had been committed meanwhile, and was left alone."""
    attempts: int = 1
    """Times that it was given out: more than once where a worker died."""
    clips: int = 0
    frames: int = 0
    written: int = 0
    """Bytes of its objects."""
    skipped: tuple[Skip, ...] = ()
    seconds: dict[str, float] = {}  # noqa: RUF012 - never changed


class ShardAudio(NamedTuple):
    """The decoded audio of a shard's clips, on its way to a worker. `pack_audio` makes it, `unpack_audio` gives the same samples back."""

    shard: int
    samples: np.ndarray
    """[samples of all readable clips] at 16 kHz: int16 where that is exact, as it is for most files, else float32."""
    lengths: tuple[int, ...]
    """Samples of each clip of the shard; -1 for one that could not be read."""
    reasons: dict[int, str]
    """Clip -> why it could not be read."""
    seconds: float


def plan_capture(config: CaptureConfig, model: LoadedModel) -> tuple[Source, Plan, list[Site]]:
    """Reads headers and plans; computes nothing. Raises HearsaeError for sites, text or audio that are not there."""
    for name in ("limit", "batch"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise HearsaeError(f"--{name} {value} must be at least 1")
    context = chosen_context(config.context, config.margin)
    sites = match_sites(config.sites, model.dims_dict, model.has_decoder)
    of_decoder = [site.name for site in sites if site.needs_decoder]
    if context.is_trimmed and of_decoder:
        raise HearsaeError(f"--context trimmed is for encoder sites: {of_decoder[0]} reads the whole window; leave it out, or use --context padded")
    source = open_source(config.dataset, config.split, config.subset, config.streaming)
    plan = make_plan(
        islice(source.items(), config.limit),
        clip_seconds=min(config.clip_seconds, model.dims.n_audio_ctx * FRAME_SECONDS) if config.clip_seconds <= 30 else config.clip_seconds,
        shard_rows=config.shard_rows,
        chunk_rows=config.chunk_rows,
        seed=config.seed,
        shuffle=not source.in_order_only,
        tokenize=model.decoder_input,
    )
    if any(site.needs_decoder for site in sites) and "token" not in plan.axes:
        raise HearsaeError("decoder sites need text, and no clip of this dataset has any: give a column 'text', or choose encoder sites")
    if config.strict and plan.skipped.num_rows:
        first = plan.skipped.to_pylist()[0]
        raise SourceError(f"{first['source']} (row {first['source_row']}): {first['reason']}")
    return source, plan, sites


def prepare(config: CaptureConfig) -> Prepared:
    """Plans, and creates the store or continues it. Raises HearsaeError where the run can't be what it was before."""
    reach(config.out)
    model = load_model(config.model, "cpu")
    source, plan, sites = plan_capture(config, model)
    header = make_header(config, model, source, plan)
    store = ActivationStore.create(config.out, header, plan, sites)
    return Prepared(store, sites, store.pending([site.name for site in sites]))


def make_header(config: CaptureConfig, model: LoadedModel, source: Source, plan: Plan) -> Header:
    """Of the store that a run makes, before it has sites."""
    context = chosen_context(config.context, config.margin).to_json()
    return Header(model.header(), source.describe(), plan.axes, plan.summary(), config.dtype, config.codec, context)


Clips = Iterable[tuple[int, np.ndarray | SourceError]]
"""Clips of a shard, in order: float32 samples, or why there are none."""


class Decoder:
    """Decodes shards, apart from the workers that capture them: for GPUs, which are quicker than one core decodes."""

    def __init__(self, config: CaptureConfig) -> None:
        self.store = ActivationStore.open(config.out)
        self.source = open_source(config.dataset, config.split, config.subset, config.streaming)

    def run(self, shard: int) -> ShardAudio:
        """All audio of a shard."""
        start = time.perf_counter()
        audio = pack_audio(shard, decode_clips(self.store, shard, self.source))
        return audio._replace(seconds=time.perf_counter() - start)


def decode_clips(store: ActivationStore, shard: int, source: Source) -> Clips:
    """The clips of a shard, decoded one after the other as they are asked for."""
    for clip in store.shard_clips(shard):
        try:
            yield clip, load_clip(store, clip, source)
        except SourceError as error:
            yield clip, error


def pack_audio(shard: int, clips: Clips) -> ShardAudio:
    """Puts clips together to travel."""
    parts, lengths, reasons = [np.zeros(0, np.float32)], [], {}
    for clip, samples in clips:
        if isinstance(samples, SourceError):
            reasons[clip] = str(samples)
        else:
            parts.append(samples)
        lengths.append(-1 if isinstance(samples, SourceError) else len(samples))
    together = np.concatenate(parts)
    as_pcm = (np.clip(together, -1, 1 - 2**-15) * 2**15).astype(np.int16)
    is_exact = np.array_equal(as_pcm.astype(np.float32) / 2**15, together)
    return ShardAudio(shard, as_pcm if is_exact else together, tuple(lengths), reasons, 0.0)


def unpack_audio(audio: ShardAudio, first_clip: int) -> Clips:
    """The clips that were packed. first_clip: of the shard."""
    start = 0
    for clip, length in enumerate(audio.lengths, first_clip):
        if length < 0:
            yield clip, SourceError(audio.reasons[clip])
        else:
            samples = audio.samples[start : start + length]
            yield clip, samples.astype(np.float32) / 2**15 if samples.dtype == np.int16 else samples
            start += length


def clips_per_pass(config: CaptureConfig, device: torch.device) -> int:
    """What was asked for, or what suits the device."""
    return config.batch or (BATCH_OF_TRIMMED if config.context == "trimmed" else BATCH)[device.type]


class Worker:
    """Holds a model and makes shards. One thread on a CPU: shards parallelise better as one-thread processes than as threads."""

    def __init__(self, config: CaptureConfig, threads: int = 1, measures_deviation: bool = True) -> None:
        """measures_deviation: of trimmed windows from whole ones, on the few clips that are meant for it."""
        self.config = config
        self.threads = threads
        self.model = load_model(config.model, config.device)
        self.store = ActivationStore.open(config.out)
        if self.model.sha256 != self.store.header.model["sha256"]:
            raise ModelError(f"{config.model} changed since {config.out} was created")
        self.sites = {site.name: site for site in match_sites(config.sites, self.model.dims_dict, self.model.has_decoder)}
        # From where this run names it: the header remembers where it was when the store was created.
        self.source = open_source(config.dataset, config.split, config.subset, config.streaming)
        if self.model.device.type == "cpu":
            _keep_freed_memory()
        self.arithmetic = best_arithmetic(self.model.device)
        self.context = Context.from_json(self.store.header.context)
        self.batch = clips_per_pass(config, self.model.device)
        self.clips_ahead = self.batch * BATCHES_AHEAD if self.context.is_trimmed and self.batch > 1 else self.batch
        self.measures_deviation = measures_deviation and self.context.is_trimmed

    def run(self, shard: int, audio: ShardAudio | None = None) -> ShardResult:
        """Makes and commits what the shard lacks. audio: of the shard, if it was decoded elsewhere.

        Raises HearsaeError if it can't be written, or (strict) a clip can't be read.
        """
        missing = [site for name, site in self.sites.items() if not self.store.is_committed(name, shard)]
        if not missing:
            return ShardResult(shard, computed=False)
        seconds: dict[str, float] = defaultdict(float)
        if audio is None:
            clips = decode_clips(self.store, shard, self.source)
        else:
            clips = unpack_audio(audio, self.store.shard_clips(shard).start)
            seconds["decode"] = audio.seconds
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with fast_matmul():
                return self._make(shard, missing, iter(clips), seconds)
        finally:
            torch.set_num_threads(threads)

    def _make(self, shard: int, sites: list[Site], clips: Iterator[tuple[int, np.ndarray | SourceError]], seconds: dict[str, float]) -> ShardResult:
        skipped: list[Skip] = []
        due = clips_to_compare(self.store.clips.num_rows, self.store.shard_clips(shard)) if self.measures_deviation else []
        deviation: dict[str, DeviationSums] = {}
        with ExitStack() as stack:
            thread = stack.enter_context(ThreadPoolExecutor(1, "shard-writer"))
            writers = {site.name: stack.enter_context(ShardWriter(self.store, site.name, shard, thread)) for site in sites}
            while True:
                start = time.perf_counter()
                group = list(islice(clips, self.clips_ahead))
                seconds["decode"] += time.perf_counter() - start
                if not group:
                    break
                start = time.perf_counter()
                skipped += [self._skip(clip, error) for clip, error in group if isinstance(error, SourceError)]
                audio = {clip: samples for clip, samples in group if not isinstance(samples, SourceError)}
                rows = self._rows(audio, sites)
                for clip in take_due(due, audio):
                    self._compare(clip, audio[clip], sites, deviation)
                computed = time.perf_counter()
                seconds["compute"] += computed - start
                for site_name, clip in itertools.product(writers, audio):
                    writers[site_name].add(clip, rows.pop((site_name, clip)))
                seconds["write"] += time.perf_counter() - computed
            written = 0
            for site_name, writer in writers.items():
                start = time.perf_counter()
                written += writer.commit(skipped, dict(seconds), deviation.get(site_name)).object_bytes
                seconds["write"] += time.perf_counter() - start
        kept = set(self.store.shard_clips(shard)) - {skip.clip for skip in skipped}
        frames = sum(map(self._n_frames, kept))
        return ShardResult(shard, True, 1, len(kept), frames, written, tuple(skipped), dict(seconds))

    def _skip(self, clip: int, error: SourceError) -> Skip:
        source, row = self.store.clips["source"][clip].as_py(), self.store.clips["source_row"][clip].as_py()
        if self.config.strict:
            raise SourceError(f"{source} (row {row}): {error}") from error
        return Skip(clip, f"{source} (row {row}): {error}")

    def _batches(self, audio: Mapping[int, np.ndarray]) -> Iterator[dict[int, np.ndarray]]:
        """The same clips in batches of one length of window each: only those can be computed together."""
        of_window: dict[int, list[int]] = defaultdict(list)
        for clip in audio:
            of_window[self._window(clip)].append(clip)
        for clips in of_window.values():
            for first in range(0, len(clips), self.batch):
                yield {clip: audio[clip] for clip in clips[first : first + self.batch]}

    def _rows(self, audio: Mapping[int, np.ndarray], sites: list[Site]) -> dict[tuple[str, int], np.ndarray]:
        """(site, clip) -> the rows that are stored, [n, d]."""
        dtype, rows = getattr(torch, self.store.header.dtype), {}
        outputs = ((batch, found) for batch in self._batches(audio) for found in self._outputs(batch, sites, self.context).items())
        for batch, (site_name, values) in outputs:
            axis = self.store.sites[site_name]["axis"]
            for clip, of_clip in zip(batch, values, strict=True):
                span = self.store.planned_span(axis, clip)
                whole = of_clip[: span.stop - span.start]
                kept = whole.to(dtype).cpu()
                if not _is_finite(kept):
                    raise _not_kept(site_name, clip, _is_finite(whole), self.store.header.dtype)
                rows[site_name, clip] = kept.numpy()
        return rows

    def _compare(self, clip: int, samples: np.ndarray, sites: list[Site], deviation: dict[str, DeviationSums]) -> None:
        """Adds how far the clip's trimmed rows are from those of a whole window."""
        n_frames = self._n_frames(clip)
        trimmed, padded = (self._outputs({clip: samples}, sites, context) for context in (self.context, Context(None)))
        for name in padded:
            found = compare(*(values[name][0, :n_frames].cpu().numpy() for values in (trimmed, padded)))
            if not np.isfinite(found).all():
                raise _not_kept(name, clip, False, self.store.header.dtype)
            deviation[name] = deviation.get(name, DeviationSums()).plus(found)

    def _n_frames(self, clip: int) -> int:
        span = self.store.planned_span("frame", clip)
        return span.stop - span.start

    def _window(self, clip: int) -> int:
        return self.context.window(self._n_frames(clip), self.model.dims.n_audio_ctx)

    def _outputs(self, audio: dict[int, np.ndarray], sites: list[Site], context: Context) -> dict[str, torch.Tensor]:
        """Of clips whose windows are equally long: site -> fp32 [batch, rows, width]; every frame of each clip at least, all positions of
        decoder sites."""
        n_frames = max(map(self._n_frames, audio))
        window = context.window(n_frames, self.model.dims.n_audio_ctx)
        mel = torch.stack([log_mel_of(samples, window, self.model) for samples in audio.values()])
        of_decoder = [site for site in sites if site.needs_decoder]
        of_encoder = {site.name for site in sites} - {site.name for site in of_decoder}
        encoder = self.model.module.get_submodule("encoder")
        if not of_decoder:
            return encode(encoder, mel, of_encoder, n_frames, self.arithmetic)
        found = encode(encoder, mel, of_encoder | {ENCODED}, None, self.arithmetic)
        wanted = {name: values for name, values in found.items() if name in of_encoder}
        tokens = [self.store.clips["tokens"][clip].as_py() or [0] for clip in audio]
        return wanted | capture_decoder(self.model, found[ENCODED], of_decoder, tokens)


def _is_finite(values: torch.Tensor) -> bool:
    return not values.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(values))  # NaN is both ends


def _keep_freed_memory() -> None:
    """Of this process, where glibc manages it: else it gives a layer's output back to the system and fetches it again, page by page, for the next."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)


def _not_kept(site: str, clip: int, is_too_large: bool, dtype: str) -> HearsaeError:
    if is_too_large:
        return HearsaeError(f"{site} has values that {dtype} can't hold (clip {clip}): use --dtype float32 and another --out")
    return ModelError(f"{site} has NaN or infinite values (clip {clip}): the model's weights are damaged")


def capture_in_process(config: CaptureConfig, pending: Iterable[int]) -> Iterable[ShardResult]:
    """Makes the pending shards one after the other in this process."""
    worker = Worker(config)
    return (worker.run(shard) for shard in pending)


def summarise(prepared: Prepared, run: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The run's summary, keys as in the command line's contract. run: what `cache.runs.RunLog` counted; goes in as it is."""
    store, names = prepared.store, [site.name for site in prepared.sites]
    totals = {name: store.totals(name) for name in names}
    skipped = {clip: reason for of_site in totals.values() for clip, reason in of_site.skipped.items()}
    first = store.skipped_sources.to_pylist()
    width = {site.name: site.width for site in prepared.sites}
    return run | {
        "store": str(store.path),
        "clips": store.clips.num_rows - len(skipped),
        "skipped": len(skipped) + len(first),
        "skipped_reasons": [*skipped.values(), *(f"{row['source']} (row {row['source_row']}): {row['reason']}" for row in first)],
        "frames": totals[names[0]].rows,
        "shards": store.axis(names[0]).shards,
        "seconds": seconds,
        "sites": {name: {"width": width[name], "bytes": totals[name].object_bytes} for name in names},
        "context": store.header.context,
        "deviation": {name: found._asdict() for name in names if (found := totals[name].deviation.deviation())},
    }
