"""Perplexity of a real text under a real model, against transformers'."""

import math

import numpy as np
import pytest
from rich.progress import Progress

import kivi_jax as kj
from kivi_jax.eval import perplexity
from kivi_jax.generation.loading import load_tokenizer
from tests.models import stories

TEXTS = {"tinystories": "tinystories/tinystories_valid_30k.txt", "wikitext2": "wikitext2/wiki.test.raw"}
LENGTH, WINDOWS = 192, 6


def test_full_equals_transformers_and_four_bits_are_close(torch, shared, tmp_path):
    """One test, so that both texts share compiled programs."""
    from transformers import LlamaForCausalLM

    directory = shared / "models" / "stories260K"
    tokenizer = load_tokenizer(directory)
    for text, file in TEXTS.items():
        words = (shared / "data" / file).read_text("utf-8")[: 12 * LENGTH * WINDOWS]
        windows = perplexity.read_windows(tokenizer, words, LENGTH)[:WINDOWS]
        assert all(len(tokens) == LENGTH and context == [1] for _, context, tokens in windows)
        rows = torch.tensor([context + tokens for _, context, tokens in windows])
        with torch.no_grad():
            logits = LlamaForCausalLM.from_pretrained(directory).eval()(rows).logits
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        values = {}
        for name, cache in {"full": kj.full(), "kivi4": kj.kivi(4, 8, 32)}.items():
            with Progress(disable=True) as progress:
                records = perplexity.score_windows(
                    stories(shared),
                    windows,
                    cache=cache,
                    path=tmp_path / text / f"{name}.jsonl",
                    settings={},
                    batch_size=WINDOWS,
                    progress=progress,
                )
            values[name] = perplexity.perplexity(records).mean
        assert values["full"] == pytest.approx(math.exp(nll), rel=1e-3)
        assert values["kivi4"] == pytest.approx(values["full"], rel=0.02)


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text():
    def bare(text):
        return {"input_ids": [5, 6, 7, 8, 9] if text else []}

    assert perplexity.read_windows(bare, "text", 2) == [("0", [5], [6]), ("1", [7], [8])]
    with pytest.raises(ValueError, match="the text has 5 tokens"):
        perplexity.read_windows(bare, "text", 6)


def test_positions_are_averaged_over_windows():
    records = [{"nll": [0.0, 1.0, 2.0, 3.0]}, {"nll": [2.0, 1.0, 0.0, 1.0]}]
    where, value = perplexity.by_position(records, points=2)
    np.testing.assert_allclose(where, [0.5, 2.5])
    np.testing.assert_allclose(value, [math.e, math.exp(1.5)])
    assert perplexity.relative_change(records, records) == pytest.approx((0, 0, 0))
    assert perplexity.perplexity([{"nll": [1e30]}]).mean == math.inf
