"""Words and tokens as labels of a picture."""

from functools import lru_cache


@lru_cache(maxsize=1)
def _drawable() -> frozenset[int]:
    """Code points that the font of the pictures has."""
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def drawn(text: str) -> str:
    """A text as the pictures can draw it: what their font lacks is spelled as U+XXXX. Give `parse_math=False` with it: $ is a sign here."""
    known = _drawable()
    return "".join(letter if ord(letter) in known and letter.isprintable() else f"U+{ord(letter):04X}" for letter in text)
