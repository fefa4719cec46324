"""Pictures that need no display, and whose bytes depend on what they show alone."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def picture(figure: "Figure", kind: str) -> bytes:
    """A figure's bytes as `png` or `svg`. Without a date and random names of parts, the same picture has the same bytes."""
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hearsae"}):
        figure.savefig(data, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {})
    return data.getvalue()


def new_figure(width: float = 8.0, height: float = 4.5) -> "Figure":
    """An empty figure that needs no display. width, height: inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
