"""What may be asked of an engine at all."""

import pytest

from kivi_jax.generation.requests import Request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tokens=[]), "has no tokens"),
        (dict(max_new_tokens=-1), "must not be negative; 0 only reads"),
        (dict(temperature=-1.0), "temperature=-1.0 must be positive"),
        (dict(frequency_penalty=float("nan")), "frequency_penalty=nan must be finite"),
        (dict(logit_bias={1: float("inf")}), "logit_bias=inf must be finite"),
        (dict(log_probs=21), "must be from 0 to 20"),
        (dict(stop_ids=range(17)), "17 stop_ids are more than 16"),
        (dict(stop=[""]), "at least one character"),
    ],
)
def test_requests_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**(dict(tokens=[1], max_new_tokens=1) | fields))
