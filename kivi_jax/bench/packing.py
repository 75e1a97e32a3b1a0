"""Quantizing and packing on a GPU: how fast is the kernel against XLA, and does it compute the same?"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.table import Table

from kivi_jax.bench.kernels import copies, kernel_seconds
from pallas_kernels.quantize import kernel as quantize_kernel
from pallas_kernels.quantize.packing import plane
from pallas_kernels.quantize.quantization import GroupAxis, quantize

Record = dict[str, Any]

_BITS, _GROUP_SIZE = 2, 32


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens that are quantized together: bfloat16 [1, 8, tokens, 128], to 2 bits in groups of 32."""

    name: str
    tokens: int
    group_axis: GroupAxis

    def numbers(self, seed: int) -> Array:
        """What is quantized."""
        x = jax.random.normal(jax.random.key(seed), (1, 8, self.tokens, 128), jnp.bfloat16)
        return 3 * x + 1

    def by_kernel(self, x: Array, *, interpret: bool) -> tuple[Array, Array, Array]:
        """Words, scale and zero by the kernel, or a refusal: no fallback."""
        return quantize_kernel.quantize(
            x, _BITS, _GROUP_SIZE, self.group_axis, jnp.float16, interpret=interpret
        )

    def by_xla(self, x: Array) -> tuple[Array, ...]:
        """Words, scale and zero by XLA."""
        packed = quantize(
            x, bits=_BITS, group_size=_GROUP_SIZE, group_axis=self.group_axis, implementation="xla"
        )
        return packed.words, packed.scale, packed.zero


def run(tokens: int, *, interpret: bool = False) -> Iterator[Record]:
    """Microseconds of a prompt's keys and values, and of a residual of keys that leaves in a decode step.

    Keys: case, contender, us, bytes (of one read and one write), gigabytes_per_s, kernels (name -> us), and
    the shares of codes_equal, scales_equal and zeros_equal to XLA's on the same device, codes_apart at most.
    A contender that fails has `reason` instead.
    """
    cases = (
        Case(f"keys of {tokens} tokens", tokens, "token"),
        Case(f"values of {tokens} tokens", tokens, "channel"),
        Case("a residual's keys", 128, "token"),
    )
    for case in cases:
        contenders = {
            "pallas_triton": lambda x, case=case: case.by_kernel(x, interpret=interpret),
            "xla": case.by_xla,
        }
        for name, pack in contenders.items():
            record: Record = {"case": case.name, "contender": name}
            try:
                yield record | _measured(case, pack)
            except Exception as reason:
                yield record | {"reason": f"{type(reason).__name__}: {str(reason)[:200]}"}


def _measured(case: Case, pack: Any) -> Record:
    """How long it takes, and how much of it is what XLA finds."""
    x = case.numbers(0)
    compiled = jax.jit(pack).lower(x).compile()
    found, expected = compiled(x), jax.jit(case.by_xla)(x)
    size = sum(array.nbytes for array in (x, *found))
    kernels = kernel_seconds(compiled, [(case.numbers(seed),) for seed in copies(size)])
    us = 1e6 * sum(kernels.values())
    return {
        "us": us,
        "bytes": size,
        "gigabytes_per_s": size / us / 1e3,
        "kernels": {name: 1e6 * seconds for name, seconds in kernels.items()},
        **_agreement(found, expected),
    }


def _agreement(found: tuple[Array, ...], expected: tuple[Array, ...]) -> Record:
    """Shares of codes, scales and zeros that are equal, and how far two codes are apart at most."""
    (words, *per_group), (expected_words, *expected_per_group) = found, expected
    apart = jnp.stack(
        [
            jnp.abs(
                plane(words, j, _BITS).astype(jnp.int32) - plane(expected_words, j, _BITS).astype(jnp.int32)
            )
            for j in range(8 // _BITS)
        ]
    )
    scales, zeros = (float((a == b).mean()) for a, b in zip(per_group, expected_per_group, strict=True))
    return {
        "codes_equal": float((apart == 0).mean()),
        "codes_apart": int(apart.max()),
        "scales_equal": scales,
        "zeros_equal": zeros,
    }


def table(records: list[Record]) -> Table:
    """What `run` found."""
    out = Table("what", "by", title="bfloat16 to 2 bits on a GPU, and what share is as XLA's")
    for heading in ("us", "kernels", "MB", "GB/s", "codes", "scales", "zeros"):
        out.add_column(heading, justify="right")
    for r in records:
        if "us" not in r:
            out.add_row(r["case"], r["contender"], r["reason"][:60])
            continue
        shares = (f"{r[key]:.4%}" for key in ("codes_equal", "scales_equal", "zeros_equal"))
        numbers = (f"{r['us']:.1f}", str(len(r["kernels"])), f"{r['bytes'] / 1e6:.1f}")
        out.add_row(r["case"], r["contender"], *numbers, f"{r['gigabytes_per_s']:.0f}", *shares)
    return out
