"""Memory: what caches weigh, what plans promise, and how both are written and read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import kivi_jax as kj
from convert.hf import abstract_parameters
from kivi_jax.cache.names import parse_cache
from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.console import format_bytes, parse_bytes
from kivi_jax.mesh import read_mesh
from kivi_jax.model.sharding import laid_out, order_of, spec_of
from kivi_jax.plan.memory import largest_batch, parameter_count, parameters_of_device, plan_cache
from kivi_jax.plan.shapes import SHAPES
from tests.models import config, random_llama

CACHES = {
    "full": kj.full(),
    "kivi2": kj.kivi(2, 8, 16),
    "mixed": kj.kivi(
        key_bits=8, value_bits=4, group_size=8, key_group_size=4, residual_length=8, scale_dtype="bfloat16"
    ),
}
LLAMA_8B = SHAPES["llama-8b"]


@pytest.mark.parametrize(
    ("name", "window"), [("full", None), ("full", 20), ("kivi2", None), ("kivi2", 20), ("mixed", None)]
)
def test_plan_and_cache_bytes_equal_the_arrays(name, window):
    model_config = config(sliding_window=window)
    model = random_llama(model_config)
    _, cache = model.prefill(
        jnp.ones((2, 50), jnp.int32), jnp.asarray([50, 50]), cache=CACHES[name], capacity=50
    )
    weighed = kj.cache_bytes(cache)
    assert weighed["total"] == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert weighed["total"] == sum(weighed[part] for part in weighed if part != "total")
    assert bool(weighed["dense"]) == (name == "full")
    assert bool(weighed["packed"]) == (name != "full")
    assert plan_cache(model_config, CACHES[name], batch=2, context=50, dtype="float32") == weighed


@pytest.mark.parametrize(("bits", "least"), [(2, 5.0), (4, 3.1)])
def test_how_much_smaller_than_bfloat16(bits, least):
    """The product's promise: Llama-3.1-8B at 32k tokens, G = 32, R = 128."""
    full, packed = (
        plan_cache(LLAMA_8B, strategy, batch=1, context=32768, dtype="bfloat16")["total"]
        for strategy in (kj.full(), kj.kivi(bits))
    )
    assert full / packed >= least
    assert full >= 2 * 32 * 8 * 32768 * 128 * 2  # K and V, layers, heads, tokens, channels, bytes


def test_how_much_smaller_with_a_pool_for_what_is_generated():
    """Llama-3.1-8B, a prompt of 7.4k tokens, 11.5k in all, decode window 512; less with a packed pool."""
    options = dict(batch=1, context=11_500, prompt_tokens=7_400, dtype="bfloat16")
    names = ("full", "kivi2", "kivi2+scope:window=512", "kivi2+scope:window=512:pool_bits=4")
    full, kivi, dense, packed = (
        plan_cache(LLAMA_8B, parse_cache(name), **options)["total"] for name in names
    )
    assert full / dense >= 5.2
    assert packed < dense < kivi < full


@pytest.mark.parametrize("context", [3, 132, 2048])
def test_turning_keys_weighs_nothing(context):
    """And first tokens weigh what they are, whether a text is longer or not."""
    plain, sinks, turned = (
        plan_cache(LLAMA_8B, name, batch=1, context=context, dtype="bfloat16")
        for name in ("kivi2", "kivi2:sinks=4", "kivi2r")
    )
    assert turned == sinks
    assert sinks["rings"] - plain["rings"] == 32 * 8 * 4 * 128 * 2 * 2  # layers, heads, tokens, channels


def test_a_window_bounds_the_cache():
    sizes = [
        plan_cache(config(sliding_window=16), kj.kivi(2, 8, 8), batch=1, context=n, dtype="float32")["total"]
        for n in (200, 2000)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["full", "kivi2"])
def test_largest_batch_fits_and_one_more_does_not(name):
    shape = dataclasses.replace(LLAMA_8B, num_layers=2)
    strategy, memory, weights = parse_cache(name), parse_bytes("24GB"), 2 * parameter_count(shape)
    rows = largest_batch(shape, strategy, context=32768, dtype="bfloat16", memory_bytes=memory)

    def needed(batch):
        cache = plan_cache(shape, strategy, batch=batch, context=32768, dtype="bfloat16")["total"]
        return weights + cache + batch * 4 * shape.vocab_size

    assert rows > 1
    assert needed(rows) <= memory < needed(rows + 1)


def test_no_row_fits_where_the_weights_do_not():
    assert largest_batch(config(), kj.full(), context=8, dtype="bfloat16", memory_bytes=1000) == 0


def test_parameters_are_counted():
    leaves = jax.tree.leaves(random_llama(config(tie_word_embeddings=True)))
    assert parameter_count(config(tie_word_embeddings=True)) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        *(("llama-1b", 1_235_814_400), ("mistral-7b", 7_248_023_552), ("llama-8b", 8_030_261_248)),
        *(("qwen3-8b", 8_190_735_360), ("smollm3-3b", 3_075_098_624), ("phi-4", 14_659_507_200)),
    ],
)
def test_shapes_have_their_models_parameters(shape, parameters):
    """As the published checkpoints count them."""
    assert parameter_count(SHAPES[shape]) == parameters


@pytest.mark.parametrize("numbers", [dict(batch=0, context=8), dict(batch=1, context=0)], ids=str)
def test_plans_of_nothing_are_refused(numbers):
    with pytest.raises(ValueError, match="must be positive"):
        plan_cache(config(), kj.full(), dtype="float32", **numbers)


def test_layers_of_one_kind_are_planned_once(monkeypatch):
    """300 layers took minutes; a plan grows with kinds of layers: by window, and by what a selector gives."""
    held = []

    def hold(self, *args, window, **options):
        held.append(window)
        return hold_prompt(self, *args, window=window, **options)

    hold_prompt = CacheStrategy.hold_prompt
    monkeypatch.setattr(CacheStrategy, "hold_prompt", hold)
    shape = config(num_layers=300, sliding_window=16, windowed=(True, True, False))
    parts = plan_cache(shape, kj.full(), batch=1, context=64, dtype="float32")
    assert held == [16, None]
    token = 2 * 4 * shape.num_kv_heads * shape.head_dim
    assert parts["dense"] == token * (200 * 16 + 100 * 64)


def test_plans_check_the_strategy():
    with pytest.raises(ValueError, match="value_group_size=32 must divide"):
        plan_cache(config(), kj.kivi(group_size=32), batch=1, context=64, dtype="float32")


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("full", kj.full()),
        ("kivi1", kj.kivi(1)),
        ("kivi2", kj.kivi(2)),
        ("kivi4", kj.kivi(4)),
        ("kivi8", kj.kivi(8)),
        ("kivi2:group_size=64:residual_length=64", kj.kivi(2, 64, 64)),
        ("kivi2r", kj.kivi(2, rotate_keys=True, sinks=4)),
        ("kivi42r", kj.kivi(key_bits=4, value_bits=2, rotate_keys=True, sinks=4)),
        ("kivi4r:sinks=0", kj.kivi(4, rotate_keys=True)),
        ("kivi2:sinks=8", kj.kivi(2, sinks=8)),
        ("kivi2r+scope", kj.kivi(2, rotate_keys=True, sinks=4, decode=kj.Slide())),
        ("kivi2:value_bits=4:scale_dtype=float32", kj.kivi(2, value_bits=4, scale_dtype="float32")),
    ],
)
def test_names_of_caches(text, strategy):
    assert parse_cache(text) == strategy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kivi3", "unknown cache 'kivi3': choose one of full, kivi1, kivi2, kivi4, kivi8"),
        ("", "unknown cache ''"),
        ("kivi2:groups=8", "kivi2 has no field groups; its fields: group_size, key_bits"),
        ("kivi2:group_size", "cannot read 'group_size'"),
        ("full:group_size=8", "full has no field group_size; its fields: none"),
        ("kivi2:bits=4", "kivi2 has no field bits"),
        ("kivi2:group_size=many", "group_size=many must be a whole number"),
        ("scope:window=wide", "window=wide must be a whole number"),
        ("scope:decode=gkv:decay=nan", "decay=nan must be a number"),
        ("scope:decode=best", "unknown selector 'best': choose one of slide"),
        ("kivi2:group_size=-8", "must be positive"),
        ("kivi2:group_size=--8", "group_size=--8 must be a whole number"),
        ("kivi2:group_size=8:group_size=16", "gives group_size twice"),
        ("scope:my_prompt_budget=8", "slide has no field my_prompt_budget"),
        ("scope:decode=h2o:recent=4", "h2o needs budget"),
        ("scope:decode=adaptive", "adaptive needs max_new_tokens"),
        (
            "scope:prompt=snapkv:prompt_budget=8:prompt_pooling=median",
            "pooling=median must be one of average, max",
        ),
        ("kivi2:scale_dtype=int8", "scale_dtype=int8 must be one of float16, bfloat16, float32"),
        ("scope:pool_scale_dtype=half", "scale_dtype=half must be one of float16"),
        ("scope:pool_bits=3", "must be 1, 2, 4 or 8"),
        ("kivi2+scope:decode=h2o:budget=8:recent=4", "nothing would be packed"),
        ("kivi2:sinks=-1", "sinks=-1 must not be negative: pass 0 for none"),
        ("kivi2:rotate_keys=1", "kivi2 has no field rotate_keys"),
        (
            "kivi2r+scope:prompt=snapkv:prompt_budget=34",
            "no room for the first 4 tokens beside the newest 32: give it a budget of at least 36",
        ),
        ("kivi2:group_size=48", "residual_length=128 must be a multiple of key_group_size=48"),
    ],
)
def test_caches_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (2**30, "1 GiB"),
        (1.234 * 2**30, "1.23 GiB"),
        (1000 * 2**20, "1000 MiB"),
        (3 * 2**40, "3 TiB"),
    ],
)
def test_bytes_are_written(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("500 MB", 500_000_000),
        ("1e9", 10**9),
        ("7", 7),
        (" 1.5kib ", 1536),
        ("2TB", 2 * 10**12),
        ("1 TiB", 2**40),
        ("12B", 12),
    ],
)
def test_bytes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "many", "3 apples", "1 GiBB", "inf", "nan", "-1GB"])
def test_bytes_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="as a memory size"):
        parse_bytes(text)


@pytest.mark.parametrize("model", [1, 4, 16])
def test_a_device_of_a_mesh_holds_its_parameters(model):
    """Also keys' and values' of 8 heads, which two of 16 devices have."""
    mesh = read_mesh(f"data=2,model={model}")
    for shape in (LLAMA_8B, SHAPES["llama-1b"]):  # with a head of its own, and without
        small = dataclasses.replace(shape, num_layers=2)
        parts, held = laid_out(mesh, small), 0
        for path, leaf in abstract_parameters(small, "bfloat16").items():
            order, axes = order_of(path, small, parts), spec_of(path, small, parts)
            whole = leaf.size if order is None else leaf.size // leaf.shape[order[0]] * order[1].size
            held += whole // (model if any(axes) else 1)
        assert parameters_of_device(small, mesh) == held


def test_a_device_of_a_mesh_holds_its_part_of_a_cache():
    plan = functools.partial(plan_cache, LLAMA_8B, "kivi2", batch=4, context=4096, dtype="bfloat16")
    whole, part = plan(), plan(mesh=read_mesh("data=2,model=4"))
    assert {name: whole[name] / part[name] for name in ("packed", "scales", "rings")} == {
        "packed": 8,
        "scales": 8,
        "rings": 8,
    }
    rows = functools.partial(largest_batch, LLAMA_8B, "kivi2", context=4096, dtype="bfloat16")
    assert rows(memory_bytes=40 << 30, mesh=read_mesh("data=2")) == 2 * rows(memory_bytes=40 << 30)


@pytest.mark.parametrize("text", ["data=2,model", "rows=2", "data=a", "", "data=2,data=4"])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="as a mesh: write for example data=2,model=4"):
        read_mesh(text)
