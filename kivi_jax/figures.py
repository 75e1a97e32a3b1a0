"""Pictures: matplotlib without a screen, one color for a cache everywhere, saved whole or not at all."""

from collections.abc import Collection
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, LogFormatterMathtext

from kivi_jax import outputs

# Okabe and Ito's colors (2008), which people with any kind of color vision tell apart.
CACHE_COLORS = {
    "full": "#000000",
    "kivi8": "#56B4E9",
    "kivi4": "#0072B2",
    "kivi2": "#E69F00",
    "scope": "#009E73",
    "kivi2+scope": "#D55E00",
}
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
SHADES = "cividis"  # for numbers: dark is little, and gray print keeps the order


def cache_colors(names: Collection[str]) -> dict[str, str]:
    """A color for each cache: the first of a kind (kivi2:group_size=64) has the kind's, others a free one."""
    found: dict[str, str] = {}
    for name in names:
        usual = CACHE_COLORS.get(name.partition(":")[0])
        reserved = {*found.values(), *(CACHE_COLORS.get(other.partition(":")[0]) for other in names)}
        free = [color for color in COLORS if color not in reserved] or list(COLORS)
        found[name] = usual if usual and usual not in found.values() else free[0]
    return found


def new_figure(width: int | float, height: int | float) -> Figure:
    """An empty figure, sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def check_place(path: Path) -> None:
    """Make the folder of a plot, or refuse the place, before what the plot shows is computed.

    Raises:
        ValueError: see `outputs.check_place`.
    """
    outputs.check_place(path, b"\x89PNG")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file, whatever its suffix; a cut leaves the old one.

    No text is read as mathematics: a path may have dollar signs, and fonts for it need not be there.

    Raises:
        ValueError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
            axis.set_major_formatter(LogFormatter())
        if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
            axis.set_minor_formatter(LogFormatter())
    with outputs.whole(path) as partial, matplotlib.rc_context({"text.parse_math": False}):
        figure.savefig(partial, format="png", dpi=150)
    return path
