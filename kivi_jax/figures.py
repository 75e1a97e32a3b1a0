"""Pictures: matplotlib without a screen, one color for a cache everywhere, saved whole or not at all."""

import os
from collections.abc import Collection
from pathlib import Path

from matplotlib.figure import Figure

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
        ValueError: it is a directory, or below what is none, or may not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        possible = False
    else:
        possible = os.access(path.parent, os.W_OK) and not path.is_dir()
    if not possible:
        raise ValueError(f"{path} cannot be written: choose another file for the plot")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file, whatever its suffix; a cut leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png", dpi=150)
    return temporary.replace(path)
