"""What commands say beside an answer: what they read, that a model wants a chat, why a text ended."""

import functools
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from kivi_jax.generation.templates import Prompt
    from kivi_jax.generation.tokens import Tokenizer

FIRST_TOKEN = "ended at its first token"


def as_prompt(
    tokenizer: "Tokenizer", text: str, *, chat: bool, system: str | None, begins: bool = True
) -> "Prompt":
    """A text, or with `chat` or a `system` message a conversation of one turn.

    Plain text that `begins` a row of a model that has a chat template gets a hint, once.
    """
    from kivi_jax.generation.templates import has_template, user_turn

    if chat or system is not None:
        return user_turn(text, system)
    if begins and has_template(tokenizer):
        say_once("hint: plain text for a model that has a chat template; --chat makes it a message")
    return text


def reading(what: str) -> Progress:
    """While a `with` block lasts: what is read, and for how long already, where stderr is a terminal.

    Not which share of it: JAX has the programs of all layers, and all parts of a chat's message, before the
    first of them is computed.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar.add_task(f"reading {what}", total=None)
    return bar


def say(note: str) -> None:
    """One dim line on stderr, whatever its characters mean to rich."""
    Console(stderr=True, soft_wrap=True).print(note, style="dim", highlight=False, markup=False)


say_once = functools.cache(say)
