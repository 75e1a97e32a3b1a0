"""Pictures of results: matplotlib without a screen, saved whole or not at all."""

from pathlib import Path
from typing import Any


def new_figure(width: int | float, height: int | float) -> Any:
    """An empty figure, sizes in inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'kivi-jax[eval]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a PNG file; a cut leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    figure.savefig(temporary, format="png", dpi=150)
    return temporary.replace(path)
