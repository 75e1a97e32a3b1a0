"""The demo model's tokenizer: every piece of the tasks' texts is one token. Read `train.py` next.

Other text is spelled in bytes, so every string has tokens and decodes to itself.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from kivi_jax.demo import tasks

BEGIN, END, PAD = "<s>", "</s>", "<pad>"


def build() -> Tokenizer:
    """The tokenizer: special tokens, the 256 bytes, then the pieces; it puts `BEGIN` before a text."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = (byte_level.pre_tokenize_str(piece)[0][0] for piece in vocabulary())
    tokens = dict.fromkeys((PAD, BEGIN, END, *sorted(byte_level.alphabet()), *pieces))
    vocab = {token: index for index, token in enumerate(tokens)}
    # Without merges a piece that is not in the vocabulary falls apart into its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.add_special_tokens([PAD, BEGIN, END])
    split = pre_tokenizers.Split(Regex(tasks.PIECE), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocab[BEGIN])]
    )
    return tokenizer


def vocabulary() -> list[str]:
    """The pieces that tasks are made of, sorted."""
    problems = (
        tasks.passkey(0),
        tasks.recall(0, pairs=len(tasks.WORDS)),
        tasks.questions(0),
        tasks.copying(0, words=len(tasks.WORDS)),
    )
    texts = [
        *tasks.SENTENCES,
        " ".join(tasks.SENTENCES),
        *(problem.prompt + problem.answer for problem in problems),
    ]
    numbers = {f"{before}{n}" for n in range(100) for before in ("", " ", "=")}
    numbers |= {f"{n:02}" for n in range(10)} | {f"{n}:" for n in range(1, 100)}
    numbers |= {f"{sign}{n}" for sign in "+-*" for n in range(10)}
    return sorted(numbers.union(*(re.findall(tasks.PIECE, text) for text in texts)))
