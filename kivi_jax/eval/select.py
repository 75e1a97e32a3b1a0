"""Which selector of what is generated loses least: an ablation in SCOPE's setting, with intervals.

The prompt is kept whole. Each selector bounds the output to a share of the tokens that it needs, half of
which are the newest. Problems are the demo's numbered questions, all to be answered in one long output.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from kivi_jax.cache.names import parse_cache
from kivi_jax.demo import tasks
from kivi_jax.eval.generating import continue_prompts
from kivi_jax.eval.jobs import Record, finish, in_batches, paired
from kivi_jax.eval.statistics import bootstrap, difference
from kivi_jax.figures import new_figure
from kivi_jax.generation.text import Tokenizer
from kivi_jax.model.llama import Llama

# With w tokens in all, r of them the newest, q a quarter of w.
SELECTORS = {
    "slide": "window={w}:recent={r}",
    "newest only": "window={w}:recent={n}",
    "gkv": "decode=gkv:window={w}:recent={r}",
    "vase": "decode=vase:window={w}:recent={r}:reserve={q}",
    "random": "decode=random:window={w}:recent={r}",
    "random, another draw": "decode=random:window={w}:recent={r}:seed=1",
    "random, blocks of 8": "decode=random:window={w}:recent={r}:block=8",
}
BASELINE = "slide"
FULL: tuple[str, int] = ("full", 100)
FIELDS = ("right", "selector", "percent")  # of every record


Choice = tuple[str, int]  # a selector, and the percentage of the output that it keeps


def caches(output_tokens: int, percents: Sequence[int], base: str) -> dict[Choice, str]:
    """The name of the cache for every choice, and of the full one; `base` is scope or kivi2+scope.

    Raises:
        ValueError: a share is no percentage, or so small that nothing is selected.
    """
    named: dict[Choice, str] = {FULL: "full"}
    for percent in percents:
        window = output_tokens * percent // 100
        if not 4 <= window <= output_tokens:
            raise ValueError(
                f"{percent} % of the output's {output_tokens} tokens are {window}: pass from 4 tokens to all"
            )
        sizes = dict(w=window, r=window // 2, n=window - 1, q=max(1, window // 4))
        for selector, fields in SELECTORS.items():
            named[selector, percent] = f"{base}:{fields.format(**sizes)}"
    return named


def measure(
    model: Llama,
    tokenizer: Tokenizer,
    problems: Mapping[str, tasks.Problem],
    *,
    choice: Choice,
    cache: str,
    path: Path,
    settings: Record,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress,
) -> list[Record]:
    """A record per problem: the share of its answers that are right.

    Raises:
        ValueError: see `jobs.finish`.
    """
    strategy = parse_cache(cache)

    def compute(batch: Sequence[str]) -> list[Record]:
        prompts = [tokenizer(problems[name].prompt)["input_ids"] for name in batch]
        rows = continue_prompts(
            model, prompts, cache=strategy, max_new_tokens=max_new_tokens, rows=batch_size
        )
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        made = {"selector": choice[0], "percent": choice[1]}
        return [{"right": problems[name].score(text)} | made for name, text in zip(batch, texts, strict=True)]

    return finish(
        path,
        settings,
        in_batches(problems, batch_size),
        compute,
        identify=lambda name: name,
        progress=progress,
        fields=FIELDS,
    )


Scores = dict[Choice, Sequence[Record]]  # `right` of every problem


def scores(by_cache: Mapping[str, Sequence[Record]]) -> Scores:
    """What records say of every choice."""
    return {(records[0]["selector"], records[0]["percent"]): records for records in by_cache.values()}


def _right(records: Sequence[Record]) -> list[float]:
    return [record["right"] for record in records]


def _percents(scores: Scores) -> list[int]:
    return sorted({percent for _, percent in scores.keys() - {FULL}})


def _compared(scores: Scores, selector: str, percent: int) -> tuple[str, str]:
    """The cells of a selector: what is right, and how that differs from the baseline's."""
    records, others = scores.get((selector, percent)), scores.get((BASELINE, percent))
    if not records:
        return "-", ""
    mean = f"{100 * bootstrap(_right(records)).mean:.1f}"
    if not others or selector == BASELINE:
        return mean, ""
    change = difference(*(_right(rows) for rows in paired(records, others)))
    bounds = rf"{100 * change.mean:+.1f} \[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    return mean, bounds + "~" * change.noise


def table(title: str, scores: Scores) -> Table:
    """A row per selector, a pair of columns per share."""
    percents = _percents(scores)
    shown = Table(
        title=escape(title),
        caption=f"percent of answers right; against {BASELINE}, 95 % bootstrap interval over problems; "
        "~ the interval holds 0: do not rank by it",
    )
    shown.add_column("selector")
    for percent in percents:
        shown.add_column(f"{percent} %", justify="right")
        shown.add_column(f"vs {BASELINE}", justify="right")
    if FULL in scores:
        full = f"{100 * bootstrap(_right(scores[FULL])).mean:.1f}"
        shown.add_row("full", *(cell for _ in percents for cell in (full, "")))
    for selector in SELECTORS:
        shown.add_row(
            selector, *(cell for percent in percents for cell in _compared(scores, selector, percent))
        )
    return shown


def draw(title: str, scores: Scores) -> Any:
    """What is right against the share that is kept, with intervals."""
    figure = new_figure(7, 5)
    axes = figure.subplots()
    axes.set_title(title, fontsize=9)
    percents = _percents(scores)
    for i, selector in enumerate(SELECTORS):
        known = [percent for percent in percents if (selector, percent) in scores]
        found = [bootstrap(_right(scores[selector, percent])) for percent in known]
        errors = [[100 * (e.mean - e.low) for e in found], [100 * (e.high - e.mean) for e in found]]
        at = [percent + 0.25 * (i - len(SELECTORS) / 2) for percent in known]  # side by side
        axes.errorbar(at, [100 * e.mean for e in found], errors, marker="o", capsize=2, label=selector)
    if FULL in scores:
        axes.axhline(100 * bootstrap(_right(scores[FULL])).mean, linestyle=":", color="gray", label="full")
    axes.set_xlabel("share of the output that is kept (%)")
    axes.set_ylabel("answers right (%)")
    axes.legend(fontsize=8)
    return figure
