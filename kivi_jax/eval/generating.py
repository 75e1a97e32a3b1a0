"""Samples to predictions: greedy, many at a time, resumed where a file already holds some.

A batch waits for its longest row, and cannot see that a string has ended one; an engine's rows end by
themselves, but it reads prompts one by one. So samples with stop strings go through an engine.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from kivi_jax.cache.segments import round_up
from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.eval.jobs import Record, finish, in_batches
from kivi_jax.eval.samples import Sample
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.generate import generate
from kivi_jax.generation.requests import Request
from kivi_jax.generation.stops import find_stop
from kivi_jax.generation.templates import user_turn, write
from kivi_jax.generation.text import decode_after, text_before
from kivi_jax.generation.tokens import encode_as_is, pad_prompts, padded_width
from kivi_jax.mesh import ROWS, parts_of
from kivi_jax.model.llama import Llama

Encoded = tuple[Sample, list[int]]
FIELDS = ("task", "prediction", "answers")  # of every record
_FILLS = 4  # times an engine's slots are filled before records are written


def predict(
    model: Llama,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    cache: CacheStrategy,
    path: Path,
    settings: Record,
    batch_size: int,
    max_length: int | None,
    chat: bool,
    progress: Progress,
) -> list[Record]:
    """A record per sample, in `path` and returned.

    Samples of one padded width and as many new tokens share a compiled program and are computed together; a
    batch that is not full is padded with rows that are thrown away, so a prediction does not depend on where
    an earlier run was cut off. Those that a string ends share an engine's slots.

    Args:
        model: the model.
        tokenizer: a Hugging Face tokenizer, or one like it.
        samples: what to ask.
        cache: how keys and values are held.
        path: the file of records, see `jobs.finish`.
        settings: what the records depend on.
        batch_size: rows computed together.
        max_length: tokens to which prompts that may be truncated are cut; None: they are not.
        chat: put prompts into the tokenizer's chat template where samples allow it.
        progress: shows how far it is.

    Raises:
        ValueError: the tokenizer has no chat template but one is asked for; or see `jobs.finish`.
    """
    encoded = [(sample, encode(tokenizer, sample, max_length=max_length, chat=chat)) for sample in samples]
    free, stopped = ([item for item in encoded if bool(item[0].stop) == stops] for stops in (False, True))
    counts = Counter(map(_program, free))

    def in_a_batch(batch: Sequence[Encoded]) -> list[list[int]]:
        return continue_prompts(
            model,
            [ids for _, ids in batch],
            cache=cache,
            max_new_tokens=batch[0][0].max_new_tokens,
            rows=min(batch_size, counts[_program(batch[0])]),
        )

    @functools.cache
    def engine() -> Engine:  # and not before it is needed: it compiles
        slots = round_up(batch_size, parts_of(model.mesh, ROWS))
        context = max(len(ids) + sample.max_new_tokens for sample, ids in stopped)
        return stack.enter_context(Engine(model, tokenizer, cache=cache, slots=slots, context=context))

    def compute(batch: Sequence[Encoded]) -> list[Record]:
        rows = in_slots(engine(), batch) if batch[0][0].stop else in_a_batch(batch)
        texts = [
            decode_after(tokenizer, text_before(ids, None), new)
            for (_, ids), new in zip(batch, rows, strict=True)
        ]
        return [
            record(sample, len(ids), new, cut(text, sample.stop))
            for (sample, ids), new, text in zip(batch, rows, texts, strict=True)
        ]

    batches = in_batches(free, batch_size, key=_program)
    batches += in_batches(stopped, _FILLS * batch_size)
    with contextlib.ExitStack() as stack:
        return finish(
            path,
            settings,
            batches,
            compute,
            identify=lambda item: item[0].id,
            progress=progress,
            fields=FIELDS,
        )


def in_slots(engine: Engine, batch: Sequence[Encoded]) -> list[list[int]]:
    """The new tokens of every sample, greedy, up to those that complete a stop string."""
    answers = engine.complete(
        Request(
            tokens=ids,
            max_new_tokens=sample.max_new_tokens,
            stop=sample.stop,
            stop_ids=engine.model.config.eos_ids,  # `generate`'s
        )
        for sample, ids in batch
    )
    return [list(answer.tokens) for answer in answers]


def encode(tokenizer: Any, sample: Sample, *, max_length: int | None, chat: bool) -> list[int]:
    """The prompt's token ids, its middle left out if it is too long and may be truncated.

    As in LongBench, the halves that are kept are turned into text again before the chat template.

    Raises:
        ValueError: the tokenizer has no chat template but one is asked for.
    """
    prompt = sample.prompt
    ids = tokenizer(prompt)["input_ids"]
    if sample.truncate and max_length is not None and len(ids) > max_length:
        head, tail = ids[: max_length // 2], ids[len(ids) - max_length // 2 :]
        prompt = "".join(tokenizer.decode(half, skip_special_tokens=True) for half in (head, tail))
        ids = tokenizer(prompt)["input_ids"]
    if not (chat and sample.chat):
        return ids
    asked = prompt.removesuffix(sample.answer_prefix)
    return encode_as_is(tokenizer, write(tokenizer, user_turn(asked)) + sample.answer_prefix)


def continue_prompts(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    cache: CacheStrategy,
    max_new_tokens: int,
    rows: int,
) -> list[list[int]]:
    """The new tokens of every prompt, greedy; computed as a batch of `rows` rows."""
    padded = [*prompts, *[prompts[0]] * (rows - len(prompts))]
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts(padded))
    out = generate(model, tokens, lengths, cache=cache, max_new_tokens=max_new_tokens)
    new, count = np.asarray(out.tokens), np.asarray(out.lengths)
    return [row[:n].tolist() for row, n in zip(new, count, strict=True)][: len(prompts)]


def _program(item: Encoded) -> tuple[int, int]:
    """What samples must have in common to be computed together."""
    sample, ids = item
    return padded_width(len(ids)), sample.max_new_tokens


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the stop string that is complete first."""
    return text[: find_stop(text, stop)]


def record(sample: Sample, prompt_tokens: int, new: Sequence[int], prediction: str) -> Record:
    """What is kept of one prediction: enough to score it again without the data."""
    return {
        "task": sample.task,
        "prediction": prediction,
        "answers": sample.answers,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new),
        **sample.info,
    }
