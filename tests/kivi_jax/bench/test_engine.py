"""`kivi-jax bench engine` and `serving`: requests as they are said to be, equal tokens, tables."""

import numpy as np
import pytest
from rich.console import Console

from kivi_jax import full
from kivi_jax.bench import engine, serving
from tests import models


def test_requests_are_of_mixed_lengths():
    asked = engine.draw_requests(61, requests=2000, prompt=32, shortest=16, longest=512)
    new, prompts = np.array([(r.max_new_tokens, len(r.tokens)) for r in asked]).T
    assert (new.min(), new.max()) >= (16, 500)
    assert new.max() <= 512
    assert (prompts.min(), prompts.max()) == (1, 32)
    below = [(new <= limit).mean() for limit in (32, 64, 128, 256)]  # as many in each octave
    np.testing.assert_allclose(below, [0.2, 0.4, 0.6, 0.8], atol=0.05)


@pytest.mark.slow
def test_both_ways_answer_alike():
    model = models.random_llama(models.config())
    numbers = dict(slots=2, requests=4, prompt=16, shortest=3, longest=3, rounds=1)
    [result] = engine.run(model, {"full": full()}, **numbers)
    assert (result.same, result.new_tokens) == (4, 12)
    console = Console(record=True, width=200)
    console.print(engine.table([result], title="here", caption="now"))
    assert "4 of 4" in console.export_text()


@pytest.mark.slow
def test_requests_are_counted_while_others_wait():
    model, caches = models.random_llama(models.config()), {"full": full(), "half": full()}
    numbers = dict(prompt=24, shared=20, shortest=2, longest=3, chunk_tokens=16, seconds=0.2)
    results = list(serving.saturate(model, caches, memory_bytes=1 << 18, **numbers))
    for result in results:
        assert result.stats.slots > 1
        assert result.requests > 0
        assert 2 * result.requests <= result.new_tokens + 2 * result.stats.slots
        assert result.stats.queued + result.stats.running > 0
        assert result.stats.prefix_hits > 0
    console = Console(record=True, width=200)
    console.print(serving.saturated_table(results, title="here", caption="now"))
    assert "vs full" in console.export_text()


@pytest.mark.slow
def test_a_row_waits_while_a_prompt_is_read():
    model = models.random_llama(models.config())
    [result] = serving.waits(model, {"full": full()}, prompt=96, chunk_tokens=32)
    assert len(result.reading_s) >= 3  # a token for each chunk
    assert result.alone_s > 0
    console = Console(record=True, width=200)
    console.print(serving.waits_table([result], title="here", caption="now"))
    assert "full" in console.export_text()
