"""Pictures: matplotlib without a screen, saved whole or not at all."""

from pathlib import Path

from matplotlib.figure import Figure


def new_figure(width: int | float, height: int | float) -> Figure:
    """An empty figure, sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file, whatever its suffix; a cut leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png", dpi=150)
    return temporary.replace(path)
