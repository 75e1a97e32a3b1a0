"""`kivi-jax`: the commands. Each imports what it needs when it runs, to start fast."""

from typing import Annotated

import typer

import kivi_jax
from convert.command import convert
from kivi_jax.bench.command import bench
from kivi_jax.bench.serving_command import engine, serving
from kivi_jax.commands.cache import cache_files
from kivi_jax.commands.chat import chat
from kivi_jax.commands.generate import generate
from kivi_jax.commands.inspect import inspect
from kivi_jax.commands.serve import batch, serve
from kivi_jax.demo.command import demo, evaluation
from kivi_jax.eval.choosing import choosing
from kivi_jax.eval.command import evaluate

HELP = """2-bit KV caches (KIVI) and token selection (SCOPE) for Llama-like models in JAX.

Try it:  kivi-jax demo

Plan memory:  kivi-jax inspect llama-8b --context 131072 --memory 80GB

Talk:  kivi-jax chat ./llama-8b-instruct --cache kivi42r

Serve:  kivi-jax serve ./llama-8b-instruct --slots 16

Read once, ask often:  kivi-jax cache save ./llama-8b novel.txt novel.prefix

A model is a directory, a hub name, or demo: the small one in this package.

A cache is a name, and fields after colons:
full keeps every token as it is;
kivi2:group_size=64:residual_length=64 packs in 2 bits, kivi4 in 4; kivi2r and kivi4r also turn keys;
kivi42r, the default, has keys of 4 bits and values of 2;
scope:window=512:recent=256 bounds what is generated;
kivi2+scope:prompt=snapkv:prompt_budget=2048 also selects from the prompt.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def print_version(asked: bool) -> bool:
    """Answer `--version`, before a command is missed."""
    if asked:
        typer.echo(kivi_jax.__version__)
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What comes before a command."""


# In the order of a first hour; groups are listed after commands.
for command in (demo, generate, chat, serve, batch, inspect, convert):
    app.command()(command)
evaluate.add_typer(evaluation)
evaluate.add_typer(choosing)
for measured in (engine, serving):
    bench.command()(measured)
for name, group in {"cache": cache_files, "eval": evaluate, "bench": bench}.items():
    app.add_typer(group, name=name)
