"""Tasks that a KV cache must not break, as pure functions of a seed. Read `tokenizer.py` next.

    passkey     a five-digit key hidden in filler, asked for at the end
    recall      a list of word-number pairs, then many words to recall the numbers of
    questions   numbered arithmetic questions, all answered in order: a long output
    copying     a list of words, repeated
    numbers     a list of five-digit numbers, then filler, then the list again: many passkeys at once

`python -m kivi_jax.demo.train` trains on seeds from `TRAINING_SEEDS` up; seeds below it are held out.
Source: passkey after the KIVI paper's prompt (arXiv 2402.02750); questions after LongGenBench
(arXiv 2410.04199), made small.
"""

import re
from dataclasses import dataclass

import numpy as np

TRAINING_SEEDS = 1_000_000

# A piece of text that becomes one token, with the space before it: a word; a line's number and its colon;
# one or two digits and the sign before them; any other character.
PIECE = r" ?[A-Za-z]+|[0-9]{1,2}:| ?[-+*=]?[0-9]{1,2}| ?[^A-Za-z0-9\s]|\s"

SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "The sea is deep.",
    "The night is dark.",
    "The road is long.",
    "Rain falls on the hills.",
    "Birds sing in the trees.",
    "We walk to the river.",
    "They sleep under the stars.",
)

WORDS = (  # noqa: SIM905 (a list would have a line per word)
    "acorn anchor apple arrow autumn badge bamboo banana barrel basket beacon bell berry bird blanket boat "
    "bottle branch bread bridge brush bucket butter button cabin cactus camel candle canoe carpet carrot "
    "castle cedar cherry circle clock cloud clover coal coin comet copper coral cotton crane crown crystal "
    "daisy desert diamond dolphin door dragon dream drum eagle earth ember engine falcon feather fence fern "
    "field flame flute forest fossil fountain fox garden garlic ginger glacier glass globe glove gold grape "
    "hammer harbor hazel helmet honey horn horse island ivory jacket jungle kettle kite ladder lake lamp "
    "lantern laurel leaf lemon lily lion magnet maple marble meadow melon mirror moon moss mountain needle "
    "ocean olive onion orange orchid otter owl paint panda paper pearl pebble pepper piano pine planet plum"
).split()


@dataclass(frozen=True)
class Problem:
    """A prompt and the text that must follow it: items that `separator` stands between."""

    prompt: str
    answer: str
    separator: str = " "

    def score(self, output: str) -> float:
        """The fraction of the answer's items that `output` has at their places, in [0, 1].

        What `output` has beyond the answer's length does not matter: most models go on.
        """
        answer, output = self.answer.lstrip(), output.lstrip()
        expected, given = (
            text.strip(" .\n").split(self.separator) for text in (answer, output[: len(answer)])
        )
        return sum(a == b for a, b in zip(expected, given, strict=False)) / len(expected)


def count_tokens(text: str) -> int:
    """The tokens of a task's text, the beginning-of-text token left out."""
    return len(re.findall(PIECE, text))


def passkey(seed: int, tokens: int = 1024) -> Problem:
    """A key hidden at a random place in filler; prompt and answer together fill at most `tokens`.

    Raises:
        ValueError: `tokens` has no room for the question.
    """
    rng = np.random.default_rng(seed)
    key = rng.integers(10_000, 100_000)
    before = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n"
    )
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
    question = "\nWhat is the pass key? The pass key is"
    answer = f" {key}."
    room = tokens - 2 - count_tokens(before + hidden + question + answer)  # 2: begin and end
    if room < 0:
        raise ValueError(f"{tokens=} must be at least {tokens - room}")
    filler = _filler(rng, room)
    filler.insert(rng.integers(len(filler) + 1), hidden)
    return Problem(before + " ".join(filler) + question, answer)


def recall(seed: int, pairs: int = 32) -> Problem:
    """Distinct words with a number each, then all the words in another order.

    Raises:
        ValueError: `pairs` is not in [1, len(WORDS)].
    """
    rng = np.random.default_rng(seed)
    words = _distinct_words(rng, pairs)
    listed = [f"{word} {number}" for word, number in zip(words, rng.integers(100, size=pairs), strict=True)]
    order = rng.permutation(pairs)
    asked = ", ".join(words[i] for i in order)
    answers = ", ".join(listed[i] for i in order)
    return Problem(f"Pairs: {', '.join(listed)}.\nRecall: {asked}.\nAnswers:", f" {answers}.", ", ")


def questions(seed: int, count: int = 30, first: int = 1) -> Problem:
    """Sums, differences and products of two digits; each answer line repeats its question.

    Questions are numbered from `first`.

    Raises:
        ValueError: there is no question, or a number is not in [1, 99].
    """
    if count < 1 or first < 1 or first + count > 100:
        raise ValueError(f"question numbers must be in [1, 99], got {count=} from {first=}")
    rng = np.random.default_rng(seed)
    lines = [(first + i, *_arithmetic(rng)) for i in range(count)]
    asked = "".join(f"Q{number}: {question}\n" for number, question, _ in lines)
    answers = "".join(f"A{number}: {question}={result}\n" for number, question, result in lines)
    return Problem(f"Answer all the questions in order.\n{asked}Answers:\n", answers, "\n")


def copying(seed: int, words: int = 32) -> Problem:
    """Distinct words to repeat in order.

    Raises:
        ValueError: `words` is not in [1, len(WORDS)].
    """
    text = " ".join(_distinct_words(np.random.default_rng(seed), words))
    return Problem(f"Copy: {text}.\nCopied:", f" {text}.")


def numbers(seed: int, count: int = 16, tokens: int = 512) -> Problem:
    """Five-digit numbers to repeat in order, after filler; all together fill at most `tokens`.

    Raises:
        ValueError: `count` is not positive, or `tokens` has no room for so many.
    """
    rng = np.random.default_rng(seed)
    text = " ".join(str(number) for number in rng.integers(10_000, 100_000, size=max(count, 0)))
    before, after, answer = f"Copy: {text}.\n", "\nCopied:", f" {text}."
    room = tokens - 2 - count_tokens(before + after + answer)
    if count < 1 or room < 0:
        raise ValueError(f"{count=} must be positive, and {tokens=} at least {tokens - room}")
    return Problem(before + " ".join(_filler(rng, room)) + after, answer)


def _filler(rng: np.random.Generator, tokens: int) -> list[str]:
    """Random sentences of at most `tokens` tokens in all."""
    chosen: list[str] = []
    for i in rng.integers(len(SENTENCES), size=tokens):
        tokens -= count_tokens(SENTENCES[i])
        if tokens < 0:
            break
        chosen.append(SENTENCES[i])
    return chosen


def _distinct_words(rng: np.random.Generator, count: int) -> list[str]:
    if not 1 <= count <= len(WORDS):
        raise ValueError(f"the number of words must be in [1, {len(WORDS)}], got {count}")
    return [str(word) for word in rng.choice(WORDS, count, replace=False)]


def _arithmetic(rng: np.random.Generator) -> tuple[str, int]:
    """A question such as "7-2", and its result, which is never negative."""
    smaller, larger = sorted(int(digit) for digit in rng.integers(10, size=2))
    match rng.integers(3):
        case 0:
            return f"{smaller}+{larger}", smaller + larger
        case 1:
            return f"{larger}-{smaller}", larger - smaller
        case _:
            return f"{smaller}*{larger}", smaller * larger
