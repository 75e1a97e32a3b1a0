"""A needle in a haystack: a pass key hidden at every depth of prompts of every length.

The haystack is a text of the user's (a book), or sentences made here. KIVI's recorded pass-key prompts can be
read, too.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kivi_jax.eval.samples import Sample

ANSWER = " The pass key is"  # how the answer begins
QUESTION = f"What is the pass key?{ANSWER}"
_SUBJECTS = ("The baker", "A traveller", "Our neighbour", "The old sailor", "Her brother", "The teacher")
_VERBS = ("walked past", "remembered", "painted", "talked about", "waited near", "looked for")
_OBJECTS = ("the harbour", "a quiet garden", "the market", "the railway station", "a wooden bridge")


def build_samples(
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: int,
    repeats: int,
    haystack: str | None,
    max_new_tokens: int,
) -> list[Sample]:
    """Prompts of about `lengths` tokens (not more), with the key at `depths` even steps from start to end.

    Args:
        tokenizer: counts tokens.
        lengths: tokens of a prompt, the question included.
        depths: how many places, the first sentence (0) and the last (1) included.
        repeats: prompts per length and depth, each with another key and other text.
        haystack: the text to hide keys in; by default made up.
        max_new_tokens: the most tokens of an answer.

    Raises:
        ValueError: a length has no room for the key and the question, the text is too short for it, or
            a number is not positive.
    """
    if depths < 1 or repeats < 1:
        raise ValueError(f"{depths=} and {repeats=} must be positive")
    samples: list[Sample] = []
    for length, step, repeat in itertools.product(lengths, range(depths), range(repeats)):
        depth = step / (depths - 1) if depths > 1 else 0.5
        rng = random.Random(f"{length} {step} {repeat}")
        key = str(rng.randrange(10_000, 100_000))
        needle = f"The pass key is {key}. Remember it: {key} is the pass key."
        room = length - len(tokenizer(f"{needle} {QUESTION}")["input_ids"])
        hay = take_tokens(tokenizer, sentences(haystack, rng), room)
        hay.insert(round(depth * len(hay)), needle)
        samples.append(
            Sample(
                id=f"{length}-{step}-{repeat}",
                task=f"{length} tokens",
                prompt=f"{' '.join(hay)} {QUESTION}",
                answers=[key],
                max_new_tokens=max_new_tokens,
                answer_prefix=ANSWER,
                info={"length": length, "depth": depth},
            )
        )
    return samples


def sentences(haystack: str | None, rng: random.Random) -> Iterator[str]:
    """Sentences of the haystack from a random one on, or without end, made up.

    Raises:
        ValueError: the haystack has no sentence.
    """
    if haystack is None:
        while True:
            yield f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}."
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s", haystack) if part.strip()]
    if not found:
        raise ValueError("the haystack has no sentences: pass --data a text file")
    begin = rng.randrange(len(found))
    yield from itertools.chain(found[begin:], found[:begin])


def take_tokens(tokenizer: Any, source: Iterator[str], room: int) -> list[str]:
    """The first sentences that have no more than `room` tokens together.

    Raises:
        ValueError: not even one sentence fits, or there are not enough of them.
    """
    taken: list[str] = []
    extra = len(tokenizer("")["input_ids"])
    for sentence in source:
        room -= len(tokenizer(f" {sentence}")["input_ids"]) - extra
        if room < 0:
            break
        taken.append(sentence)
    else:
        raise ValueError(f"the haystack is {room} tokens shorter than the longest prompt: pass another text")
    if not taken:
        raise ValueError("no text fits beside the key and the question: pass a longer --length")
    return taken


def read_samples(tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, max_new_tokens: int) -> list[Sample]:
    """Samples of recorded prompts: rows with `input` and `target`, as KIVI's pass-key examples."""
    samples: list[Sample] = []
    for index, row in enumerate(rows):
        prompt = f"{row['input']}{QUESTION} "
        length = len(tokenizer(prompt)["input_ids"])
        place = row["input"].find(str(row["target"]))
        samples.append(
            Sample(
                id=str(index),
                task="recorded",
                prompt=prompt,
                answers=[str(row["target"])],
                max_new_tokens=max_new_tokens,
                answer_prefix=f"{ANSWER} ",
                info={"length": length, "depth": round(max(place, 0) / max(len(row["input"]), 1), 2)},
            )
        )
    return samples


def score(record: Mapping[str, Any]) -> float:
    """1 if the first number of the prediction is the key."""
    numbers = re.findall(r"\d+", record["prediction"])
    return float(numbers[:1] == record["answers"])
