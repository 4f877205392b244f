"""Line plots as pictures for a sheet."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssl_bench.evaluate.pictures.sheet import PALETTE

Line = tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]
Lines = Mapping[str, Line]
# In the order in which they differ most; yellow is too pale for a line on paper.
_COLORS = [tuple(part / 255 for part in PALETTE[place]) for place in (4, 5, 2, 6, 0, 1)]
_MARKS = "osD^vP"


def plotted(lines: Lines, *, x: str, y: str, filled: bool = False) -> Image.Image:
    """Lines from 0 up with marks, told apart by color and mark; or `filled` curves of densities, without marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, (at, values)) in enumerate(lines.items()):
        color = _COLORS[number % len(_COLORS)]
        mark = None if filled else _MARKS[number % len(_MARKS)]
        axes.plot(at, values, color=color, marker=mark, markersize=5, label=name)
        if filled:
            axes.fill_between(at, values, color=color, alpha=0.3, linewidth=0)
    if not filled:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.08 * max(float(values.max()) for _, values in lines.values()))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")
