"""Arguments that several commands share, and what they become."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from convert.command import Dtype

if TYPE_CHECKING:
    from kivi_jax.llama import Llama
    from kivi_jax.sampling import Sampler
    from kivi_jax.text import Tokenizer

ModelArgument = Annotated[
    str,
    typer.Argument(help="A checkpoint's directory, a hub name, or random: a small model of no use."),
]
_CACHE_HELP = "full, kivi4, kivi2, scope or kivi2+scope; kivi-jax --help shows their fields."
CacheOption = Annotated[str, typer.Option(help=_CACHE_HELP)]
CacheOrPrefixOption = Annotated[
    str | None, typer.Option(help=f"{_CACHE_HELP} By default kivi2, or what the prefix is held in.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="By default float32 on a CPU, else bfloat16.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopPOption = Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")]
MinPOption = Annotated[float, typer.Option(help="Keep tokens this likely relative to the best.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 makes seen tokens less likely.")]
SeedOption = Annotated[int, typer.Option(help="Of random sampling.")]


def open_model(name: str, dtype: Dtype | None) -> "tuple[Llama, Tokenizer]":
    """The model that a command line names, and its tokenizer.

    Raises:
        ValueError: it cannot be loaded, or has no tokenizer.
    """
    from kivi_jax.loading import load
    from kivi_jax.random_model import random_model

    with Console(stderr=True).status("loading"):
        if name == "random":
            return random_model()
        model, tokenizer = load(name, dtype=None if dtype is None else dtype.value)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer files: copy the tokenizer's files there")
    return model, tokenizer


def make_sampler(
    temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float
) -> "Sampler":
    """`Greedy` at temperature 0, else `Sample`.

    Raises:
        ValueError: a number is out of its range.
    """
    from kivi_jax.sampling import Greedy, Sample

    if temperature == 0:
        return Greedy(repetition_penalty=repetition_penalty)
    return Sample(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
