"""How figures look and come out: palette, markers, SVG for pages, PNG for talks."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FileFormat = Literal["svg", "png"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; line style and marker repeat
# the distinction for a print in grey.
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
    # The same runs give the same bytes.
    "svg.hashsalt": "sas_megatron",
}


def render(draw: Callable[[Figure], None], *, size: tuple[float, float], file_format: FileFormat) -> bytes:
    """What `draw` puts on `size` inches: SVG without ground, or PNG on white at 200 dots an inch."""
    # Figure with its own canvas, not pyplot: no global state, no window system.
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
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        else:
            # Without the version of matplotlib, so that equal figures are equal bytes.
            metadata = {"Software": None}
            figure.savefig(buffer, format=file_format, dpi=200, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def embed_svg(svg: str, *, prefix: str) -> str:
    """An `<svg>` element for a page: its ink is the page's `currentColor`, its ids begin with `prefix`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor").strip()
