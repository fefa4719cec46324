"""TextGrids of Praat: interval tiers named words and phones, in its long or short text format.

As in Praat's manual ("TextGrid file formats"): of a file count only what is quoted, the numbers that stand free, and <exists>; the rest is comment.
"""

import math
import re
from collections.abc import Iterator

from cache.errors import HearsaeError

Interval = tuple[float, float, str]

TIERS = {"words": 0, "word": 0, "phones": 1, "phone": 1}
"""Names of the tiers that are read, in any case; also after a speaker's name: `anna - words`."""
LARGEST_BYTES = 1 << 28
_PART = re.compile(
    r'"(?P<text>(?:[^"]|"")*+)"|(?P<open>")|(?<!\S)(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?!\S)|(?<!\S)<(?P<flag>exists|absent)>|(?<!\S)!.*'
)


def read_textgrid(data: bytes, name: str) -> tuple[list[Interval], list[Interval]]:
    """Words and phones: the intervals of the tiers of `TIERS`, those of several speakers together, empty ones too; times in seconds.

    data: UTF-8, or UTF-16 with its byte order mark. name: of the file, for errors. Raises HearsaeError naming file and line.
    """
    text = decoded(data, name)
    parts = _Parts(text, name)
    if (parts.text(), parts.text()) != ("ooTextFile", "TextGrid"):
        raise parts.error("it is no TextGrid in Praat's text format")
    parts.number(), parts.number()
    found: tuple[list[Interval], list[Interval]] = ([], [])
    names = []
    for _ in range(parts.count() if parts.flag() == "exists" else 0):
        kind, tier = parts.text(), parts.text()
        names.append(tier)
        parts.number(), parts.number()
        into = found[TIERS[key]] if (key := tier.split(" - ")[-1].strip().lower()) in TIERS and kind == "IntervalTier" else None
        for _ in range(parts.count()):
            start = parts.number()
            end = parts.number() if kind == "IntervalTier" else start
            label = parts.text()
            if not 0 <= start <= end:
                raise parts.error(f"{start:g} to {end:g} is no stretch of time")
            if into is not None:
                into.append((start, end, label))
    if not any(found):
        raise HearsaeError(f"{name} has no intervals in tiers named words or phones; its tiers: {', '.join(names) or 'none'}")
    return found


def textgrid(words: list[Interval], phones: list[Interval], end_s: float) -> str:
    """A TextGrid with tiers words and phones from 0 to end_s, in the long format. Gaps are empty intervals; of two that overlap the later is cut."""
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end_s!r}", "tiers? <exists>", "size = 2", "item []:"]
    for number, (name, intervals) in enumerate((("words", words), ("phones", phones)), start=1):
        full = list(_without_gaps(intervals, end_s))
        lines += [
            f"    item [{number}]:",
            '        class = "IntervalTier"',
            f'        name = "{name}"',
            "        xmin = 0",
            f"        xmax = {end_s!r}",
        ]
        lines.append(f"        intervals: size = {len(full)}")
        for at, (start, end, label) in enumerate(full, start=1):
            quoted = label.replace('"', '""')
            lines += [f"        intervals [{at}]:", f"            xmin = {start!r}", f"            xmax = {end!r}", f'            text = "{quoted}"']
    return "\n".join(lines) + "\n"


def decoded(data: bytes, name: str) -> str:
    """Text of a file: UTF-8, or UTF-16 with its byte order mark. Raises HearsaeError."""
    if len(data) > LARGEST_BYTES:
        raise HearsaeError(f"{name} has {len(data)} bytes: no more than {LARGEST_BYTES} are read")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise HearsaeError(f"{name} is neither UTF-8 nor UTF-16: {error}") from error


def _without_gaps(intervals: list[Interval], end_s: float) -> Iterator[Interval]:
    at = 0.0
    for start, end, label in sorted(intervals):
        if start > at:
            yield at, start, ""
        if end > at:
            yield max(start, at), end, label
            at = end
    if end_s > at:
        yield at, end_s, ""


class _Parts:
    """What counts of a TextGrid, one after the other."""

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name, self._at = text, name, 0
        self._parts = (part for part in _PART.finditer(text) if part.lastgroup)

    def text(self) -> str:
        return self._next("text", "a quoted text").replace('""', '"')

    def number(self) -> float:
        number = float(self._next("number", "a number"))
        if not math.isfinite(number):
            raise self.error("that number is too large")
        return number

    def count(self) -> int:
        """Of tiers or intervals. What a file claims costs nothing: each is read before there is room for it."""
        count = self.number()
        if count != int(count) or count < 0:
            raise self.error(f"{count:g} is no count")
        return int(count)

    def flag(self) -> str:
        return self._next("flag", "<exists>")

    def _next(self, group: str, what: str) -> str:
        part = next(self._parts, None)
        if part is None:
            self._at = len(self._text)
            raise self.error(f"it ends where {what} should be")
        self._at = part.start()
        if part.lastgroup != group:
            raise self.error(f"there should be {what}, not {part[0][:20]!r}")
        return part[group]

    def error(self, what: str) -> HearsaeError:
        return HearsaeError(f"{self._name}:{self._text.count(chr(10), 0, self._at) + 1}: {what}")
