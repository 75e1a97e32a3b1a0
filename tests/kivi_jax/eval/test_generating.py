"""Predictions are what stands after the prompt in the text of both."""

import pytest
from rich.progress import Progress

import kivi_jax as kj
from kivi_jax.eval import generating
from kivi_jax.eval.samples import Sample
from kivi_jax.generation.stops import find_stop
from kivi_jax.generation.text import decode_after, text_before
from kivi_jax.generation.tokens import encode_after
from tests.models import config, random_llama
from tests.tokenizers import VOCAB, build

MODEL = random_llama(config(vocab_size=VOCAB, num_layers=1))


@pytest.mark.parametrize("kind", ["spaced", "bytes"])
@pytest.mark.parametrize("said", [" hello there", "hello there"])
def test_a_prediction_keeps_its_first_space(tmp_path, monkeypatch, kind, said):
    tokenizer = build(kind)

    def continued(model, prompts, **options):
        return [encode_after(tokenizer, ids, said) for ids in prompts]

    monkeypatch.setattr(generating, "continue_prompts", continued)
    sample = Sample(id="a", task="t", prompt="what is it", answers=["x"], max_new_tokens=3)
    (record,) = predict(tokenizer, [sample], tmp_path)
    assert record["prediction"] == said


def predict(tokenizer, samples, folder):
    with Progress(disable=True) as progress:
        return generating.predict(
            MODEL,
            tokenizer,
            samples,
            cache=kj.full(),
            path=folder / "full.jsonl",
            settings={"eval": "t"},
            batch_size=2,
            max_length=None,
            chat=False,
            progress=progress,
        )


@pytest.mark.parametrize("kind", ["spaced", "bytes"])
def test_a_string_ends_a_prediction_where_it_stands(tmp_path, monkeypatch, kind):
    """An engine's answers are `generate`'s up to there, of fewer tokens; a run that was cut goes on."""
    tokenizer, prompts = build(kind), ["what is it", "hello there", "there it is", "is it there", "what"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    new = generating.continue_prompts(MODEL, ids, cache=kj.full(), max_new_tokens=12, rows=len(ids))
    texts = [
        decode_after(tokenizer, text_before(one, None), tokens) for one, tokens in zip(ids, new, strict=True)
    ]
    stop = (texts[0][4:7], texts[1][3:5])
    expected = [text[: find_stop(text, stop)] for text in texts]
    assert len(expected[0]) < len(texts[0])
    samples = [
        Sample(id=prompt, task="t", prompt=prompt, answers=["x"], max_new_tokens=12, stop=stop)
        for prompt in prompts
    ]
    records = predict(tokenizer, samples, tmp_path)
    assert [record["prediction"] for record in records] == expected
    assert sum(record["new_tokens"] for record in records) < sum(map(len, new))
    path = tmp_path / "full.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert predict(tokenizer, samples, tmp_path) == records
    monkeypatch.setattr(generating, "Engine", None)  # nothing is left to do: nothing is compiled
    assert predict(tokenizer, samples, tmp_path) == records
