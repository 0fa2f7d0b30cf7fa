"""Style and output of figures: palette, markers, SVG for pages, PNG for slides."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FileFormat = Literal["svg", "png"]

# The palette of Okabe and Ito, which is distinguishable with colour vision deficiency. Line style and marker
# repeat the distinction for grey prints.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
INK = "#1b1f24"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # A constant salt makes the output deterministic.
    "svg.hashsalt": "sas_megatron",
}


def choose_style(index: int) -> dict[str, Any]:
    """Return the colour, marker and line style of the variant with this index."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
    }


def render(draw: Callable[[Figure], None], *, size: tuple[float, float], file_format: FileFormat) -> bytes:
    """Return a figure of `size` inches as transparent SVG, or as PNG on white at 200 dots per inch.

    Args:
        draw: Draws on an empty figure.
        size: Width and height in inches.
        file_format: "svg" or "png".
    """
    # A figure with its own canvas instead of pyplot: no global state, no window system.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.05))
        FigureCanvasAgg(figure)
        draw(figure)
        if file_format == "svg":
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        else:
            # The version of matplotlib is left out, so that the output is deterministic.
            metadata = {"Software": None}
            figure.savefig(buffer, format=file_format, dpi=200, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def embed_svg(svg: str, *, prefix: str) -> str:
    """Return an `<svg>` element in the `currentColor` of its page, with ids that begin with `prefix`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor").strip()
