"""Who speaks: accents of English and voice variants of espeak-ng, some of them kept for testing."""

import random
from dataclasses import dataclass

ACCENTS = {
    "en-us": "American",
    "en-us-nyc": "New York",
    "en": "British",
    "en-gb-x-rp": "Received Pronunciation",
    "en-gb-scotland": "Scottish",
    "en-gb-x-gbclan": "Lancaster",
    "en-029": "Caribbean",
}
"""espeak-ng's name of each accent, and ours."""

TRAINING_VARIANTS = (
    "m1 m2 m3 m4 m5 m7 m8 f1 f2 f3 f4 Alex Alicia Andrea Andy Annie AnxiousAndy Diogo Gene Gene2 Henrique Hugo Jacky Lee Mario Michael Mike "
    "RicishayMax RicishayMax2 RicishayMax3 Storm adam anika announcer antonio aunty belinda benjamin caleb david ed edward edward2 fast "
    "grandma grandpa gustave iven iven2 iven4 john kaukovalta klatt klatt2 klatt4 klatt5 klatt6 marcelo max michel miguel norbert paul pedro "
    "quincy rob sandro shelby steph steph3 travis zac"
).split()
HELD_OUT_VARIANTS = "m6 f5 Marco Nguyen boris iven3 klatt3 linda pablo robert steph2 victor".split()
"""Never heard in training. The variants in neither list are effects (whisper, croak, robots, demons)."""


@dataclass(frozen=True)
class Voice:
    accent: str
    """One of ACCENTS."""
    variant: str

    @property
    def name(self) -> str:
        """As espeak-ng spells it."""
        return f"{self.accent}+{self.variant}"


def draw_voice(rng: random.Random, variants: list[str]) -> Voice:
    return Voice(rng.choice(list(ACCENTS)), rng.choice(variants))
