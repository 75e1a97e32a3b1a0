"""The Triton kernels, on arrays of a few pages, for NVIDIA's memory checker.

    XLA_FLAGS=--xla_gpu_enable_command_buffer= XLA_PYTHON_CLIENT_ALLOCATOR=platform \\
        compute-sanitizer --error-exitcode 9 python -m kivi_jax.bench.memcheck

The checker follows no CUDA graphs, so XLA makes none; and each array is an allocation of its own, so that
what is beyond its end belongs to nobody.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from kivi_jax.bench import agreement, kernels, packing
from kivi_jax.config import ModelConfig
from pallas_kernels.quantized_attention.cases import CORRECTNESS

MODEL = ModelConfig(
    vocab_size=256, hidden_size=256, intermediate_size=512, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=64, max_position_embeddings=1024,
)  # fmt: skip
CACHES = ("kivi2", "kivi4", "kivi2r", "kivi2+scope")
LENGTHS, STEPS = (200, 127, 128, 3), 10


def run() -> Iterator[dict[str, Any]]:
    """What ran: attention over packed tokens, packing, and steps, which write to rings and pools."""
    yield from kernels.correctness(CORRECTNESS, kernels.IMPLEMENTATIONS)
    yield from packing.run(256)
    yield from agreement.run(MODEL, CACHES, lengths=LENGTHS, steps=STEPS)


if __name__ == "__main__":
    for record in run():
        Console(width=200).print(record, highlight=False)
