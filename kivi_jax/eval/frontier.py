"""What a cache costs and what it saves, side by side: the table to choose a cache by.

Windows of texts are decoded token by token with the true token given, once through the cache and once
through a full one. Kept are, for each window, what the true tokens cost, how far the distributions are from
the full cache's, and how often the likeliest token is the same; beside them the cache's bytes at that length,
everything counted.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from kivi_jax.cache.names import parse_cache
from kivi_jax.cache.strategy import CacheStrategy, full
from kivi_jax.console import format_bytes
from kivi_jax.eval import needle
from kivi_jax.eval.jobs import Record, finish, in_batches, paired, read_records
from kivi_jax.eval.perplexity import Window, read_windows, relative_change
from kivi_jax.eval.statistics import Estimate, bootstrap
from kivi_jax.figures import new_figure
from kivi_jax.model.llama import Llama
from kivi_jax.plan.memory import plan_cache

FIELDS = ("text", "nll", "divergence", "agreement", "bytes")  # of every record
PASSKEYS = "passkey"  # the folder of their records, beside that of the windows


class Text(NamedTuple):
    """A text by name, in windows."""

    name: str
    windows: list[Window]


def read_texts(tokenizer: Any, files: Mapping[str, str], *, length: int, windows: int) -> list[Text]:
    """The first `windows` windows of `length` tokens of each text.

    Raises:
        ValueError: see `read_windows`.
    """
    return [Text(name, read_windows(tokenizer, text, length)[:windows]) for name, text in files.items()]


def measure(
    model: Llama,
    texts: Sequence[Text],
    *,
    cache: str,
    path: Path,
    settings: Record,
    batch_size: int,
    progress: Progress,
) -> list[Record]:
    """A record per window of every text, in `path` and returned.

    Raises:
        ValueError: see `jobs.finish`.
    """
    strategy = parse_cache(cache)
    items = [(text.name, window) for text in texts for window in text.windows]
    length = max(len(context) + len(tokens) for _, (_, context, tokens) in items)
    dtype = model.embed.embedding[...].dtype
    held = plan_cache(model.config, strategy, batch=1, context=length, dtype=dtype, prompt_tokens=1)["total"]

    def compute(batch: Sequence[tuple[str, Window]]) -> list[Record]:
        rows = [context[-1:] + tokens for _, (_, context, tokens) in batch]
        rows += rows[:1] * (batch_size - len(rows))
        lengths = jnp.asarray([len(row) for row in rows])
        tokens = np.zeros((batch_size, length), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        nll, divergence, same = map(np.asarray, _compare(model, jnp.asarray(tokens), lengths, strategy))
        return [
            {
                "text": name,
                "nll": [round(float(value), 5) for value in nll[i, : len(rows[i]) - 1]],
                "divergence": float(divergence[i] / (len(rows[i]) - 1)),
                "agreement": float(same[i] / (len(rows[i]) - 1)),
                "bytes": held,
            }
            for i, (name, _) in enumerate(batch)
        ]

    return finish(
        path,
        settings,
        in_batches(items, batch_size),
        compute,
        identify=lambda item: f"{item[0]}-{item[1][0]}",
        progress=progress,
        fields=FIELDS,
    )


@functools.partial(jax.jit, static_argnames=("strategy",))
def _compare(
    model: Llama, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], strategy: CacheStrategy
) -> tuple[Float[Array, "B T"], Float[Array, "B"], Float[Array, "B"]]:
    """Each next token's negative log-probability under `strategy`; and sums over a row's tokens.

    These are of the divergence KL(full || strategy), and of where both find the same token the likeliest.
    """
    rows, width = tokens.shape
    one = jnp.ones(rows, jnp.int32)
    starts = [model.prefill(tokens[:, :1], one, cache=cache, capacity=width) for cache in (strategy, full())]
    nothing = (
        jnp.zeros((rows, width), jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )

    def score(i: Array, logits: list[Array], scored: tuple) -> tuple:
        ours, reference = (jax.nn.log_softmax(x) for x in logits)
        nll, divergence, same = scored
        token, real = tokens[:, i], (i < lengths).astype(jnp.float32)
        chosen = jnp.take_along_axis(ours, token[:, None], axis=1)[:, 0]
        apart = (jnp.exp(reference) * (reference - ours)).sum(-1)
        agrees = (ours.argmax(-1) == reference.argmax(-1)).astype(jnp.float32)
        return nll.at[:, i - 1].set(-chosen), divergence + real * apart, same + real * agrees

    def advance(i: Array, state: tuple) -> tuple:
        caches, scored = state
        steps = [model.decode(tokens[:, i - 1], cache, i - 1 < lengths) for cache in caches]
        return [cache for _, cache in steps], score(i, [logits for logits, _ in steps], scored)

    scored = score(jnp.int32(1), [logits for logits, _ in starts], nothing)
    state = ([cache for _, cache in starts], scored)
    return jax.lax.fori_loop(2, lengths.max(), advance, state)[1]


class Point(NamedTuple):
    """One cache: its bytes at the windows' length, and what it costs."""

    bytes: int
    perplexity: dict[str, Estimate]  # by text, relative to the full cache's: 0.01 is 1 % higher
    divergence: float
    agreement: float
    passkeys: dict[int, Estimate]  # by length, the share found

    @property
    def cost(self) -> float:
        """The texts' mean change of perplexity."""
        return float(np.mean([change.mean for change in self.perplexity.values()]))


def points(by_cache: Mapping[str, Sequence[Record]], folder: Path) -> dict[str, Point]:
    """What records of windows, and of passkeys in the folder beside `folder`, say about each cache.

    The first cache is what the others are compared with.
    """
    baseline = next(iter(by_cache.values()))
    found: dict[str, Point] = {}
    for cache, records in by_cache.items():
        ours, reference = paired(records, baseline)
        if not ours:  # none of its windows is done
            continue
        changes = {
            text: relative_change(*([r for r in rows if r["text"] == text] for rows in (ours, reference)))
            for text in dict.fromkeys(record["text"] for record in ours)
        }
        file = folder.parent / PASSKEYS / f"{cache.replace(':', ',')}.jsonl"
        asked: dict[int, list[float]] = {}
        for record in read_records(file)[1]:
            asked.setdefault(record["length"], []).append(needle.score(record))
        found[cache] = Point(
            records[0]["bytes"],
            changes,
            float(np.mean([record["divergence"] for record in records])),
            float(np.mean([record["agreement"] for record in records])),
            {length: bootstrap(scores) for length, scores in sorted(asked.items())},
        )
    return found


def pareto(found: Mapping[str, Point]) -> list[str]:
    """The caches that no other one beats in bytes and in perplexity at once, smallest first."""
    best, chosen = math.inf, []
    for name, point in sorted(found.items(), key=lambda item: (item[1].bytes, item[1].cost)):
        if point.cost < best:
            best = point.cost
            chosen.append(name)
    return chosen


def table(title: str, found: Mapping[str, Point]) -> Table:
    """All caches, smallest last; those of the Pareto front are marked."""
    baseline, front = next(iter(found.values())), pareto(found)
    lengths = sorted({length for point in found.values() for length in point.passkeys})
    shown = Table(
        title=escape(title),
        caption=f"perplexity against {next(iter(found))}, with 95 % bootstrap intervals over windows; "
        "* no other cache is smaller and better",
    )
    shown.add_column("cache", overflow="fold")
    for column in ("bytes", "smaller"):
        shown.add_column(column, justify="right")
    texts = list(baseline.perplexity)
    for text in texts:
        shown.add_column(escape(text), justify="right")
    for column in ("KL", "same top 1", *(f"passkey {length}" for length in lengths)):
        shown.add_column(column, justify="right")
    for name, point in sorted(found.items(), key=lambda item: -item[1].bytes):
        found_keys = point.passkeys
        shown.add_row(
            name + (" *" if name in front else ""),
            format_bytes(point.bytes),
            f"{baseline.bytes / point.bytes:.2f}x",
            *(_percent(point.perplexity[text]) if text in point.perplexity else "-" for text in texts),
            f"{point.divergence:.4f}",
            f"{100 * point.agreement:.1f} %",
            *(f"{100 * found_keys[n].mean:.1f} %" if n in found_keys else "-" for n in lengths),
        )
    return shown


def _percent(change: Estimate) -> str:
    return rf"{100 * change.mean:+.2f} % \[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def draw(title: str, found: Mapping[str, Point]) -> Any:
    """Perplexity against bytes, the Pareto front as a line."""
    figure = new_figure(7, 5)
    axes = figure.subplots()
    axes.set_title(title, fontsize=9)
    sizes = {name: point.bytes / 2**20 for name, point in found.items()}
    costs = {name: 100 * max(point.cost, 0.0) for name, point in found.items()}
    front = pareto(found)
    axes.plot([sizes[name] for name in front], [costs[name] for name in front], zorder=1)
    axes.scatter(list(sizes.values()), list(costs.values()), zorder=2)
    for name, size in sizes.items():
        axes.annotate(name, (size, costs[name]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("bytes of the cache of one row (MiB)")
    axes.set_ylabel("perplexity above the full cache's (%)")
    return figure
