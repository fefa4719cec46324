"""ARPAbet's phones by how they are articulated, and the one spelling of a label that everything here counts by.

The table is that of phonetics textbooks for North American English (Ladefoged and Johnson, A Course in Phonetics), with the letters of
CMUdict and those that TIMIT and eSpeak NG add. A phone that is not in it, of another language or notation, has no class.
"""

import re

from cache.timings import SILENCE as SILENCE  # the label that timings have for it

CLASSES: dict[str, frozenset[str]] = {
    "vowel": frozenset("AA AE AH AO AW AX AXR AY EH ER EY IH IX IY OW OY UH UW UX".split()),
    "front vowel": frozenset("IY IH IX EH AE EY".split()),
    "central vowel": frozenset("AH AX AXR ER UX".split()),
    "back vowel": frozenset("AA AO OW UH UW".split()),
    "high vowel": frozenset("IY IH IX UH UW UX".split()),
    "low vowel": frozenset("AA AE AO".split()),
    "diphthong": frozenset("AW AY EY OW OY".split()),
    "rhotic": frozenset("R ER AXR".split()),
    "stop": frozenset("P B T D K G DX Q".split()),
    "unvoiced stop": frozenset("P T K Q".split()),
    "voiced stop": frozenset("B D G DX".split()),
    "fricative": frozenset("F V TH DH S Z SH ZH HH HV".split()),
    "sibilant": frozenset("S Z SH ZH CH JH".split()),
    "affricate": frozenset("CH JH".split()),
    "nasal": frozenset("M N NG NX EM EN ENG".split()),
    "liquid": frozenset("L R EL".split()),
    "glide": frozenset("W Y WH".split()),
    "unvoiced": frozenset("P T K Q F TH S SH HH CH WH".split()),
    "voiced": frozenset("AA AE AH AO AW AX AXR AY EH ER EY IH IX IY OW OY UH UW UX B D G DX V DH Z ZH HV JH M N NG NX EM EN ENG L R EL W Y".split()),
}
"""Class -> its phones. Classes overlap: /s/ is a fricative, a sibilant and unvoiced."""

MANNERS = ("vowel", "glide", "liquid", "nasal", "fricative", "affricate", "stop")
"""Of the classes, those of which every phone of ARPAbet is in exactly one; from the most sonorous to the least."""

PHONES = frozenset().union(*CLASSES.values())

_STRESSED = re.compile(r"([A-Z]{2,3})[0-2]")


def plain(label: str) -> str:
    """A label without ARPAbet's stress digit: AH0 -> AH. What is not ARPAbet stays as it is."""
    stressed = _STRESSED.fullmatch(label)
    return stressed[1] if stressed and stressed[1] in CLASSES["vowel"] else label


def manner(phone: str) -> str | None:
    """The one of MANNERS that a phone has; None for silence and for phones outside ARPAbet."""
    return next((name for name in MANNERS if phone in CLASSES[name]), None)
