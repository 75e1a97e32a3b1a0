import dataclasses

import pytest

from kivi_jax.config import ModelConfig, RopeConfig, RopeKind

LLAMA = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_layers=5,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=512,
)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("size", [0, -8])
def test_a_size_that_is_not_positive_is_refused_by_name(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"positive.*'{name}': {size}\b"):
        dataclasses.replace(LLAMA, **{name: size})


def test_every_bad_size_is_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"'vocab_size': 0.*'num_layers': -1"):
        dataclasses.replace(LLAMA, vocab_size=0, num_layers=-1)


@pytest.mark.parametrize("num_kv_heads", [3, 16])
def test_kv_heads_must_divide_query_heads(num_kv_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"num_kv_heads={num_kv_heads} must divide .*num_heads=8"):
        dataclasses.replace(LLAMA, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
def test_every_way_to_share_kv_heads_is_accepted(num_kv_heads: int) -> None:
    assert dataclasses.replace(LLAMA, num_kv_heads=num_kv_heads).num_kv_heads == num_kv_heads


def test_an_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim=7 must be even"):
        dataclasses.replace(LLAMA, head_dim=7)


@pytest.mark.parametrize("field", ["rope", "window_rope"])
@pytest.mark.parametrize(("kind", "partial"), [("default", 3 / 8), ("dynamic", 2 / 8), ("linear", 1.25)])
def test_channels_that_rope_cannot_pair_are_refused(field: str, kind: RopeKind, partial: float) -> None:
    rope = RopeConfig(kind=kind, partial=partial)
    with pytest.raises(
        ValueError, match=rf"partial={partial} rotates {int(8 * partial)} of 8 channels: {kind}"
    ):
        dataclasses.replace(LLAMA, head_dim=8, **{field: rope})


def test_head_dim_is_free_of_hidden_size() -> None:
    assert dataclasses.replace(LLAMA, head_dim=128).head_dim == 128


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_that_holds_nothing_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=rf"sliding_window={window} must be positive"):
        dataclasses.replace(LLAMA, sliding_window=window)


def test_the_smallest_window_is_the_current_token() -> None:
    assert dataclasses.replace(LLAMA, sliding_window=1).sliding_window == 1


def test_equal_configs_share_a_compilation() -> None:
    """jit looks static arguments up by hash and equality, the nested rope config included."""
    rope = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}
    one, other = (dataclasses.replace(LLAMA, rope=RopeConfig(**rope)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != LLAMA


def test_a_config_cannot_change_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LLAMA.head_dim = 7  # pyright: ignore[reportAttributeAccessIssue]
