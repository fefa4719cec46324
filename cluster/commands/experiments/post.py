"""`hearsae experiment post`."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from analysis.experiments.attention import attention
from analysis.experiments.bigrams import bigrams
from analysis.experiments.chop import chop
from analysis.experiments.neighbours import neighbours
from analysis.experiments.phones import phone_report, polysemantic_report
from analysis.experiments.report import PAGE, RECORD, Report, check_folder, fill, page, report_folder, section
from analysis.experiments.speech import whole_model, worker_model
from analysis.experiments.window import window
from analysis.experiments.word_times import StoredSpeech
from analysis.experiments.words import word_report
from analysis.explorer.export import export
from analysis.scan import Scan, ScanOptions
from analysis.transcribe import transcribe
from cache import micro
from cache.capture import CaptureConfig
from cache.errors import HearsaeError
from cache.location import put
from cache.model import random_twin
from cache.store import ActivationStore
from cache.timings import has_timings
from cluster.commands.align import Align
from cluster.commands.cache import run_capture
from cluster.commands.experiments import Experiment
from cluster.commands.scan import run_scan
from cluster.pipeline import PoolOptions
from cluster.workers import session
from sae.train import train
from sae.train_config import TrainConfig

FRAGMENT = "section.html"
"""A finished section's part of the page, in its folder."""
EXPLORER = "explorer"
WORD_EXAMPLES = 10
"""Strongest examples of a decoder neuron: it is of one word if nearly all are."""
MARGINS = (0, 2, 4)
"""Frames that are chopped with a word on either side."""
SETTINGS = ("dataset", "split", "limit", "model", "site", "neurons", "d_sae", "k", "rows", "attention_clips", "trials", "seed")
"""What makes a report another one; the rest says how and where it is made."""


@dataclass(frozen=True, kw_only=True)
class Post(Experiment):
    """The whole of "Interpreting Whisper", section by section, into one report page. The same command again goes on where it was left."""

    NAME = "post"

    site: str = "encoder.blocks.2"
    """The residual stream in which features are looked for."""
    neurons: str = "encoder.blocks.2.mlp.1"
    """The MLP neurons that are looked at."""
    d_sae: int | None = None
    """Latents of the SAE; default: eight for each dimension."""
    k: int = 32
    """Latents kept a row, on average."""
    rows: int = 1_000_000
    """Rows to train the SAE on."""
    attention_clips: int = 24
    """Clips whose attention is measured: the first ones. Relevance needs gradients, and the control the same again."""
    trials: int = 200
    """Words that are chopped, drawn from all."""
    seed: int = 0
    """Of the SAE, the random bases and the trials."""

    def run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        self._claim()
        self.check()
        done: dict[str, dict[str, Any]] = {}
        with session(self):
            for name, (heading, make) in self._sections().items():
                self._say(f"{heading} ...")
                done[name] = self._section(name, heading, make)
                for line in done[name]["lines"]:
                    self._say(f"  {line}")
                self._write_page(done)
        failed = {name: one["reason"] for name, one in done.items() if "reason" in one}
        numbers = {"dir": str(self.folder), "index": str((self.folder / PAGE).resolve()), "seconds": time.perf_counter() - begin}
        summary = {name: one["summary"] for name, one in done.items() if "summary" in one}
        return {"rows": [], "summary": summary, "not_run": failed, "lines": [], **numbers}

    def summary(self, result: dict[str, Any]) -> str:
        return f"{len(result['summary'])} sections in {result['seconds']:.0f} s; the report: {result['index']}"

    # The sections

    def _sections(self) -> dict[str, tuple[str, Callable[[], Report]]]:
        """Folder -> (heading, what makes it), in the order of the post."""
        return {
            "attention": ("The encoder looks close by", self._attention),
            "window": ("The encoder needs little context: a window on its attention", self._window),
            "chop": ("A word is where it is said: chopping it out of the encoder's output", self._chop),
            "neurons": ("MLP neurons follow phones", self._neurons),
            "latents": ("Features of the residual stream: a sparse autoencoder", self._latents),
            "polysemantic": ("What looks like one phone at its maximum is often polysemantic below", self._polysemantic),
            "bigrams": ("The decoder alone is a weak language model", self._bigrams),
            "neighbours": ("Token embeddings: words that sound alike, words that mean alike", self._neighbours),
            "words": ("Neurons of the decoder respond to words", self._words),
        }

    def _attention(self) -> Report:
        few = replace(self.speech, limit=min(self.attention_clips, self.limit or self.attention_clips))
        return attention(few, self.model, control_seed=self.seed, device=self.device, map_pieces=self.map_pieces)

    def _chop(self) -> Report:
        said = StoredSpeech(str(self._store.path))
        return chop(said, self.model, margins=MARGINS, trials=self.trials, seed=self.seed, device=self.device, map_pieces=self.map_pieces)

    def _window(self) -> Report:
        return window(self.speech, self.model, device=self.device, map_pieces=self.map_pieces)

    def _neurons(self) -> Report:
        scan = self._scan("neurons", f"neurons:{self.neurons}")
        return phone_report("MLP neurons", "neurons", scan, {"random directions": self._scan("neurons-random", f"random:{self.neurons}")})

    def _latents(self) -> Report:
        scan = self._scan("latents", f"sae:{self._sae}")
        return phone_report("SAE latents", "latents", scan, {"random directions": self._scan("latents-random", f"random:{self.site}")})

    def _polysemantic(self) -> Report:
        scan, control = self._scan("neurons", f"neurons:{self.neurons}"), self._scan("neurons-random", f"random:{self.neurons}")
        export([self._made / name for name in ("neurons", "latents") if (self._made / name).is_dir()], self.folder / EXPLORER)
        return polysemantic_report("Polysemanticity", "neurons", scan, control)

    def _bigrams(self) -> Report:
        return bigrams(self.speech, self.model, seed=self.seed, device=self.device, map_pieces=self.map_pieces)

    def _neighbours(self) -> Report:
        return neighbours(self.speech, self.model, seed=self.seed, device=self.device)

    def _words(self) -> Report:
        whole_model(self.model, self.device, "transcribing")
        manifest = self._made / "transcripts.jsonl"
        if not manifest.is_file():
            transcribe(self.speech, self.model, manifest.absolute(), device=self.device, map_pieces=self.map_pieces)
        model, control = self._word_scan("words", self.model, manifest), self._word_scan("words-random", random_twin(self.model, self.seed), manifest)
        return word_report(model, control)

    def _word_scan(self, name: str, model: str, manifest: Path) -> Scan:
        store = self._captured(f"{name}.zarr", str(manifest), model, (self._decoder_neurons,))
        return self._scan(name, f"neurons:{self._decoder_neurons}", store, ScanOptions(top=WORD_EXAMPLES, seed=self.seed))

    # What the sections are made from

    @cached_property
    def _decoder_neurons(self) -> str:
        """The MLP neurons of the decoder's last block."""
        return f"decoder.blocks.{worker_model(self.model, self.device).dims.n_text_layer - 1}.mlp.1"

    @property
    def _made(self) -> Path:
        return self.folder / "made"

    @cached_property
    def _store(self) -> ActivationStore:
        store = self._captured("speech.zarr", self.dataset, self.model, (self.site, self.neurons), split=self.split, limit=self.limit)
        if not has_timings(store):
            known = (micro.NAME,) if self.dataset == micro.NAME else ()
            Align(store=store.path, import_=known, no_ray=self.no_ray, address=self.address, workers=self.workers).run()
        return store

    def _captured(self, name: str, dataset: str, model: str, sites: tuple[str, ...], **which: Any) -> ActivationStore:
        config = CaptureConfig(dataset=dataset, model=model, sites=sites, device=self.device, out=self._made / name, **which)
        run_capture(config, PoolOptions(self.address, self.no_ray, self.workers, self.gpus_per_worker))
        return ActivationStore.open(config.out)

    @cached_property
    def _sae(self) -> Path:
        out = self._made / "sae"
        d_sae = self.d_sae or 8 * self._store.sites[self.site]["width"]
        config = TrainConfig(store=(self._store.path,), site=(self.site,), out=out, d_sae=(d_sae,), k=(self.k,), rows=self.rows, quiet=True)
        batch = min(config.batch, self._store.totals(self.site).rows)  # of a few clips
        train(replace(config, seed=(self.seed,), batch=batch))
        return out

    def _scan(self, name: str, spec: str, store: ActivationStore | None = None, options: ScanOptions | None = None) -> Scan:
        out = self._made / name
        try:
            return Scan.open(out)
        except HearsaeError:
            run_scan((store or self._store).path, spec, out, options or ScanOptions(seed=self.seed), self)
            return Scan.open(out)

    # The page

    def _claim(self) -> None:
        """Makes the folder ours. Raises HearsaeError where it holds other things, or a report of other settings."""
        asked = {name: asdict(self)[name] for name in SETTINGS}
        check_folder(self.folder)
        record = self.folder / RECORD
        if record.is_file():
            found = json.loads(record.read_bytes()).get("settings", {})
            other = [f"--{name.replace('_', '-')} {found.get(name)}" for name in SETTINGS if found.get(name) != asked[name]]
            if other:
                raise HearsaeError(f"{self.folder} holds a report made with {', '.join(other)}: choose another --out, or give the same")
        self.folder.mkdir(parents=True, exist_ok=True)
        put(record, json.dumps({"experiment": "Interpreting Whisper", "settings": asked}).encode())

    def _section(self, name: str, heading: str, make: Callable[[], Report]) -> dict[str, Any]:
        """Makes a section unless it is there. What can't be made here, because the model or the data lack something, says so instead."""
        folder = self.folder / name
        if (folder / FRAGMENT).is_file():
            return {"summary": json.loads((folder / RECORD).read_bytes())["summary"], "lines": ["is there already"]}
        try:
            report = make()
        except HearsaeError as error:
            return {"reason": str(error), "lines": [f"not run: {error}"]}
        with report_folder(folder) as staging:
            fill(report, staging, asdict(self))
            (staging / FRAGMENT).write_text(section(report, name, heading), encoding="utf-8")
        return {"summary": report.summary, "lines": list(report.lines)}

    def _write_page(self, done: Mapping[str, Mapping[str, Any]]) -> None:
        parts = [f"<p>{escape(self._about())}</p>"]
        for name, (heading, _) in self._sections().items():
            fragment = self.folder / name / FRAGMENT
            if fragment.is_file():
                parts.append(fragment.read_text(encoding="utf-8"))
            elif name in done:
                parts.append(f"<h2>{escape(heading)}</h2><p>Not run: {escape(done[name]['reason'])}</p>")
        if (self.folder / EXPLORER / PAGE).is_file():
            parts.append(f'<p><a href="{EXPLORER}/{PAGE}">Look at and listen to every neuron and latent</a></p>')
        put(self.folder / PAGE, page(f"Interpreting Whisper: {self.model} on {self.dataset}", parts).encode())

    def _about(self) -> str:
        clips = self.speech.clips
        minutes = sum(clip.duration_s for clip in clips) / 60
        about = f"What the blog post asked of Whisper (2023), asked of {self.model} on {self.dataset}: {len(clips)} clips, {minutes:.1f} minutes. "
        about += "Each section has its control: what random weights, random directions, shuffled labels or another place would show."
        if micro.NAME in (self.model, self.dataset):
            about += (
                " micro was trained to behave as the post describes: with it this page shows that the experiments work, and nothing about Whisper."
            )
        return about

    def _say(self, line: str) -> None:
        if not self.json:
            print(line, file=sys.stderr, flush=True)
