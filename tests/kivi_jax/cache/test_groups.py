"""Groups that nobody named shrink to what divides a model's heads; a strategy keeps its name."""

import logging

import jax.numpy as jnp
import pytest

import kivi_jax as kj
from kivi_jax.cache.names import cache_name, parse_cache
from kivi_jax.checks import warn_once
from tests.models import config, random_llama


@pytest.mark.parametrize(
    ("head_dim", "size"), [(16, 16), (48, 16), (64, 32), (80, 16), (96, 32), (128, 32), (8, 8)]
)
def test_open_sizes_fit_the_model(head_dim, size):
    pool = kj.PoolQuantization()
    strategy = kj.kivi(decode=kj.Slide(), pool=pool).fit(config(head_dim=head_dim))
    assert strategy.quantization.value_group_size == strategy.pool.group_size == size
    assert strategy.quantization.key_group_size == 32  # over tokens
    assert parse_cache(cache_name(strategy)) == strategy


def test_named_sizes_stay_or_are_refused():
    strategy = kj.kivi(value_group_size=16)
    assert strategy.fit(config(head_dim=64)) == strategy
    with pytest.raises(ValueError, match="value_group_size=32 must divide the model's head_dim=48"):
        kj.kivi(group_size=32).check(config(head_dim=48))
    with pytest.raises(ValueError, match="key_group_size=0 must be positive"):
        kj.kivi(key_group_size=0)


def test_shrinking_is_said_once(caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            kj.kivi().check(config(head_dim=48))
        kj.kivi().check(config(head_dim=64))
    assert [record.message[:45] for record in caplog.records] == [
        "heads of 48 channels do not divide into group"
    ]


def test_the_default_cache_takes_any_heads():
    model = random_llama(config(num_layers=1, head_dim=48, num_heads=2, num_kv_heads=1))
    _, cache = model.prefill([[1, 2, 3]], [3], cache=kj.kivi(residual_length=32), capacity=8)
    assert cache.layers[0][0].values.group_size == 16
    assert cache_name(cache.strategy) == "kivi2:residual_length=32"
    logits, _ = model.decode([4], cache)
    assert jnp.isfinite(logits).all()
