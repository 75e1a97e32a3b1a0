"""Predictions are what stands after the prompt in the text of both."""

import pytest
from rich.progress import Progress

import kivi_jax as kj
from kivi_jax.eval import generating
from kivi_jax.eval.samples import Sample
from kivi_jax.generation.tokens import encode_after
from tests.models import config, random_llama
from tests.tokenizers import VOCAB, build


@pytest.mark.parametrize("kind", ["spaced", "bytes"])
@pytest.mark.parametrize("said", [" hello there", "hello there"])
def test_a_prediction_keeps_its_first_space(tmp_path, monkeypatch, kind, said):
    tokenizer = build(kind)

    def continued(model, prompts, **options):
        return [encode_after(tokenizer, ids, said) for ids in prompts]

    monkeypatch.setattr(generating, "continue_prompts", continued)
    sample = Sample(id="a", task="t", prompt="what is it", answers=["x"], max_new_tokens=3, stop=("there",))
    with Progress(disable=True) as progress:
        (record,) = generating.predict(
            random_llama(config(vocab_size=VOCAB, num_layers=1)),
            tokenizer,
            [sample],
            cache=kj.full(),
            path=tmp_path / "full.jsonl",
            settings={"eval": "t"},
            batch_size=8,
            max_length=None,
            chat=False,
            progress=progress,
        )
    assert record["prediction"] == said.removesuffix("there")
