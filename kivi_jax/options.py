"""Arguments that several commands share."""

from enum import StrEnum
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Of parameters and full-precision tokens."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[
    str,
    typer.Argument(help="A checkpoint's directory, a hub name, or demo: the small model in this package."),
]
DEFAULT_CACHE = "kivi42r"  # docs/how-to/choose-a-cache.md says what it costs
_CACHE_HELP = "full, kivi42r, kivi4, kivi2, scope or kivi2+scope; kivi-jax --help shows their fields."
CacheOption = Annotated[str, typer.Option(help=_CACHE_HELP)]
CacheOrPrefixOption = Annotated[
    str | None, typer.Option(help=f"{_CACHE_HELP} By default {DEFAULT_CACHE}, or what the prefix is held in.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="By default float32 on a CPU, else bfloat16.")]
MeshOption = Annotated[str | None, typer.Option(help="Devices to use, as in data=2,model=4; by default one.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopPOption = Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")]
MinPOption = Annotated[float, typer.Option(help="Keep tokens this likely relative to the best.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 makes seen tokens less likely.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of random sampling.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Put the text into the tokenizer's chat template.")]
SystemOption = Annotated[
    str | None, typer.Option(help="What the system says before, in the tokenizer's chat template.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
