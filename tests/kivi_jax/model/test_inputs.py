"""What callers hand to a model is taken in any common form, or refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from kivi_jax.checks import whole
from kivi_jax.model.inputs import read_prompts, read_token
from tests.models import config, random_llama


def prefilled(capacity=6):
    model = random_llama(config(num_layers=1))
    ids = jnp.asarray([[1, 2, 3, 4], [5, 6, 0, 0]])
    return model, *model.prefill(ids, jnp.asarray([4, 2]), cache=kj.full(), capacity=capacity)


@pytest.mark.parametrize("kind", [list, np.asarray, np.uint32, jnp.asarray])
def test_prompts_come_in_many_kinds(kind):
    if kind is list:
        tokens, lengths = read_prompts([[1, 2], [3, -7]], [2, 1], vocab_size=9)
    else:
        tokens, lengths = read_prompts(kind([[1, 2], [3, 99]]), kind([2, 1]), vocab_size=9)
    assert tokens.dtype == lengths.dtype == jnp.int32
    assert tokens[:, 0].tolist() == [1, 3]
    assert lengths.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[1, 9]], [2], "token 9 is not in the model's vocabulary, 0 to 8"),
        ([[1, -1]], [2], "token -1 is not in"),
        (np.asarray([[1, 2**40]]), [2], f"token {2**40} is not in"),
        ([[1, 2]], [0], "every length must be from 1 to 2"),
        ([[1, 2]], [3], "every length must be from 1 to 2"),
        ([[1, 2]], [1, 1], "must have the same number of rows"),
        ([[1, 2], [3]], [2, 1], "the rows of tokens differ in width"),
        ([1, 2], [2], r"tokens of shape \(2,\) must have 2 axes"),
        ([[1.0, 2.0]], [2], "tokens must be whole numbers, not float64"),
        ([[1, 2]], [2.0], "lengths must be whole numbers, not float64"),
        ([[True, False]], [2], "tokens must be whole numbers, not bool"),
        (np.zeros((0, 4), int), [], "at least one row"),
    ],
)
def test_bad_prompts_are_refused(tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(tokens, lengths, vocab_size=9)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ([3, 4], r"must be \(1,\)"),
        ([9], "token 9 is not in"),
        ([0.5], "not float64"),
        (3, "must have 1 axes"),
    ],
)
def test_a_bad_token_is_refused(token, message):
    with pytest.raises(ValueError, match=message):
        read_token(token, rows=1, vocab_size=9)


@pytest.mark.parametrize("padding", [-100, 61, 2**31 - 1])
def test_padding_may_be_anything(padding):
    model = random_llama(config(num_layers=1))
    ids = np.full((1, 6), padding)
    ids[0, :3] = [1, 2, 3]
    padded = kj.generate(model, ids, [3], cache=kj.full(), max_new_tokens=3, eos_ids=())
    ids[0, 3:] = 0
    zeros = kj.generate(model, ids, [3], cache=kj.full(), max_new_tokens=3, eos_ids=())
    assert padded.finite.all()
    assert padded.tokens.tolist() == zeros.tokens.tolist()


def test_a_full_row_takes_no_token():
    """Counted on the host: the device is asked at the first step, and when a row may be full."""
    model, _, cache = prefilled()
    for room in (1, 0):
        _, cache = model.decode([7, 8], cache)
        assert cache.__dict__["room"] == room
    with pytest.raises(ValueError, match="reached the cache's capacity=6"):
        model.decode([7, 8], cache)
    for _ in range(2):  # a full row that takes none is no obstacle
        _, cache = model.decode([7, 8], cache, jnp.asarray([False, True]))
    assert cache.lengths.tolist() == [6, 6]
    with pytest.raises(ValueError, match="reached the cache's capacity"):
        model.decode([7, 8], cache, jnp.asarray([False, True]))


def test_a_loop_waits_for_nothing(monkeypatch):
    model, logits, cache = prefilled(capacity=9)
    _, cache = model.decode(jnp.argmax(logits, -1), cache)
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        for _ in range(4):
            logits, cache = model.decode(jnp.argmax(logits, -1), cache)
    assert cache.lengths.tolist() == [9, 7]


def test_a_consumed_cache_is_refused():
    model, _, cache = prefilled()
    model.decode([7, 8], cache)
    with pytest.raises(ValueError, match="this cache was consumed by an earlier step"):
        model.decode([7, 8], cache)


def test_decode_can_be_traced():
    model, _, cache = prefilled()
    logits, cache = jax.jit(lambda token, cache: model.decode(token, cache))(jnp.asarray([7, 8]), cache)
    assert "room" not in cache.__dict__
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("number", [2, np.int64(2), np.uint8(2), jnp.int32(2)])
def test_whole_numbers_are_any_kind_of_int(number):
    assert whole("count", number) == 2


@pytest.mark.parametrize("number", [2.0, "2", None, True, np.float32(2), jnp.float32(2), [2]])
def test_other_numbers_are_not_whole(number):
    with pytest.raises(ValueError, match=r"count=.* must be a whole number"):
        whole("count", number)


def test_no_position_is_beyond_32_bits():
    with pytest.raises(ValueError, match=r"count=2147483648 must be below 2\*\*31"):
        whole("count", 2**31)
