"""Named shapes of quantized attention, shared by the tests and the benchmark."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantize.packing import Bits
from pallas_kernels.quantize.quantization import QuantizedTensor, quantize

# Which tokens [start, end) the rows see. "ragged": ends differ, one row sees a single token. "window": a
# sliding window, long after token 0. "wrapped": the ring has been overwritten; some rows have forgotten
# their start. "empty": the first row sees nothing.
Ranges = Literal["full", "ragged", "window", "wrapped", "empty"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `quantized_attention`; N = kv_heads * query_groups query heads."""

    name: str
    batch: int
    kv_heads: int
    query_groups: int
    head_dim: int
    slots: int
    key_bits: Bits = 2
    value_bits: Bits = 2
    key_group: int = 32
    value_group: int = 32
    ranges: Ranges = "full"
    scale_dtype: str = "float16"
    query_dtype: str = "float32"

    def __str__(self) -> str:
        """The name, as pytest shows it."""
        return self.name

    def token_ranges(self) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """`start` and `end` of every row."""
        slots = self.slots
        rows: list[tuple[int, int]] = []
        for row in range(self.batch):
            offset = slots * row // self.batch
            match self.ranges:
                case "full":
                    rows.append((0, slots))
                case "ragged":
                    rows.append((0, max(1, offset - 3)))
                case "window":
                    first = slots // 2 + row
                    rows.append((first, first + slots // 5))
                case "wrapped":
                    end = 2 * slots + 7 + offset
                    rows.append((end - slots // 3 if row % 2 else 7, end))
                case "empty":
                    rows.append((0, slots - row) if row else (5, 5))
        start, end = zip(*rows, strict=True)
        return jnp.array(start, jnp.int32), jnp.array(end, jnp.int32)

    def dense(
        self, seed: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """A query, keys and values in float32, normally distributed, keys with a few outlying channels."""
        at = jax.random.split(jax.random.key(seed), 3)
        store = (self.batch, self.kv_heads, self.slots, self.head_dim)
        query = jax.random.normal(at[0], (self.batch, self.kv_heads * self.query_groups, self.head_dim))
        offset = jnp.where(jnp.arange(self.head_dim) % 7 == 3, 4.0, 0.0)
        key = jax.random.normal(at[1], store) + offset[None, None, None, :]
        return query, key, jax.random.normal(at[2], store)

    def query(self, seed: int | Int[Array, ""] = 0) -> Float[Array, "B N H"]:
        """The query of `dense` in the case's dtype."""
        return self.dense(seed)[0].astype(jnp.dtype(self.query_dtype))

    def pack(
        self, key: Float[Array, "B K S H"], value: Float[Array, "B K S H"]
    ) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Keys and values as the case stores them."""
        return (
            quantize(
                key,
                bits=self.key_bits,
                group_size=self.key_group,
                group_axis="token",
                scale_dtype=jnp.dtype(self.scale_dtype),
            ),
            quantize(
                value,
                bits=self.value_bits,
                group_size=self.value_group,
                group_axis="channel",
                scale_dtype=jnp.dtype(self.scale_dtype),
            ),
        )


CORRECTNESS: tuple[Case, ...] = (
    Case("mha", 2, 4, 1, 64, 128),
    Case("gqa", 2, 2, 4, 128, 128, ranges="ragged"),
    Case("gqa_3", 3, 2, 3, 64, 160, ranges="ragged"),
    Case("mqa", 2, 1, 8, 128, 96),
    Case("one_page", 1, 1, 1, 64, 32),
    Case("head_8", 2, 4, 2, 8, 64, key_group=8, value_group=8, ranges="ragged"),
    Case("head_80", 2, 2, 2, 80, 96, value_group=16),
    Case("head_96", 2, 2, 2, 96, 96, ranges="ragged"),
    Case("head_256", 1, 2, 2, 256, 96, value_group=64),
    Case("bits_1", 2, 2, 2, 64, 96, 1, 1),
    Case("bits_4", 2, 2, 2, 64, 96, 4, 4, ranges="ragged"),
    Case("bits_8", 2, 2, 2, 64, 96, 8, 8),
    Case("bits_mixed", 2, 2, 2, 128, 128, 2, 4, ranges="window"),
    Case("bits_4_1", 2, 2, 2, 64, 128, 4, 1, ranges="wrapped"),
    Case("groups_64", 2, 2, 2, 128, 128, key_group=64, value_group=64),
    Case("groups_128", 2, 2, 2, 128, 256, key_group=128, value_group=128, ranges="ragged"),
    Case("groups_8", 2, 2, 2, 64, 96, key_group=8, value_group=8),
    Case("groups_3", 1, 2, 2, 24, 96, key_group=3, value_group=3),
    Case("prime_pages", 4, 2, 2, 64, 32 * 13, ranges="ragged"),
    Case("window", 4, 2, 2, 64, 32 * 12, ranges="window"),
    Case("wrapped", 4, 2, 2, 64, 32 * 7, ranges="wrapped"),
    Case("empty_row", 3, 2, 2, 64, 96, ranges="empty"),
    Case("scale_bfloat16", 2, 2, 2, 64, 96, scale_dtype="bfloat16"),
    Case("scale_float32", 2, 2, 2, 64, 96, scale_dtype="float32"),
    Case("query_bfloat16", 2, 2, 2, 64, 96, query_dtype="bfloat16"),
    # Stores of whole tiles of 64 or 128 tokens, which some kernels need.
    Case("tiles_wrapped", 3, 1, 2, 64, 384, ranges="wrapped", scale_dtype="bfloat16"),
    Case("tiles_empty_row", 3, 1, 2, 128, 192, ranges="empty", query_dtype="bfloat16"),
    Case("tiles_bits_4", 2, 1, 4, 128, 192, 4, 4, ranges="ragged"),
    Case("tiles_bits_8", 2, 1, 2, 128, 128, 8, 8, ranges="ragged"),
    Case("tiles_head_256", 1, 1, 2, 256, 128),
    Case("tiles_mqa", 1, 1, 32, 128, 128),
)

BENCHMARK: tuple[Case, ...] = (
    Case("8B 1 x 32k", 1, 8, 4, 128, 32768),
    Case("8B 1 x 32k 4 bits", 1, 8, 4, 128, 32768, 4, 4),
    Case("8B 1 x 32k 8 bits", 1, 8, 4, 128, 32768, 8, 8),
    Case("8B 8 x 4k", 8, 8, 4, 128, 4096),
    Case("8B 1 x 4k", 1, 8, 4, 128, 4096),
    Case("125M 1 x 1k", 1, 4, 3, 64, 1024),
    Case("125M 1 x 4k", 1, 4, 3, 64, 4096),
    Case("125M 1 x 8k", 1, 4, 3, 64, 8192),
    Case("260K 1 x 512", 1, 4, 2, 8, 512, key_group=8, value_group=8),
)

# On a GPU: Llama-3.1-8B's heads, then one with a KV head for each query head, then with one for all.
GPU: tuple[Case, ...] = (
    Case("1 x 4k", 1, 8, 4, 128, 4096, query_dtype="bfloat16"),
    Case("1 x 32k", 1, 8, 4, 128, 32768, query_dtype="bfloat16"),
    Case("1 x 128k", 1, 8, 4, 128, 131072, query_dtype="bfloat16"),
    Case("32 x 8k", 32, 8, 4, 128, 8192, query_dtype="bfloat16"),
    Case("8 x 32k", 8, 8, 4, 128, 32768, query_dtype="bfloat16"),
    Case("8 x 32k 4 bits", 8, 8, 4, 128, 32768, 4, 4, query_dtype="bfloat16"),
    Case("MHA 1 x 32k", 1, 32, 1, 128, 32768, query_dtype="bfloat16"),
    Case("MQA 8 x 32k", 8, 1, 32, 128, 32768, query_dtype="bfloat16"),
)

# What the compiler is asked for when there is no GPU: every choice that changes the kernel's code.
COMPILED: tuple[Case, ...] = (
    Case("2 bits", 4, 8, 4, 128, 32768, query_dtype="bfloat16"),
    Case("2 bits, groups 64", 4, 8, 4, 128, 32768, key_group=64, value_group=64, query_dtype="bfloat16"),
    Case("2 bits, groups 128", 4, 8, 4, 128, 32768, key_group=128, value_group=128, query_dtype="bfloat16"),
    Case("2 bits, G 1", 4, 8, 1, 128, 32768, query_dtype="bfloat16"),
    Case("2 bits, G 8", 4, 8, 8, 128, 32768, query_dtype="bfloat16"),
    Case("2 bits, G 16", 16, 2, 16, 128, 32768, query_dtype="bfloat16"),
    Case("2 bits, G 16, few rows", 4, 2, 16, 128, 32768, query_dtype="bfloat16"),
    Case("2 bits, H 64", 4, 8, 4, 64, 32768, query_dtype="bfloat16"),
    Case("2 bits, H 96", 4, 8, 4, 96, 32768, query_dtype="bfloat16"),
    Case("2 bits, H 256", 4, 8, 4, 256, 32768, query_dtype="bfloat16"),
    Case("4 bits", 4, 8, 4, 128, 32768, 4, 4, query_dtype="bfloat16"),
    Case("4 bits, G 16", 4, 2, 16, 128, 32768, 4, 4, query_dtype="bfloat16"),
    Case("4 bits, H 64", 4, 8, 4, 64, 32768, 4, 4, query_dtype="bfloat16"),
    Case("4 bits, H 96", 4, 8, 4, 96, 32768, 4, 4, query_dtype="bfloat16"),
    Case("4 bits, H 256", 4, 8, 4, 256, 32768, 4, 4, query_dtype="bfloat16"),
    Case("8 bits", 4, 8, 4, 128, 32768, 8, 8, query_dtype="bfloat16"),
    Case("1 bit", 4, 8, 4, 128, 32768, 1, 1, query_dtype="bfloat16"),
    Case("keys 2, values 4 bits", 4, 8, 4, 128, 32768, 2, 4, query_dtype="bfloat16"),
    Case("2 bits, H 64, G 16", 4, 2, 16, 64, 32768, query_dtype="bfloat16"),
    Case("2 bits, H 96, G 16", 4, 2, 16, 96, 32768, query_dtype="bfloat16"),
    Case("2 bits, H 256, G 16", 4, 2, 16, 256, 32768, query_dtype="bfloat16"),
)
