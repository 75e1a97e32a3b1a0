"""`kivi-jax generate --input`: a file of prompts becomes a file of answers, resumed after a cut."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from kivi_jax.commands.hints import say
from kivi_jax.eval.jobs import Record, finish, in_batches
from kivi_jax.eval.run import progress_bar
from kivi_jax.eval.samples import read_rows
from kivi_jax.generation.text import complete_tokens, encode_prompt
from kivi_jax.generation.tokens import Tokenizer, padded_width

if TYPE_CHECKING:
    from kivi_jax.generation.generate import Decoding
    from kivi_jax.generation.templates import Prompt
    from kivi_jax.model.llama import Llama


_OPTIONS = {  # other programs read them from rows
    *("system", "stop", "max_tokens", "max_new_tokens", "seed"),
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
}


class _Question(NamedTuple):
    id: str
    number: int  # in the file
    tokens: list[int]

    @property
    def width(self) -> tuple[int]:
        """Tokens with padding: questions of one width share a compiled program."""
        return (padded_width(len(self.tokens)),)


def answer_file(
    model: "Llama",
    tokenizer: Tokenizer,
    source: FilePath,
    destination: FilePath,
    *,
    ask: Callable[[str], "Prompt"],
    system: str | None,
    settings: Record,
    stop: Sequence[str],
    rows: int,
    seed: int,
    drawing: "Decoding",
) -> None:
    """Answer every prompt of `source`, `rows` together, in `destination`.

    A line is an object with a text `prompt`, which `ask` makes a prompt, or with `messages`, before which the
    `system` speaks, and possibly an `id`; else its number is that. What is drawn for a line does not depend
    on the others, nor on `rows`.

    Raises:
        ValueError: a line has neither or both, or messages of a system besides `system`, or no tokens;
            `source` is no file or holds no line; `destination` is `source` or a directory; or see
            `complete_tokens` and `jobs.finish`.
    """
    if not source.is_file():
        raise ValueError(
            f"{source} is no file of prompts: pass one, with a JSON object a line, which is read again after "
            "a cut (standard input cannot be)"
        )
    if destination.is_dir():
        raise ValueError(f"{destination} is a directory: name a file in it for the answers")
    if destination.exists() and destination.samefile(source):
        raise ValueError(f"{destination} is the file of prompts: choose another for the answers")
    prefix = drawing.get("prefix")
    questions: list[_Question] = []
    unread: set[str] = set()
    for number, row in enumerate(read_rows(source)):
        place = f"{source}: row {number + 1}"
        row = {name: value for name, value in row.items() if value is not None}  # tables have all columns
        tokens = encode_prompt(tokenizer, _prompt(row, ask, system, place), prefix)
        if not tokens and prefix is None:
            raise ValueError(f"{place} has a prompt without tokens: write something, or leave it out")
        unread |= row.keys() & _OPTIONS
        questions.append(_Question(str(row.get("id", number)), number, tokens))
    if unread:
        say(f"hint: {', '.join(sorted(unread))} in rows of {source} has no effect: pass the options instead")
    counts = Counter(question.width for question in questions)

    def answer(batch: Sequence[_Question]) -> list[Record]:
        together = min(rows, counts[batch[0].width])
        padded = [*batch, *[batch[0]] * (together - len(batch))]
        numbers = jnp.asarray([question.number for question in padded])
        prompts, options = [question.tokens for question in padded], drawing.copy()
        options["key"] = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers)
        found = complete_tokens(model, tokenizer, prompts, stop=stop, **options)
        return [
            {
                "text": out.text,
                "finish_reason": out.finish_reason,
                "prompt_tokens": out.prompt_tokens,
                "new_tokens": len(out.tokens),
            }
            for out in found[: len(batch)]
        ]

    with progress_bar() as progress:
        records = finish(
            destination,
            settings,
            in_batches(questions, rows, key=lambda question: question.width),
            answer,
            identify=lambda question: question.id,
            progress=progress,
            fields=("text", "finish_reason"),
        )
    cut = sum(record["finish_reason"] == "length" for record in records)
    say(f"{len(records):,} answers in {destination}" + f", {cut:,} cut at --max-new-tokens" * bool(cut))


def _prompt(
    row: Mapping[str, Any], ask: Callable[[str], "Prompt"], system: str | None, place: str
) -> "Prompt":
    match row:
        case {"prompt": _, "messages": _}:
            raise ValueError(f"{place} has both a prompt and messages: keep one")
        case {"prompt": str(text)}:
            return ask(text)
        case {"messages": list(messages)}:
            if system is None:
                return messages
            if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
                raise ValueError(f"{place} has a system message: leave it out there, or leave out --system")
            return [{"role": "system", "content": system}, *messages]
        case _:
            raise ValueError(
                f"{place} has neither a text prompt nor a list of messages, but {', '.join(row)}"
            )
