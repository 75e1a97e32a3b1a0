"""The conversion command, shared by `python -m convert` and `kivi-jax convert`."""

from pathlib import Path as FilePath
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kivi_jax.options import Dtype


def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or hub name, or a GGUF file.")],
    destination: Annotated[FilePath, typer.Argument(help="Directory to write; complete or absent.")],
    dtype: Annotated[Dtype, typer.Option(help="What to store parameters as.")] = Dtype.bfloat16,
    verify: Annotated[bool, typer.Option(help="Compare logits with the source on a few prompts.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at the destination.")] = False,
) -> None:
    """Convert a Hugging Face checkpoint or GGUF file to an orbax one with config and tokenizer beside it.

    Example:  kivi-jax convert ./Llama-3.1-8B ./llama-8b --dtype bfloat16 --verify
    """
    # Orbax takes seconds to import: `--help` must not wait for it.
    from convert import load_model, read_any_config
    from convert.errors import CheckpointError
    from convert.files import replacing, writing
    from convert.hf import parameter_bytes
    from convert.hub import resolve
    from convert.orbax import MANIFEST, copy_beside, is_converted, write
    from convert.verify import verify as compare

    console = Console(stderr=True)
    directory = resolve(source)
    if is_converted(directory):
        raise CheckpointError(f"{source} is converted already: use it as it is")
    needed = parameter_bytes(read_any_config(directory), dtype.value)
    with replacing(
        destination, manifest=MANIFEST, overwrite=overwrite, sources=[directory], needed=needed
    ) as partial:
        with writing(destination):
            copy_beside(directory, partial)  # first: a tokenizer that cannot be built ends it before the wait
        columns = (
            TextColumn("[bold]reading tensors"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("reading", total=None)
            model, _ = load_model(
                directory,
                dtype=dtype.value,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        with console.status("writing"), writing(destination):
            write(model, partial)
        if verify:
            with console.status("comparing logits with the source"):
                del model  # the comparison holds two of its own
                found = compare(partial, directory)
            console.print(
                f"logits against {found.reference}: relative difference {found.relative:.1e}, "
                f"largest {found.largest:.1e}, same top token at {found.top_agreement:.1%} of positions"
            )
            if not found.passed:
                raise CheckpointError("the converted model does not compute what its source does")
    console.print(f"wrote {destination}", markup=False, highlight=False, soft_wrap=True)
