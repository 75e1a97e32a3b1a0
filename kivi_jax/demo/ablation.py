"""Along which axis to group? `python -m kivi_jax.demo.ablation` repeats the KIVI paper's comparison.

Keys and values of the prompt are rounded to their codes' grid and held in full precision, so that all four
combinations of axes can be compared; only KIVI's own is stored packed by the caches of this package. Answers
are shorter than the residual, so what they add is not rounded.
Source: KIVI (arXiv 2402.02750) section 3.2.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import typer
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kivi_jax.bench.command import machine
from kivi_jax.cache.prompt_selectors import Prompt
from kivi_jax.cache.segments import Segment
from kivi_jax.cache.strategy import CacheStrategy, full
from kivi_jax.console import print_table, run
from kivi_jax.demo import tasks
from kivi_jax.demo.evaluate import compare
from kivi_jax.generation.loading import load_with_tokenizer
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import GroupAxis, dequantize, quantize

# By what the parameters of a group belong to: a channel's group runs over tokens, a token's over channels.
AXES: dict[str, GroupAxis] = {"per channel": "token", "per token": "channel"}
RESIDUALS = (32, 128)


@dataclass(frozen=True, kw_only=True)
class Rounded(CacheStrategy):
    """A full cache whose prompt was quantized and dequantized, but for the newest `residual_length`."""

    key_axis: GroupAxis = AXES["per channel"]
    value_axis: GroupAxis = AXES["per token"]
    bits: int = 2
    group_size: int = 32
    residual_length: int = 128

    def hold_prompt(self, prompt: Prompt, **options: Any) -> tuple[Segment, ...]:
        """See `CacheStrategy`."""
        keys = self._round(prompt.keys, prompt.lengths, self.key_axis)
        values = self._round(prompt.values, prompt.lengths, self.value_axis)
        return super().hold_prompt(prompt._replace(keys=keys, values=values), **options)

    def _round(
        self, x: Float[Array, "B K P H"], lengths: Int[Array, "B"], axis: GroupAxis
    ) -> Float[Array, "B K P H"]:
        """As KIVI does: groups of tokens leave the residual in blocks of its length, tokens one by one."""
        residual = self.residual_length
        packed = lengths // residual * residual if axis == "token" else lengths - residual
        whole = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % PAGE), (0, 0)))
        rounded = dequantize(
            quantize(whole, bits=self.bits, group_size=self.group_size, group_axis=axis), x.dtype
        )
        is_packed = jnp.arange(x.shape[2])[None] < packed[:, None]
        return jnp.where(is_packed[:, None, :, None], rounded[:, :, : x.shape[2]], x)


def main(
    model: Annotated[str, typer.Option(help="As for `kivi-jax generate`.")] = "demo",
    bits: Annotated[int, typer.Option(help="1, 2, 4 or 8.")] = 2,
    tokens: Annotated[int, typer.Option(help="Of a passkey problem.")] = 1024,
    problems: Annotated[int, typer.Option(help="Held-out problems.")] = 64,
) -> None:
    """Print the passkey accuracy of every combination of axes, at residual lengths 32 and 128."""
    llama, tokenizer = load_with_tokenizer(model)
    held_out = [tasks.passkey(seed, tokens) for seed in range(problems)]
    table = Table(
        "keys",
        "values",
        *(f"R = {residual}" for residual in RESIDUALS),
        title=f"Pass keys found, %: {problems} problems of {tokens:,} tokens, {bits} bits, groups of 32",
        caption=machine(),
    )

    def right(cache: CacheStrategy) -> str:
        (outcome,) = compare(llama, tokenizer, held_out, {"": cache})
        return f"{100 * outcome.right:.1f}"

    table.add_row("full precision", "full precision", *[right(full())] * len(RESIDUALS))
    for key, value in track(list(itertools.product(AXES, AXES)), console=Console(stderr=True)):
        rounded = functools.partial(Rounded, key_axis=AXES[key], value_axis=AXES[value], bits=bits)
        table.add_row(key, value, *(right(rounded(residual_length=residual)) for residual in RESIDUALS))
    print_table(Console(), table)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    run(app)
