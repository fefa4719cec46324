"""Phone evidence for the page: the list's columns, the scores of a feature, the data of its stacked chart."""

from typing import Any

import numpy as np

from analysis.evidence import COLUMNS, WITH_INTERVAL, PhoneEvidence
from analysis.explorer.datafiles import numbers
from analysis.phone_figure import FEW_FRAMES, GROUPS, TINTS, group_of, stacking
from analysis.scan_folder import Scan

LISTED = ("auc", "f1", "polysemanticity")
"""Columns of the list, after the phone."""
BLACK_FROM = 0.179
"""Luminance from which black has more contrast than white, by the same guidelines."""
NAMES = ("phone", "phone_class")
"""Of the scores, those that are words."""


class PhoneData:
    """The phones of one scan. Phones are numbered in the order of the chart: by how they are articulated, vowels first, silence last."""

    def __init__(self, evidence: PhoneEvidence) -> None:
        """Use `of`."""
        self.evidence = evidence
        phones = tuple(evidence.base)
        self.order = stacking(phones)[::-1]
        self.labels = [phones[i] for i in self.order]

    @classmethod
    def of(cls, scan: Scan) -> "PhoneData | None":
        """None where the scan has no phones. Raises HearsaeError where its files can't be read."""
        return cls(PhoneEvidence.open(scan)) if PhoneEvidence.exists(scan) else None

    def summary(self) -> dict[str, Any]:
        """What is the same for all features: labels, colours, base rates; columns, one value a phone."""
        groups, frames = list(GROUPS), np.array([self.evidence.base[label] for label in self.labels])
        colours, last, in_group = [], object(), 0
        for label in self.labels:
            group = group_of(label)
            in_group, last = (in_group + 1, group) if group == last else (0, group)
            colours.append(tinted(GROUPS[group][0], TINTS[in_group % len(TINTS)]))
        return {
            "labels": self.labels,
            "group": [groups.index(group_of(label)) for label in self.labels],
            "colour": colours,
            "dark": [luminance(colour) < BLACK_FROM for colour in colours],
            "base": numbers((frames / max(1, frames.sum())).tolist()),
            "groups": [{"colour": colour, "name": name} for colour, name in GROUPS.values()],
            "few": FEW_FRAMES,
        }

    def columns(self, features: np.ndarray) -> dict[str, list[Any]]:
        """The list's: `phone` is a number of `labels`, -1 where there is none."""
        number = {label: i for i, label in enumerate(self.labels)}
        table = self.evidence.scores.take(features)
        return {"phone": [number.get(phone, -1) for phone in table["phone"].to_pylist()]} | {
            name: numbers(table[name].to_pylist(), 3) for name in LISTED
        }

    def of_feature(self, feature: int) -> dict[str, Any]:
        """`scores`: a value, or [value, low, high]. `mix`: the edges of the ranges and for each range phone, frames, phone, frames, ..."""
        (row,) = self.evidence.scores.slice(feature, 1).to_pylist()
        scores: dict[str, Any] = {name: row[name] for name in NAMES}
        for name in COLUMNS:
            if name in WITH_INTERVAL:
                scores[name] = numbers([row[name], row[f"{name}_lo"], row[f"{name}_hi"]], 4)
            elif name not in NAMES:
                (scores[name],) = numbers([row[name]], 4)
        mix = self.evidence.mix(feature)
        frames = mix.frames[:, self.order]
        ranges = [np.column_stack([np.flatnonzero(some), some[some > 0]]).ravel().tolist() for some in frames]
        return {"scores": scores, "mix": {"edges": numbers(mix.edges.tolist()), "frames": ranges}}


def tinted(colour: str, white: float) -> str:
    """`#rrggbb` with a share of white in it."""
    return "#" + "".join(f"{round(255 - (1 - white) * (255 - channel)):02x}" for channel in bytes.fromhex(colour[1:]))


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` as in the Web Content Accessibility Guidelines 2.2, 0 to 1."""
    channels = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
