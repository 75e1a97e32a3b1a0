"""`kivi-jax bench engine`: requests as they are said to be, the same tokens both ways, and a table of it."""

import numpy as np
import pytest
from rich.console import Console

from kivi_jax import full
from kivi_jax.bench import engine
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
