"""Whether devices agree: logits of the shipped model on a CPU, an accelerator, and meshes of several."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from kivi_jax.config import ModelConfig
from kivi_jax.mesh import make_mesh
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import fits, spread

Record = dict[str, Any]


def run(
    config: ModelConfig, caches: Sequence[str], *, lengths: Sequence[int], steps: int
) -> Iterator[Record]:
    """Greedy steps after ragged prompts, in float32 with matmul precision "highest".

    The CPU's tokens are given to all, so that every step is compared. A sum in another order can round a
    number to another code, so caches of few bits differ more than a full one.

    Yields for each cache and device or mesh: cache, on, error (the largest difference of a logit from the
    CPU's), largest (logit of the CPU's), tokens_equal (the share of rows and steps with the same likeliest
    token).
    """
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(lengths), max(lengths)), np.int32)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        model = Llama(config, dtype="float32", rngs=nnx.Rngs(0))
    others = {jax.devices()[0].device_kind: jax.device_put(model, jax.devices()[0])}
    for data, size in _meshes(config):
        others[f"data={data},model={size}"] = spread(model, make_mesh(data=data, model=size))
    for cache in caches:
        with jax.default_device(cpu):
            expected = _logits(model, cache, tokens, lengths, steps)
        for on, other in others.items():
            logits = _logits(other, cache, tokens, lengths, steps, expected)
            yield {
                "cache": cache,
                "on": on,
                "error": float(np.abs(logits - expected).max()),
                "largest": float(np.abs(expected).max()),
                "tokens_equal": float((logits.argmax(-1) == expected.argmax(-1)).mean()),
            }


def _meshes(config: ModelConfig) -> list[tuple[int, int]]:
    """(data, model) of meshes of several of this machine's devices, of which all have the same."""
    count = jax.device_count()
    shapes = [(data, size) for size in (1, 2, 4, 8) for data in (1, 2, count) if fits(config, size)]
    return sorted({shape for shape in shapes if 1 < shape[0] * shape[1] <= count})


@jax.default_matmul_precision("highest")
def _logits(
    model: Llama,
    cache: str,
    tokens: np.ndarray,
    lengths: Sequence[int],
    steps: int,
    forced: np.ndarray | None = None,
) -> np.ndarray:
    """[1 + steps, rows, vocabulary] after the prompts, and after every token of theirs or of `forced`."""
    logits, held = model.prefill(
        tokens, np.asarray(lengths, np.int32), cache=cache, capacity=tokens.shape[1] + steps
    )
    seen = [np.asarray(logits)]
    for step in range(steps):
        chosen = (seen if forced is None else forced)[step].argmax(-1).astype(np.int32)
        logits, held = model.decode(chosen, held)
        seen.append(np.asarray(logits))
    return np.stack(seen)


def table(records: Sequence[Record]) -> Table:
    """The differences, a line for each cache and place."""
    out = Table("cache", "on", title="logits beside a CPU's")
    for heading in ("largest difference", "largest logit", "equal tokens"):
        out.add_column(heading, justify="right")
    for r in records:
        numbers = (f"{r['error']:.1e}", f"{r['largest']:.1f}", f"{r['tokens_equal']:.1%}")
        out.add_row(r["cache"], r["on"], *numbers)
    return out
