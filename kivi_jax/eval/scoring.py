"""LongBench's metrics: pure functions of a prediction and a reference answer, from 0 to 1.

Definitions are those of the benchmark's public evaluation (arXiv 2308.14508, appendix); where its code
differs from what it means, the docstring says so.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def answer_f1(prediction: str, answer: str) -> float:
    """F1 of the words that prediction and answer have in common, counted with multiplicity."""
    predicted, expected = words(prediction), words(answer)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F1 on summary level: sentences end at a full stop; every word counts once.

    For each sentence of the answer, the union of its longest common subsequences with the prediction's
    sentences; precision and recall are in distinct words. Case and punctuation matter.
    """
    predicted, expected = _sentences(prediction), _sentences(answer)
    common: set[str] = set()
    for reference in expected:
        for sentence in predicted:
            common |= set(longest_common_subsequence(reference, sentence))
    if not common:
        return 0.0
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in expected for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; a sentence of blanks is one empty word, as in the package that LongBench uses."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Of several longest ones, the one found from the end by leaving out `second`'s words first."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    found: list[str] = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(first[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / (number of classes named) if the right one is among them, else 0.

    A class whose name is part of the right one's does not count as named. (The original removes such
    names from a list while it walks over it, and may skip one.)
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """The share of the prediction's numbers that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """`count`, for an answer that is a paragraph's name: "Paragraph 7".

    Raises:
        ValueError: the answer has no number.
    """
    if not (number := re.search(r"\d+", answer)):
        raise ValueError(f"the answer {answer!r} names no paragraph by its number: leave the row out")
    return count(prediction, number[0])


def code_similarity(prediction: str, answer: str) -> float:
    """Edit similarity, in whole percents, of the answer and the first line that is no comment or fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def all_found(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that stand in the prediction, case ignored; RULER's metric."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)
