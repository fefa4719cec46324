"""How long the live page waits: from an upload's first byte to its answers, over HTTP on loopback.

    python benchmarks/live.py SCAN... [--seconds 5 30] [--repeats 10] [--model FILE]

The sound is the first clips of the scans' store, one after the other. Prints the median of each step in ms.
"""

import argparse
import io
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import soundfile

from analysis.explorer.live import Live
from analysis.explorer.live_api import LiveApi
from analysis.explorer.server import LiveServer
from cache.audio import load_clip
from cache.header import SAMPLE_RATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+")
    parser.add_argument("--seconds", nargs="+", type=float, default=[5.0, 30.0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--model", nargs="*", default=[])
    options = parser.parse_args()
    live = Live.open(options.scans, options.model)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with tempfile.TemporaryDirectory() as page, LiveServer(Path(page), LiveApi(live), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"

        def ask(path: str, data: bytes | None = None) -> dict:
            with opener.open(urllib.request.Request(f"{base}/live/api/{path}", data, {"Origin": base})) as answer:
                return json.load(answer)

        for seconds in options.seconds:
            sound = sound_of(live, seconds)
            took: dict[str, list[float]] = {}
            for _ in range(options.repeats + 1):
                began = time.perf_counter()
                audio = ask("upload", sound)["audio"]
                steps = {"upload": time.perf_counter() - began}
                for scan in live.scans:
                    start = time.perf_counter()
                    ask(f"strips?audio={audio}&scan={scan.name}")
                    steps[scan.title] = time.perf_counter() - start
                for name, value in steps.items():
                    took.setdefault(name, []).append(value)
            print(json.dumps({"seconds": seconds} | {name: round(1000 * statistics.median(values[1:])) for name, values in took.items()}))
        server.shutdown()


def sound_of(live: Live, seconds: float) -> bytes:
    """A WAV file of so many seconds of the first scan's clips."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        parts.append(load_clip(live.scans[0].store, len(parts)))
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(parts)[: round(seconds * SAMPLE_RATE)], SAMPLE_RATE, format="WAV")
    return file.getvalue()


if __name__ == "__main__":
    main()
