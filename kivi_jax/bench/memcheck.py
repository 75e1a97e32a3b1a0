"""The Triton kernels, on arrays of a few pages, for NVIDIA's memory checker.

    compute-sanitizer --error-exitcode 9 python -m kivi_jax.bench.memcheck

Under it a check takes seconds and all of them six minutes on an H200; names of parts after the command
(`pallas_triton triton packing steps`) run these alone, so that several processes may share the work.

Under the checker a GPU runs our kernels and what joins them, and nothing else: Python crashed there as XLA
tuned its first product. So arguments are made on the CPU, and nothing is tuned. The checker follows no CUDA
graphs, so XLA makes none; and each array is an allocation of its own, so that what is beyond its end belongs
to nobody.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import typer
from jaxtyping import Array, Bool, Float
from rich.console import Console

from kivi_jax.bench.kernels import IMPLEMENTATIONS
from kivi_jax.cache import strategy as caches
from kivi_jax.cache.names import parse_cache
from kivi_jax.cache.prompt_selectors import Prompt
from kivi_jax.cache.segments import Segment, Step
from kivi_jax.cache.strategy import CacheStrategy
from pallas_kernels.device import default_device
from pallas_kernels.partials import normalize
from pallas_kernels.quantize.quantization import GroupAxis, dequantize, quantize
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.quantized_attention.cases import CORRECTNESS

_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="
_CACHES = ("kivi2", "kivi4", "kivi2r", "kivi2+scope:window=8:recent=4")
_LENGTHS, _STEPS = (200, 127, 128, 3), 10  # a block becomes full, and pools overflow
_HEADS, _KV_HEADS, _DIM = 4, 2, 64


class Check(NamedTuple):
    """What is computed on a GPU, by our kernels, and on a CPU, by XLA."""

    what: str
    compute: Callable[..., Any]  # gives an array
    arguments: tuple[Any, ...]  # NumPy's


def environment() -> dict[str, str]:
    """What JAX has to find there before it looks for devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
    return {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}


def attention(implementation: str) -> Iterator[Check]:
    """Over packed tokens."""
    attend = functools.partial(_attend, implementation)
    for case in CORRECTNESS:
        with _on_cpu():
            arguments = (case.query(), *case.pack(*case.dense()[1:]), *case.token_ranges())
        yield Check(f"{implementation}: {case}", attend, jax.device_get(arguments))


def packing() -> Iterator[Check]:
    """Of a prompt's keys and values."""
    axes: tuple[GroupAxis, ...] = ("token", "channel")
    for axis, bits in itertools.product(axes, (1, 2, 4, 8)):
        pack = functools.partial(_pack, axis, bits)
        yield Check(f"{bits} bits, groups over {axis}s", pack, (_numbers(1, _KV_HEADS, 128, _DIM),))


def steps() -> Iterator[Check]:
    """Of a layer's cache, which attend to rings and pools and write to them."""
    lengths = np.asarray(_LENGTHS, np.int32)
    for name in _CACHES:
        strategy, (key, value) = parse_cache(name), _numbers(2, lengths.size, _KV_HEADS, max(_LENGTHS), _DIM)
        prompt = Prompt(key, value, np.zeros(key.shape[:3], np.float32), lengths)  # pyright: ignore[reportArgumentType]
        hold = functools.partial(
            strategy.hold_prompt, capacity=max(_LENGTHS) + _STEPS, window=None, layer=0, layers=1
        )
        with _on_cpu():
            held = jax.device_get(jax.jit(hold)(prompt))
        heads = (_numbers(_STEPS, lengths.size, count, _DIM) for count in (_HEADS, _KV_HEADS, _KV_HEADS))
        yield Check(name, functools.partial(_decode, strategy), (held, *heads))


PARTS: dict[str, Callable[[], Iterator[Check]]] = {
    **{name: functools.partial(attention, name) for name in IMPLEMENTATIONS},
    "packing": packing,
    "steps": steps,
}


def run(checks: Iterable[Check]) -> Iterator[dict[str, Any]]:
    """What was computed, the largest difference of the default device's numbers from the CPU's, and the
    largest of these; or why a kernel refused.
    """
    for what, compute, arguments in checks:
        try:
            found = np.asarray(compute(*arguments))
        except NotImplementedError as reason:
            yield {"what": what, "refused": str(reason)}
            continue
        with _on_cpu():
            expected = np.asarray(compute(*arguments))
        error = np.abs(found - expected).max()
        yield {"what": what, "error": float(error), "largest": float(np.abs(expected).max())}


def _on_cpu() -> Any:
    return jax.default_device(jax.devices("cpu")[0])


def _numbers(*shape: int) -> Float[np.ndarray, "..."]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _attend(name: Any, query: Any, key: Any, value: Any, start: Any, end: Any) -> Float[Array, "B N H"]:
    implementation = name if default_device().platform == "gpu" else "xla"
    attend = functools.partial(quantized_attention, implementation=implementation)
    return jax.jit(lambda *x: normalize(attend(*x[:3], start=x[3], end=x[4])))(query, key, value, start, end)


def _pack(axis: GroupAxis, bits: int, x: Any) -> Float[Array, "B K S H"]:
    return jax.jit(lambda x: dequantize(quantize(x, bits=bits, group_size=32, group_axis=axis)))(x)


def _decode(strategy: CacheStrategy, segments: Any, *heads: Any) -> Float[np.ndarray, "steps B N H"]:
    active = np.arange(len(_LENGTHS)) != 2  # one row ends early
    seen = []
    for token in zip(*heads, strict=True):
        attended, segments = _step(strategy, segments, *token, active)
        seen.append(np.asarray(attended))
    return np.stack(seen)


@functools.partial(jax.jit, static_argnames="strategy", donate_argnames="segments")
def _step(
    strategy: CacheStrategy,
    segments: tuple[Segment, ...],
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    active: Bool[Array, "B"],
) -> tuple[Float[Array, "B N H"], tuple[Segment, ...]]:
    """What a layer does with its cache in a decoding step."""
    query, key, value = strategy.split_heads(query, key, value)
    attended = caches.attend(segments, query, key, value)
    step = Step(query, key, value, attended.log_sum_exp, active, attended.out)
    (segments,) = caches.settle([caches.append(segments, step)], active, [0])
    return normalize(attended), segments


def main(parts: Annotated[list[str] | None, typer.Argument(help="Of: " + ", ".join(PARTS))] = None) -> None:
    """Print what each check found."""
    if unknown := [part for part in parts or () if part not in PARTS]:
        raise typer.BadParameter(f"no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    os.environ.update(environment())
    for record in run(itertools.chain.from_iterable(PARTS[part]() for part in parts or PARTS)):
        Console(width=200).print(record, highlight=False)


if __name__ == "__main__":
    typer.run(main)
