"""Short clips on one thread, from FLAC files to activations on a disk: whole windows, trimmed ones, and openai-whisper with hooks.

    python benchmarks/short_clips.py --assets DIR [--model FILE] [--seconds 2] [--clips 96] [--margin 1] [--rounds 5] [--table]

Clips are the first seconds of files of the test split, written as FLAC. Contenders in turn, medians; duties as in `capture.py`: every one decodes,
makes the log-mel, runs the encoder, and keeps float16 rows of real frames on the disk, synchronised. Measuring the deviation is not part of
the time: it is the same few clips however large the set.

`--table`: how far trimmed activations are from those of whole windows, for several margins and lengths of clips.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import soundfile
import torch
from capture import SITES, Clips, of_hearsae, of_whisper, samples_of, take_turns

from cache.context import Context
from cache.deviation import Deviation, DeviationSums, compare
from cache.encoder import best_arithmetic, encode
from cache.model import LoadedModel, fast_matmul, load_model, log_mel_of
from cache.sites import match_sites

MARGINS_S, LENGTHS_S = (0.0, 0.5, 1.0, 2.0, 4.0), (2.0, 6.0)


class ShortClips(Clips):
    """The first seconds of files that are long enough."""

    def __init__(self, assets: Path, count: int, seconds: float, folder: Path) -> None:
        super().__init__(assets, 10**6)
        long = [path for path in self.paths if soundfile.info(path).duration >= seconds]
        self.paths = []
        for path in long[:: max(1, len(long) // count)][:count]:
            self.paths.append(folder / path.name)
            soundfile.write(self.paths[-1], samples_of(path)[: round(seconds * 16000)], 16000)
        self.frames = [round(seconds * 50)] * len(self.paths)


def deviations(model: LoadedModel, clips: Clips, sites: list[str], margin: float) -> dict[str, Deviation]:
    """Over all clips."""
    encoder, arithmetic = model.module.get_submodule("encoder"), best_arithmetic(torch.device("cpu"))
    sums = {name: DeviationSums() for name in sites}
    for path, frames in zip(clips.paths, clips.frames, strict=True):
        found = []
        for context in (Context(margin), Context(None)):
            mel = log_mel_of(samples_of(path), context.window(frames, model.dims.n_audio_ctx), model)[None]
            found.append(encode(encoder, mel, sites, frames, arithmetic))
        for name in sites:
            sums[name] = sums[name].plus(compare(*(values[name][0].numpy() for values in found)))
    return {name: of_site.deviation() or Deviation(0.0, 1.0, 0) for name, of_site in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--margin", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", nargs="+", choices=list(SITES), default=["residual", "pair"])
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = arguments.model or str(arguments.assets / "whisper" / "tiny.en.encoder.pt")
    model = load_model(name, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        clips = ShortClips(arguments.assets, arguments.clips, arguments.seconds, Path(folder))
        print(f"{len(clips.paths)} clips of {arguments.seconds:g} s; ours runs on {type(best_arithmetic(torch.device('cpu'))).__name__}")
        for which in arguments.sites:
            sites = [site.name for site in match_sites(SITES[which], model.dims_dict, model.has_decoder)]
            with tempfile.TemporaryDirectory() as out:
                compare_speeds(which, sites, name, model, clips, Path(out), arguments)
    for seconds in LENGTHS_S if arguments.table else ():
        with tempfile.TemporaryDirectory() as folder, fast_matmul():
            clips = ShortClips(arguments.assets, arguments.clips, seconds, Path(folder))
            sites = [site.name for site in match_sites(["encoder.blocks.?", "encoder.blocks.?.mlp.1"], model.dims_dict, model.has_decoder)]
            print(json.dumps({"seconds": seconds, "clips": len(clips.paths)}))
            for margin in MARGINS_S:
                found = deviations(model, clips, sites, margin)
                print(f"  margin {margin:3g} s  " + "  ".join(f"{site[15:]} {one.relative:.3f}/{one.cosine:.4f}" for site, one in found.items()))


def compare_speeds(which: str, sites: list[str], name: str, model: LoadedModel, clips: Clips, out: Path, arguments: argparse.Namespace) -> None:
    trimmed = {"context": "trimmed", "margin": arguments.margin}
    contenders = {
        "hearsae, padded": of_hearsae(name, clips, sites, out / "padded"),
        f"hearsae, trimmed, margin {arguments.margin:g} s": of_hearsae(name, clips, sites, out / "trimmed", **trimmed),
        "openai-whisper with hooks": of_whisper(model, clips, sites, out),
    }
    seconds = take_turns(contenders, arguments.rounds)
    theirs = seconds["openai-whisper with hooks"]
    print(f"{which}: {', '.join(sites)}")
    for contender, times in seconds.items():
        each_ms = statistics.median(times) / len(clips.paths) * 1e3
        ratio = statistics.median([one / mine for one, mine in zip(theirs, times, strict=True)])
        print(f"  {contender:30s} {1e3 / each_ms:7.1f} windows/s {each_ms:8.2f} ms   {ratio:5.2f}x openai-whisper")
    with fast_matmul():
        for site, found in deviations(model, clips, sites, arguments.margin).items():
            print(f"    {site:24s} relative {found.relative:.3f}, mean cosine {found.cosine:.4f}")


if __name__ == "__main__":
    main()
