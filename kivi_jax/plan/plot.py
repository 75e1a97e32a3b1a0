"""A memory plan as a picture: what caches weigh as contexts grow."""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.config import ModelConfig
from kivi_jax.figures import cache_colors, new_figure
from kivi_jax.plan.memory import plan_cache

POINTS = 8
GIB = 2**30


def contexts_up_to(context: int) -> list[int]:
    """`context` and its halves, the shortest first: at most `POINTS` numbers of tokens."""
    return sorted({max(1, context >> halvings) for halvings in range(POINTS)})


def memory_curves(
    config: ModelConfig,
    caches: Mapping[str, CacheStrategy],
    contexts: Sequence[int],
    *,
    batch: int,
    dtype: str,
    prompt_tokens: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[int]]:
    """Bytes of every cache at every context, of which the first `prompt_tokens` (all) are a prompt.

    `advance` is called after each cache.

    Raises:
        ValueError: see `plan_cache`.
    """
    curves: dict[str, list[int]] = {}
    for name, strategy in caches.items():
        curves[name] = [
            plan_cache(
                config,
                strategy,
                batch=batch,
                context=context,
                dtype=dtype,
                prompt_tokens=None if prompt_tokens is None else min(prompt_tokens, context),
            )["total"]
            for context in contexts
        ]
        advance()
    return curves


def draw_memory(
    title: str,
    contexts: Sequence[int],
    curves: Mapping[str, Sequence[int]],
    *,
    limit: tuple[str, int] | None = None,
) -> Figure:
    """Both axes logarithmic; `limit` is a line to stay below: its name, and bytes (0 or less: no room)."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    colors = cache_colors(curves)
    for name, sizes in curves.items():
        gib = [size / GIB for size in sizes]
        axes.plot(contexts, gib, marker="o", markersize=3, color=colors[name], label=name)
    if limit is not None:
        label, room = limit
        if room > 0:
            axes.axhline(room / GIB, color="black", linestyle="--", linewidth=1, label=label)
        else:
            title = f"{title}\n{label}: no room"
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.tick_params(axis="x", labelrotation=30)
    axes.set(xlabel="tokens in the cache", ylabel="cache, GiB")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(title, fontsize=10)
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    return figure
