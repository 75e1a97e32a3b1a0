"""The demo's plot: what caches weigh as contexts grow, and what they get right for their weight."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.config import ModelConfig
from kivi_jax.demo.evaluate import Outcome
from kivi_jax.figures import cache_colors, new_figure, save_figure
from kivi_jax.plan.memory import plan_cache

LENGTHS = range(512, 8193, 512)  # tokens, half of them generated


def save_plot(
    file: Path,
    config: ModelConfig,
    caches: Mapping[str, CacheStrategy],
    measured: Mapping[str, Sequence[Outcome]],
) -> None:
    """Write a PNG: left the planned bytes of one row, right the measured outcomes of every task."""
    figure = new_figure(10, 4.2)
    figure.suptitle(
        "The demo model through its caches: what they weigh, and what they get right", fontsize=11
    )
    colors = cache_colors(caches)
    memory, accuracy = figure.subplots(1, 2)
    for name, cache in caches.items():
        sizes = [
            plan_cache(config, cache, batch=1, context=length, dtype="float32", prompt_tokens=length // 2)
            for length in LENGTHS
        ]
        memory.plot(LENGTHS, [size["total"] / 2**20 for size in sizes], color=colors[name], label=name)
    memory.set(xlabel="tokens, half of them generated", ylabel="cache of one prompt, MiB", ylim=0)
    memory.legend()
    for (title, outcomes), marker in zip(measured.items(), "os^v", strict=False):
        for index, outcome in enumerate(outcomes):
            low, high = outcome.interval
            accuracy.errorbar(
                outcome.row_bytes / 2**20,
                100 * outcome.right,
                yerr=[[100 * max(0.0, outcome.right - low)], [100 * max(0.0, high - outcome.right)]],
                fmt=marker,
                capsize=3,
                color=colors[outcome.cache],
                label=title if index == 0 else None,
            )
    accuracy.set(xlabel="cache of one prompt, MiB", ylabel="right, % (95 % interval)", xlim=0, ylim=(0, 103))
    accuracy.legend(title="colors as on the left", loc="lower right")
    save_figure(figure, file)
