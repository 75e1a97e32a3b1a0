"""What a GPU should measure, written down before it does, and compared afterwards.

A kernel that only reads memory takes its bytes over the rate of a copy; one that only computes takes its
instructions over the rate at which all schedulers together issue them. The prediction is the larger of the
two, so it is a limit: what is measured beyond it is latency, launches, or work that was not counted.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from rich.table import Table

from kivi_jax.bench import aot
from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.config import ModelConfig
from kivi_jax.plan.memory import largest_batch, parameter_count, plan_cache
from pallas_kernels.quantized_attention.cases import Case

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device does at most in a second."""

    bytes: float  # that a copy reads and writes
    instructions: float  # of single lanes
    memory: int  # bytes that rows may fill

    def microseconds(self, *, nbytes: int | float, instructions: int | float = 0) -> float:
        """The least time for so many bytes and instructions."""
        return 1e6 * max(nbytes / self.bytes, instructions / self.instructions)


# The copy is what one measured (docs/results-gpu.md), the clock is the boost clock under load: 132
# multiprocessors x 4 schedulers x 32 lanes x 1.755 GHz.
H100 = Ceilings(bytes=2.9e12, instructions=132 * 4 * 32 * 1.755e9, memory=int(0.9 * 79e9))


def kernels(
    cases: Sequence[Case],
    implementations: Sequence[str],
    *,
    ceilings: Ceilings = H100,
    sm: int = 90,
) -> Iterator[Record]:
    """Attention alone: for bfloat16, and for every kernel that does not refuse the case.

    Keys: case, contender ("bfloat16", "packed, triton", ...), bytes, us; and for packed tokens
    instructions_per_code, as the kernel compiles for capability `sm` without a GPU.
    """
    for case in cases:
        codes = 2 * case.batch * case.kv_heads * case.slots * case.head_dim
        dense: Record = {"case": case.name, "contender": "bfloat16", "bytes": 2 * codes}
        yield dense | {"us": ceilings.microseconds(nbytes=2 * codes)}
        for name in implementations:
            try:
                compiled = aot.record(case, sm, name)
            except NotImplementedError:
                continue
            each, nbytes = compiled["instructions_per_code"], compiled["packed_bytes"]
            record = {"case": case.name, "contender": f"packed, {name}", "bytes": nbytes}
            us = ceilings.microseconds(nbytes=nbytes, instructions=each * codes)
            yield record | {"instructions_per_code": each, "us": us}


def steps(
    config: ModelConfig,
    strategies: Mapping[str, CacheStrategy],
    *,
    context: int,
    capacity: int,
    batch: int | None,
    dtype: DTypeLike,
    ceilings: Ceilings = H100,
) -> Iterator[Record]:
    """Whole decode steps: every weight and all of the cache are read once.

    `batch` None: as many rows as fit. Keys: case, contender (the cache), batch, bytes, us of a row's token.
    """
    weights = weights_read(config, dtype)
    for name, strategy in strategies.items():
        memory = ceilings.memory
        rows = batch or largest_batch(config, strategy, context=capacity, dtype=dtype, memory_bytes=memory)
        if rows == 0:
            continue
        held = plan_cache(config, strategy, batch=rows, context=capacity, dtype=dtype, prompt_tokens=context)
        nbytes = weights + held["total"]
        us = ceilings.microseconds(nbytes=nbytes) / rows
        yield {"case": step_case(context, batch), "contender": name, "batch": rows, "bytes": nbytes, "us": us}


def weights_read(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of the parameters that a step reads: of embeddings that are not the head, a few rows."""
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return (parameter_count(config) - looked_up) * jnp.dtype(dtype).itemsize


def step_case(context: int, batch: int | None) -> str:
    """The name of whole decode steps with `batch` rows (None: as many as fit) of `context` tokens."""
    return f"step, {batch or 'most'} x {context}"


def compare(predicted: Sequence[Record], measured: Sequence[Record]) -> list[Record]:
    """Every measurement that has a prediction: case, contender, predicted_us, measured_us and their ratio,
    and gigabytes_per_s as measured.

    Records belong together whose case and contender are equal; a prediction for "bfloat16" is that of all
    contenders whose names begin so.
    """
    expected = {(record["case"], record["contender"]): record["us"] for record in predicted}
    found = []
    for record in measured:
        case, contender = record["case"], record["contender"]
        us = expected.get((case, contender), expected.get((case, contender.split(",")[0])))
        if us is not None and "us" in record:
            ratio = record["us"] / us
            times = {"predicted_us": us, "measured_us": record["us"], "ratio": ratio}
            rate = record.get("gigabytes_per_s")
            found.append({"case": case, "contender": contender, **times, "gigabytes_per_s": rate})
    return found


def table(compared: Sequence[Record], copy_rate: float | None = None) -> Table:
    """What `compare` found; `copy_rate` is that of the device's copies, in GB/s."""
    out = Table("case", "contender", title="the least time that was predicted, and what was measured")
    for heading in ("predicted us", "measured us", "ratio", "GB/s", "of a copy's"):
        out.add_column(heading, justify="right")
    for record in compared:
        times, rate = (record["predicted_us"], record["measured_us"]), record["gigabytes_per_s"]
        out.add_row(
            record["case"],
            record["contender"],
            *(f"{n:.1f}" for n in times),
            f"{record['ratio']:.2f}",
            f"{rate:,.0f}" if rate else "",
            f"{rate / copy_rate:.0%}" if rate and copy_rate else "",
        )
    return out
