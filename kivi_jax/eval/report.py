"""Tables and plots of finished evaluations, from their files alone.

Scores are in percent. A difference from the first cache whose 95 % bootstrap interval over samples holds 0
is marked as noise: do not rank by it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from kivi_jax.eval import (
    frontier,
    generating,
    gsm8k,
    longbench,
    longgenbench,
    needle,
    perplexity,
    ruler,
    select,
    study,
)
from kivi_jax.eval.jobs import Record, check_fields, paired, read_records
from kivi_jax.eval.statistics import Estimate, bootstrap
from kivi_jax.figures import SHADES, cache_colors, new_figure, save_figure

Score = Callable[[Mapping[str, Any]], float]

SCORES: dict[str, dict[str, Score]] = {
    "longbench": {"": longbench.score},
    "longgenbench": {
        "published scorer": longgenbench.published,
        "answers by number": longgenbench.by_number,
    },
    "needle": {"": needle.score},
    "ruler": {"": ruler.score},
    "gsm8k": {"strict": gsm8k.strict, "flexible": gsm8k.flexible},
}
FIELDS: dict[str, tuple[str, ...]] = {  # of records, by evaluation
    **dict.fromkeys(SCORES, generating.FIELDS),
    "longgenbench": (*generating.FIELDS, "first"),
    "needle": (*generating.FIELDS, "length", "depth"),
    "perplexity": perplexity.FIELDS,
    "study": study.FIELDS,
    "frontier": frontier.FIELDS,
    "select": select.FIELDS,
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Records of one evaluation, by cache; whatever else they depend on is the same."""

    settings: Record
    by_cache: dict[str, list[Record]]
    folder: Path  # of the first file of records; the plot goes there

    @property
    def evaluation(self) -> str:
        """The evaluation's name."""
        return self.settings["eval"]

    @property
    def title(self) -> str:
        """What was evaluated on what."""
        named = ("eval", "model", "data", "contents")
        options = (f"{name}={value}" for name, value in self.settings.items() if value and name not in named)
        shown = "".join(f", {option}" for option in options)
        return f"{self.evaluation}: {self.settings['model']} on {self.settings['data']}{shown}"


def read_comparisons(folders: Iterable[Path]) -> list[Comparison]:
    """What the record files in `folders` compare; the full cache first, then by name, shorter ones first.

    Raises:
        ValueError: there are no record files, or two of the same cache and settings; or see `read_records`.
    """
    found: dict[str, Comparison] = {}
    files = {file.resolve(): file for folder in folders for file in sorted(folder.rglob("*.jsonl"))}
    read: dict[tuple[str, str], Path] = {}
    for file in sorted(files.values(), key=lambda file: (file.stem != "full", file.stem, str(file))):
        settings, records = read_records(file)
        if not records or settings.get("eval") not in FIELDS:
            continue  # answers of `kivi-jax generate`, for example
        check_fields(file, [settings | {"id": "the first line"}], ("model", "data"))
        check_fields(file, records, FIELDS[settings["eval"]])
        cache = settings.pop("cache", "")
        same = repr(sorted(settings.items()))
        if (other := read.setdefault((same, cache), file)) != file:
            raise ValueError(f"{other} and {file} are of one evaluation and cache: name one of them")
        found.setdefault(same, Comparison(settings, {}, file.parent)).by_cache[cache] = records
    if not found:
        raise ValueError("there are no predictions in these folders: run kivi-jax eval NAME --out DIR first")
    return list(found.values())


def tables(comparison: Comparison) -> list[Table]:
    """One table per way to score."""
    if comparison.evaluation == "perplexity":
        return [_perplexity_table(comparison)]
    if comparison.evaluation == "frontier":
        return [frontier.table(comparison.title, _points(comparison))]
    if comparison.evaluation == "select":
        return [select.table(comparison.title, select.scores(comparison.by_cache))]
    if comparison.evaluation == "study":
        return [study.table(comparison.title, records) for records in comparison.by_cache.values()]
    return [_score_table(comparison, name, score) for name, score in SCORES[comparison.evaluation].items()]


def _points(comparison: Comparison) -> dict[str, frontier.Point]:
    return frontier.points(comparison.by_cache, comparison.folder)


def _perplexity_table(comparison: Comparison) -> Table:
    records = comparison.by_cache
    baseline = next(iter(records))
    tokens = sum(len(record["nll"]) for record in records[baseline])
    title = escape(f"{comparison.title}, {tokens:,} tokens")  # a path may look like rich's markup
    table = Table(title=title, caption=r"\[...]: 95 % bootstrap interval")
    table.add_column("cache", overflow="fold")
    for column in ("perplexity", "interval", f"vs {baseline}", "interval"):
        table.add_column(column, justify="right")
    for cache, rows in records.items():
        value = perplexity.perplexity(rows)
        cells = [
            _counted(cache, rows, records[baseline]),
            f"{value.mean:.4f}",
            f"[{value.low:.3f}, {value.high:.3f}]".replace("[", r"\["),
        ]
        if cache != baseline:
            change = perplexity.relative_change(*paired(rows, records[baseline]))
            cells += [f"{change.mean:+.3%}", rf"\[{change.low:+.3%}, {change.high:+.3%}]{_noise(change)}"]
        table.add_row(*cells)
    return table


def _score_table(comparison: Comparison, name: str, score: Score) -> Table:
    records = comparison.by_cache
    baseline = next(iter(records))
    tasks = sorted({row["task"] for rows in records.values() for row in rows}, key=_natural)
    table = Table(
        title=escape(comparison.title) + (f", {name}" if name else ""),
        caption=f"percent of {len(records[baseline]):,} samples; 95 % bootstrap intervals; ~ differs from "
        f"{baseline} by no more than noise",
    )
    table.add_column("cache", overflow="fold")
    for task in tasks:
        table.add_column(escape(task), justify="right")
    for column in ("average", "interval", f"vs {baseline}", "interval"):
        table.add_column(column, justify="right")
    for cache, rows in records.items():
        held = {task: [score(row) for row in rows if row["task"] == task] for task in tasks}
        differences: dict[str, list[float]] = {}
        if cache != baseline:
            for row, other in zip(*paired(rows, records[baseline]), strict=True):
                differences.setdefault(row["task"], []).append(score(row) - score(other))
        cells = [_counted(cache, rows, records[baseline])]
        for task in tasks:
            mark = "~" if task in differences and bootstrap(differences[task]).noise else ""
            cells.append(f"{100 * bootstrap(held[task]).mean:.2f}{mark}" if held[task] else "-")
        average = bootstrap(*(values for values in held.values() if values))
        cells += [f"{100 * average.mean:.2f}", _interval(average)]
        if differences:
            change = bootstrap(*differences.values())
            cells += [f"{100 * change.mean:+.2f}", _interval(change) + _noise(change)]
        table.add_row(*cells)
    return table


def _counted(cache: str, rows: Sequence[Record], baseline: Sequence[Record]) -> str:
    """A cache's name, and how many samples there are of it where a run was cut."""
    return cache if len(rows) == len(baseline) else f"{cache} ({len(rows):,} samples)"


def _natural(name: str) -> list[str | int]:
    """A key that sorts "512 tokens" before "1024 tokens"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _interval(estimate: Estimate) -> str:
    return rf"\[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _noise(estimate: Estimate) -> str:
    return " noise" if estimate.noise else ""


def plot(comparison: Comparison) -> Path | None:
    """Save a picture of what there is to see beside the records: perplexity by position, heat maps, bars."""
    draw = {
        "perplexity": _plot_perplexity,
        "needle": _plot_needle,
        "study": _plot_study,
        "frontier": _plot_frontier,
        "select": _plot_select,
    }.get(comparison.evaluation)
    if draw is None:
        return None
    figure = draw(comparison)
    return save_figure(figure, comparison.folder / f"{comparison.evaluation}.png")


def _plot_perplexity(comparison: Comparison) -> Any:
    """By position, and relative to the first cache: where the curves lie on one another."""
    figure = new_figure(7, 7)
    figure.suptitle(comparison.title, fontsize=9)
    above, below = figure.subplots(2, 1, sharex=True)
    curves = {cache: perplexity.by_position(rows) for cache, rows in comparison.by_cache.items()}
    baseline, (_, reference) = next(iter(curves.items()))
    colors = cache_colors(curves)
    for cache, (position, value) in curves.items():
        above.plot(position, value, color=colors[cache], label=cache)
        below.plot(position, 100 * (value / reference - 1), color=colors[cache])
    above.set_yscale("log")
    above.set_ylabel("perplexity")
    above.legend(fontsize=8)
    below.set_ylabel(f"perplexity vs {baseline} (%)")
    below.set_xlabel("position in the window (tokens in the cache)")
    return figure


def _plot_frontier(comparison: Comparison) -> Any:
    return frontier.draw(comparison.title, _points(comparison))


def _plot_select(comparison: Comparison) -> Any:
    return select.draw(comparison.title, select.scores(comparison.by_cache))


def _plot_study(comparison: Comparison) -> Any:
    return study.draw(comparison.title, comparison.by_cache[""])


def _plot_needle(comparison: Comparison) -> Any:
    caches = comparison.by_cache
    figure = new_figure(4 * len(caches) + 1, 4)
    figure.suptitle(
        f"{comparison.evaluation}: {comparison.settings['model']}, found by depth and length", fontsize=9
    )
    panels = figure.subplots(1, len(caches), squeeze=False)[0]
    images = []
    for axes, (cache, records) in zip(panels, caches.items(), strict=True):
        lengths = sorted({record["length"] for record in records})
        depths = sorted({record["depth"] for record in records})
        cells: dict[tuple[float, int], list[float]] = {}
        for record in records:
            cells.setdefault((record["depth"], record["length"]), []).append(needle.score(record))
        grid = np.array(
            [[100 * np.mean(cells.get((depth, length), np.nan)) for length in lengths] for depth in depths]
        )
        images.append(axes.imshow(grid, vmin=0, vmax=100, cmap=SHADES, aspect="auto"))
        for (row, column), found in np.ndenumerate(grid):
            shown, color = ("-", "black") if np.isnan(found) else (f"{found:.0f}", "wk"[int(found > 50)])
            axes.text(column, row, shown, ha="center", va="center", color=color, fontsize=8)
        axes.set_title(cache, fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("prompt (tokens)")
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(images[-1], ax=list(panels), label="found (%)")
    return figure
