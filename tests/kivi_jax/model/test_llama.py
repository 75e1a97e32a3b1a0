"""The model: against the recorded original KIVI, against transformers, and against itself in pieces."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kivi_jax as kj
from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.config import RopeConfig
from kivi_jax.model.layer import query_key_value_columns
from kivi_jax.model.llama import _decode, _hold, abstract_llama
from kivi_jax.model.reading import default_block, read_by_blocks
from pallas_kernels.pytree import Flat
from tests.models import config, random_llama, stories

STRATEGIES = {
    "full": kj.full(),
    "kivi2": kj.kivi(2, 8, 16),
    "kivi2r": kj.kivi(2, 8, 16, rotate_keys=True, sinks=3),
    "kivi4": kj.kivi(key_bits=4, value_bits=2, key_group_size=4, value_group_size=8, residual_length=8),
}
SELECTING = {
    "scope": kj.scope(decode=kj.Slide(window=8, recent=4)),
    "snapkv+adaptive": kj.scope(
        prompt=kj.SnapKV(budget=12, window=4), decode=kj.Adaptive(window=9, recent=4, max_new_tokens=24)
    ),
    "h2o": kj.scope(prompt=kj.H2O(budget=12, recent=4), decode=kj.H2O(budget=16, recent=6)),
    "streamingllm": kj.scope(
        prompt=kj.StreamingLLM(sinks=2, recent=9), decode=kj.StreamingLLM(sinks=2, recent=12)
    ),
    "kivi2+h2o": kj.kivi(2, 8, 8, prompt=kj.H2O(budget=12, recent=4), decode=kj.Slide(window=8, recent=4)),
    "random": kj.scope(
        prompt=kj.ExpectedAttention(budget=14, recent=4), decode=kj.Random(window=8, recent=3, block=2)
    ),
    "gkv": kj.kivi(2, 8, 8, prompt=kj.KeyDiff(budget=14, recent=4), decode=kj.GKV(window=8, recent=3)),
    "kivi2+pyramid": kj.kivi(2, 8, 8, prompt=kj.PyramidKV(budget=12, window=4, beta=2)),
    "kivi2r+scope": kj.kivi(
        2,
        8,
        8,
        rotate_keys=True,
        sinks=3,
        prompt=kj.PyramidInfer(budget=14, window=4),
        decode=kj.Discontinuous(window=8, recent=3, max_new_tokens=24),
        pool=kj.PoolQuantization(bits=4, group_size=8),
    ),
}


def tokens(*shape, vocab=61, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


def decode_all(model, logits, cache, ids):
    """Logits before and after each of `ids` [steps, B] is fed."""
    out = [logits]
    for token in ids:
        logits, cache = model.decode(jnp.asarray(token), cache)
        out.append(logits)
    return np.stack(out), cache


@pytest.mark.original
@pytest.mark.slow
@pytest.mark.parametrize("prompt", [17, 32, 64, 77])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 2), (2, 4), (4, 2), (4, 4)])
def test_logits_follow_the_original_kivi(shared, prompt, key_bits, value_bits):
    """Over 64 steps, for prompts shorter than R = 32, equal to it, a multiple of it, and neither."""
    file = shared / "golden" / f"kivi_stream_stories260K_T{prompt}.npz"
    if not file.exists():
        pytest.skip(f"{file.name} was not recorded here")
    golden = np.load(file)
    name = f"k{key_bits}v{value_bits}"
    strategy = kj.kivi(
        key_bits=key_bits, value_bits=value_bits, group_size=8, residual_length=32, scale_dtype="float32"
    )
    model = stories(shared)
    ids = np.zeros((1, 77), np.int32)  # of one width, so that all lengths share their programs
    ids[0, :prompt] = golden["prompt_ids"]
    logits, cache = model.prefill(jnp.asarray(ids), jnp.asarray([prompt]), cache=strategy, capacity=77 + 64)
    got, cache = decode_all(model, logits, cache, golden[f"{name}_ids"][:, None])
    steps = golden[f"{name}_logit_steps"]
    assert np.abs(got[steps, 0] - golden[f"{name}_logits"]).max() < 2e-3
    assert (got[:64, 0].argmax(-1) == golden[f"{name}_ids"]).all()
    packed_keys, full_keys, packed_values, full_values, length = golden[f"{name}_counts"][64, 0]
    (segment,) = cache.layers[0]
    n, residual = int(segment.lengths[0]), segment.residual_length
    assert (n, n // residual * residual, n % residual) == (length, packed_keys, full_keys)
    assert (max(0, n - residual), min(n, residual)) == (packed_values, full_values)


@pytest.mark.original
@pytest.mark.slow
def test_original_kivi_at_full_length_prompts_of_r(shared):
    """A prompt of exactly R, and of a multiple of R, equal the paper's lists run through our forward."""
    model = stories(shared)
    golden = np.load(shared / "golden" / "kivi_stream_stories260K_T77.npz")
    strategy = kj.kivi(2, 8, 32, scale_dtype="float32")
    for prompt in (32, 64):
        ids = golden["prompt_ids"][:prompt]
        streamed_logits, streamed = model.prefill(
            jnp.asarray(ids[:1])[None], jnp.asarray([1]), cache=strategy, capacity=128
        )
        del streamed_logits
        once_logits, once = model.prefill(
            jnp.asarray(ids)[None], jnp.asarray([prompt]), cache=strategy, capacity=128
        )
        (segment,) = once.layers[0]
        # The first layer's keys and values depend on the tokens only: streaming gives the same cache.
        _, streamed = decode_all(model, once_logits, streamed, ids[1:, None])
        (other,) = streamed.layers[0]
        packed = slice(0, prompt // 32 * 32)
        assert (segment.keys.words[:, :, packed] != other.keys.words[:, :, packed]).mean() < 1e-3
        np.testing.assert_allclose(segment.value_ring, other.value_ring, atol=1e-5)


def test_logits_equal_transformers_on_the_trained_model(shared):
    golden = np.load(shared / "models" / "stories260K" / "golden_hf.npz")
    logits = stories(shared)(jnp.asarray(golden["input_ids"])[None])
    np.testing.assert_allclose(logits[0], golden["logits"], atol=1e-4)


VARIANTS = {
    "GQA": {},
    "MHA": dict(num_kv_heads=4),
    "MQA": dict(num_kv_heads=1),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=24),
    "window": dict(sliding_window=9),
    "every other layer a window, rotated otherwise": dict(
        sliding_window=9, windowed=(True, False), window_rope=RopeConfig(theta=500.0)
    ),
    "every other layer without positions": dict(rotated=(True, False)),
    "partly rotated": dict(rope=RopeConfig(partial=0.5)),
    "queries that grow": dict(rope=RopeConfig(query_beta=0.5, original_max_position_embeddings=8)),
    "norms of heads, before and after": dict(qk_norm="head", norm_placement="both", norm_offset=1.0),
    "norms of projections, after": dict(qk_norm="projection", norm_placement="post"),
    "multipliers": dict(
        embedding_multiplier=3.0,
        attention_multiplier=0.5,
        residual_multiplier=0.3,
        logits_multiplier=0.1,
        logits_softcap=2.0,
        activation="gelu_tanh",
    ),
    "linear": dict(rope=RopeConfig(kind="linear", factor=2.0)),
    "llama3": dict(rope=RopeConfig(kind="llama3", factor=8.0, original_max_position_embeddings=16)),
    "yarn": dict(rope=RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=16)),
}


QUICK = ("GQA", "MQA", "window", "every other layer a window, rotated otherwise", "multipliers")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in VARIANTS]
)
def test_prefill_and_decode_equal_one_forward(name):
    """Logits of every step of a ragged batch equal those of a forward over the whole row."""
    model = random_llama(config(**VARIANTS[name]))
    ids = tokens(3, 40)
    lengths = np.array([1, 13, 20])
    logits, cache = model.prefill(
        ids[:, :20], jnp.asarray(lengths), cache=kj.full(), capacity=40, block_tokens=7
    )
    steps = [ids[np.arange(3), lengths + i] for i in range(20)]
    got, cache = decode_all(model, logits, cache, steps)
    whole = np.asarray(model(jnp.asarray(ids)))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(got[:, row], whole[row, n - 1 : n + 20], atol=3e-5)
    assert list(cache.lengths) == list(lengths + 20)


@pytest.mark.parametrize(
    "name", ["full", "kivi2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kivi2r", "kivi4"))]
)
def test_block_size_does_not_change_the_result(name):
    model = random_llama(config(sliding_window=None, num_layers=1))
    ids, lengths = tokens(2, 37, seed=1), jnp.asarray([37, 21])
    reference, materialize = None, jax.jit(lambda segment: segment.materialize())
    for block_tokens in (1, 8, 36, 512):
        logits, cache = model.prefill(
            ids, lengths, cache=STRATEGIES[name], capacity=40, block_tokens=block_tokens
        )
        held = [materialize(segment) for layer in cache.layers for segment in layer]
        reference = reference or (logits, held)
        np.testing.assert_allclose(logits, reference[0], atol=2e-5)
        for got, expected in zip(held, reference[1], strict=True):
            seen = np.asarray(got.position)[..., None] >= 0
            difference = np.where(seen, got.key - expected.key, 0)
            # A scale that lies between two float16 numbers may be stored as either; nothing else may differ.
            packed = STRATEGIES[name].quantization is not None
            assert np.mean(np.abs(difference) > 2e-5) <= (0.01 if packed else 0)
            np.testing.assert_allclose(difference, 0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("full", (None,)),
        ("kivi2", (None,)),
        ("scope", (None,)),
        ("kivi2r+scope", (11, None)),
        *(
            pytest.param(name, windows, marks=pytest.mark.slow)
            for name, windows in (
                *(
                    (name, (None,))
                    for name in STRATEGIES | SELECTING
                    if name not in ("full", "kivi2", "scope")
                ),
                *((name, (11,)) for name in STRATEGIES),
                *((name, (11, None)) for name in ("full", "kivi2", "scope", "h2o")),
            )
        ),
    ],
)
def test_a_row_is_the_same_alone_and_in_any_batch(name, windows):
    """Eight rows of different lengths, token for token; with a window in no, every and every other layer."""
    window, windowed = windows[0], tuple(window is not None for window in windows)
    # PyramidKV's budgets differ by layer; of the others one layer shows as much.
    layers = max(len(windows), 2 if name == "kivi2+pyramid" else 1)
    model = random_llama(config(sliding_window=window, windowed=windowed, num_layers=layers))
    strategy = (STRATEGIES | SELECTING)[name]
    lengths = np.array([1, 3, 8, 15, 16, 17, 32, 33])
    ids = tokens(8, 33, seed=2)

    def generate(rows, width):
        return kj.generate(
            model, ids[rows, :width], lengths[rows], cache=strategy, max_new_tokens=24, eos_ids=()
        ).tokens

    together = generate(slice(None), 33)
    # Each width compiles anew, so a cache is tried with one: all rows, or the shorter with half the padding.
    width = 33 if name in ("full", "kivi2") else 17
    for row in np.flatnonzero(lengths <= width):
        alone = generate(slice(row, row + 1), width)
        np.testing.assert_array_equal(together[row], alone[0])


def test_layers_that_hold_fewer_tokens_pack_when_their_own_blocks_are_full():
    """8 bits, which lose little, beside full precision: PyramidKV's layers hold 24, 18 and 12 tokens."""
    model, selector, ids = (
        random_llama(config(num_layers=3)),
        kj.PyramidKV(budget=14, window=4),
        tokens(20, 2),
    )

    def logits(cache):
        start = model.prefill(tokens(2, 40), np.array([40, 33]), cache=cache, capacity=64)
        return decode_all(model, *start, ids)[0]

    packed = logits(kj.kivi(8, 8, 8, prompt=selector))
    np.testing.assert_allclose(packed, logits(CacheStrategy(prompt=selector)), atol=0.05)


def test_turned_keys_and_sinks_alone_change_nothing():
    """Before anything is packed: prompts shorter than the sinks, and longer than these."""
    model, lengths = random_llama(config(head_dim=24)), jnp.asarray([2, 20])
    cache = kj.kivi(2, 8, 64, rotate_keys=True, sinks=4)
    start = {
        name: model.prefill(tokens(2, 20), lengths, cache=c, capacity=40)
        for name, c in {"full": kj.full(), "turned": cache}.items()
    }
    got, expected = (decode_all(model, *start[name], tokens(20, 2, seed=9))[0] for name in ("turned", "full"))
    np.testing.assert_allclose(got, expected, atol=3e-5)


def test_what_stands_in_the_padding_does_not_matter():
    model = random_llama(config(num_layers=1))
    ids = np.array(tokens(2, 20, seed=3))
    other = ids.copy()
    other[0, 5:] = 60
    lengths = jnp.asarray([5, 20])
    for strategy in STRATEGIES.values():
        first, second = (
            kj.generate(model, jnp.asarray(x), lengths, cache=strategy, max_new_tokens=20)
            for x in (ids, other)
        )
        np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.original
@pytest.mark.slow
def test_scope_equals_the_original_end_to_end(shared):
    """64 tokens of ALLKV + slide, on the trained model with one KV head per query head, as SCOPE caches."""
    golden = np.load(shared / "golden" / "scope_stream_stories260K.npz")
    prompt = np.load(shared / "golden" / "kivi_stream_stories260K_T77.npz")["prompt_ids"]
    grouped = stories(shared)
    model = random_llama(replace(grouped.config, num_kv_heads=grouped.config.num_heads))
    nnx.update(model, nnx.state(grouped, lambda path, _: "query_key_value" not in path))
    queries, *keys_and_values = query_key_value_columns(grouped.config)
    for ours, theirs in zip(model.layers, grouped.layers, strict=True):
        kernel = theirs.attention.query_key_value.kernel[...]
        heads = (kernel[:, part].reshape(len(kernel), -1, model.config.head_dim) for part in keys_and_values)
        repeated = (jnp.repeat(head, 2, axis=1).reshape(len(kernel), -1) for head in heads)
        ours.attention.query_key_value.kernel[...] = jnp.concatenate([kernel[:, queries], *repeated], axis=1)
    strategy = kj.scope(decode=kj.Slide(window=24, recent=8))
    logits, cache = model.prefill(
        jnp.asarray(prompt)[None], jnp.asarray([77]), cache=strategy, capacity=77 + 64
    )
    ids = golden["allkv+slide_ids"]
    got, cache = decode_all(model, logits, cache, ids[:63, None])
    np.testing.assert_allclose(got[:, 0], golden["allkv+slide_logits"], atol=2e-3)
    whole = np.asarray(grouped(jnp.asarray([[*prompt, *ids[:63]]]))[0, 76:])
    assert np.abs(whole - got[:, 0])[30:].max() > 0.1  # tokens were really dropped


def test_pool_bytes_do_not_grow_with_the_output():
    """With a window, what decoding holds is the same for short and long generations."""
    from kivi_jax.plan.memory import plan_cache

    model_config = config(head_dim=64)
    sizes = [
        plan_cache(model_config, kj.scope(), batch=1, context=100 + new, prompt_tokens=100, dtype="float32")
        for new in (600, 6000)
    ]
    assert sizes[0] == sizes[1]
    assert sizes[0]["pool"] == 2 * 2 * 2 * 513 * 64 * 4


def test_no_recompilation_while_decoding():
    """One program for every layer of a prompt and one for every step, whatever the lengths."""
    model = random_llama(config())
    ids = tokens(2, 16, seed=4)
    programs = (read_by_blocks, _hold, _decode)
    for program in programs:
        program.clear_cache()
    for lengths in ([16, 3], [1, 9]):
        logits, cache = model.prefill(ids, jnp.asarray(lengths), cache=kj.kivi(2, 8, 8), capacity=48)
        for _ in range(20):
            logits, cache = model.decode(jnp.argmax(logits, -1).astype(jnp.int32), cache)
    assert [program._cache_size() for program in programs] == [1, 1, 1]


@pytest.mark.parametrize("name", ["full", "kivi2", pytest.param("kivi4", marks=pytest.mark.slow)])
def test_a_step_updates_the_cache_in_place(name):
    """Donated buffers are reused, and no step copies a layer's tokens."""
    model = random_llama(config())
    logits, cache = model.prefill(
        tokens(1, 100, seed=5), jnp.asarray([100]), cache=STRATEGIES[name], capacity=4096
    )
    del logits
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers[0]))
    compiled = _decode.lower(Flat.of(model), jnp.asarray([1]), cache, jnp.asarray([True])).compile()
    memory = compiled.memory_analysis()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == total
    if name == "full":
        assert memory.temp_size_in_bytes < layer


def test_prefill_keeps_one_layer_in_full_precision():
    """The peak of a long prompt does not grow with the number of layers but for the packed cache."""
    strategy = kj.kivi(2, 8, 16)
    temporary = []
    for layers in (2, 4):
        model = random_llama(config(num_layers=layers))
        read = functools.partial(model.prefill, cache=strategy, capacity=4096, block_tokens=64)
        lowered = jax.jit(read).lower(tokens(1, 4096), jnp.asarray([4096]))
        temporary.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    one_layer = 2 * 2 * 4096 * 8 * 4  # keys and values, 2 KV heads, float32
    assert temporary[1] - temporary[0] < one_layer


def test_an_abstract_model_is_the_one_that_would_be_made():
    shape = config(tie_word_embeddings=False, attention_bias=True)
    graph, state = nnx.split(abstract_llama(shape, jnp.bfloat16))
    made_graph, made = nnx.split(kj.Llama(shape, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert graph == made_graph
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, made)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
    nnx.update(abstract_llama(shape, jnp.bfloat16), made)  # filling one leaves the next as it was
    again = jax.tree.leaves(nnx.state(abstract_llama(shape, jnp.bfloat16)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in again)


def test_bad_arguments_are_refused():
    model = random_llama(config())
    ids = tokens(2, 8)
    with pytest.raises(ValueError, match="capacity=4 must be at least the prompt's 8 tokens"):
        model.prefill(ids, jnp.asarray([8, 8]), cache=kj.full(), capacity=4)
    with pytest.raises(ValueError, match=r"value_group_size=32 must divide the model's head_dim=8: pass"):
        model.prefill(ids, jnp.asarray([8, 8]), cache=kj.kivi(group_size=32), capacity=8)
    with pytest.raises(ValueError, match="every length must be from 1 to 8"):
        kj.generate(model, ids, jnp.asarray([8, 0]), cache=kj.full(), max_new_tokens=1)


@pytest.mark.parametrize(
    ("rows", "tokens", "flash", "block"),
    [(1, 9000, False, 512), (1, 2048, True, 2048), (1, 2100, True, 1152), (8, 2048, True, 512)],
)
def test_blocks_of_a_prompt_keep_a_gpu_busy_and_pad_little(rows, tokens, flash, block):
    assert default_block(rows, tokens, flash=flash) == block
