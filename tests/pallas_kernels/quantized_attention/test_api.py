"""One battery for every implementation of `quantized_attention`: add its name to IMPLEMENTATIONS.

Without a GPU the kernels run in Pallas' interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.heads import query_dtype
from pallas_kernels.partials import AttentionPartial, merge, normalize
from pallas_kernels.quantize.quantization import QuantizedTensor, dequantize
from pallas_kernels.quantized_attention import pallas_mosaic, pallas_triton, quantized_attention, xla
from pallas_kernels.quantized_attention.cases import CORRECTNESS, Case
from pallas_kernels.residual.ring import Ring, Token
from tests.draws import dense, normal
from tests.oracles import attention as oracle
from tests.oracles import quantization as quantization_oracle

# name -> relative error allowed, of norms: float32 products, or what the kernel's own operands allow.
IMPLEMENTATIONS = {"xla": 2e-6, "pallas_triton": 1e-3, "pallas_mosaic": 1e-3}
KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic": pallas_mosaic}
INTERPRETED = {} if jax.default_backend() == "gpu" else KERNELS
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# The cases of a plain `pytest`, one of a kind; the others are slow tests.
QUICK = [
    "mha",
    "gqa",
    "one_page",
    "head_8",
    "head_80",
    "head_256",
    "bits_1",
    "bits_4_1",
    "groups_3",
    "groups_128",
    "wrapped",
    "empty_row",
    "tiles_bits_8",
]


def unless_quick(case: Case) -> list[pytest.MarkDecorator]:
    return [] if str(case) in QUICK else [pytest.mark.slow]


@functools.cache
def inputs(case: Case):
    query, key, value = dense(case)
    key, value = jax.jit(case.pack)(key, value)
    return query.astype(jnp.dtype(case.query_dtype)), key, value, *case.token_ranges()


@functools.cache
def expected(case: Case):
    query, key, value, start, end = inputs(case)
    slots = oracle.ring_visible(start, end, case.slots)
    visible = [[row] * case.kv_heads for row in slots]
    return oracle.attend(query, read(key), read(value), visible, case.head_dim**-0.5)


def read(x: QuantizedTensor) -> np.ndarray:
    return quantization_oracle.dequantize(
        x.words, x.scale, x.zero, bits=x.bits, group_size=x.group_size, group_axis=x.group_axis
    )


def jitted(implementation, head_dim, **static):
    if implementation in INTERPRETED:
        attend = INTERPRETED[implementation].attend
        return jax.jit(functools.partial(attend, scale=head_dim**-0.5, interpret=True, **static))
    return jax.jit(functools.partial(quantized_attention, implementation=implementation, **static))


def run(implementation, query, key, value, start, end, **options):
    call = jitted(implementation, query.shape[-1])
    try:
        return call(query, key, value, start=start, end=end, **options)
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got) - want) / max(np.linalg.norm(want), 1e-30))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=unless_quick(case)) for case in CORRECTNESS]
)
def test_the_packed_words_denote_what_dequantize_says(case):
    _, key, value, _, _ = inputs(case)
    for tensor in (key, value):
        assert relative_error(jax.jit(dequantize)(tensor), read(tensor)) < 1e-6


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(name, case, id=f"{case}-{name}", marks=unless_quick(case))
        for case in CORRECTNESS
        for name in IMPLEMENTATIONS
    ],
)
def test_equals_the_oracle(implementation, case):
    tolerance = IMPLEMENTATIONS[implementation]
    got = run(implementation, *inputs(case))
    out, top, denom = expected(case)
    seen = denom > 0
    log_sum_exp = top[seen] + np.log(denom[seen])
    assert got.out.dtype == got.max.dtype == got.denom.dtype == jnp.float32
    assert relative_error(normalize(got), out / np.where(seen, denom, 1)[..., None]) < tolerance
    assert relative_error(np.asarray(got.log_sum_exp)[seen], log_sum_exp) < tolerance


@each_implementation
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tiles_wrapped", jnp.float32),
        ("head_8", jnp.float32),
        *(
            pytest.param(name, jnp.float32, marks=pytest.mark.slow)
            for name in ("tiles_empty_row", "tiles_mqa", "head_96", "window")
        ),
        pytest.param("tiles_wrapped", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("slots", "newer", "sinks", "has_own"),
    [
        (128, 300, 4, True),
        pytest.param(128, 300, 0, False, marks=pytest.mark.slow),
        pytest.param(32, 0, 0, True, marks=pytest.mark.slow),
        pytest.param(96, 5, 0, False, marks=pytest.mark.slow),
        pytest.param(128, 300, 31, False, marks=pytest.mark.slow),
    ],
)
def test_also_attends_to_a_residual_and_the_own_token(
    implementation, name, dtype, slots, newer, sinks, has_own
):
    """A ring that is not full, one that ends with the packed tokens, one that has wrapped, one with sinks.

    What is not packed is of the model's `dtype`; in 16 bits, queries are as a layer has them.
    """
    (case,) = [c for c in CORRECTNESS if c.name == name]
    query, key, value, start, end = inputs(case)
    if dtype == jnp.bfloat16:
        query = query.astype(dtype).astype(query_dtype(dtype))
    shape = (case.batch, case.kv_heads, slots + sinks, case.head_dim)
    ring = Ring(*normal(slots, 2, *shape, dtype=dtype), end + newer + sinks, sinks)
    start = start - sinks // 2  # some of the sinks, where nothing else is hidden
    own = Token(*normal(1, 2, case.batch, case.kv_heads, case.head_dim, dtype=dtype)) if has_own else None
    got = run(implementation, query, key, value, start, end, residual=ring, own=own)

    packed = oracle.ring_visible(start, end, case.slots)
    recent = oracle.ring_visible(start, ring.end, slots)
    first = [
        [low <= token < high for token in range(-sinks, 0)] for low, high in zip(start, ring.end, strict=True)
    ]
    recent = [a + b for a, b in zip(recent, first, strict=True)]
    visible = [[[*a, *b, *[True] * has_own]] * case.kv_heads for a, b in zip(packed, recent, strict=True)]
    keys, values = (
        np.concatenate([read(a), b, *([c[:, :, None]] if has_own else [])], axis=2)
        for a, b, c in zip((key, value), (ring.keys, ring.values), own or (None, None), strict=True)
    )
    out, top, denom = oracle.attend(query, keys, values, visible, case.head_dim**-0.5)
    seen = denom > 0
    want = out / np.where(seen, denom, 1)[..., None]
    if implementation == "pallas_triton" and has_own:
        assert got.out.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps) / 2  # of weights, and of an output that is final
    assert relative_error(normalize(got), want) < max(rounding, IMPLEMENTATIONS[implementation])
    log_sum_exp = top[seen] + np.log(denom[seen])
    assert relative_error(np.asarray(got.log_sum_exp)[seen], log_sum_exp) < IMPLEMENTATIONS[implementation]


@each_implementation
def test_the_newest_tokens_are_held_back(implementation):
    """A row that has fewer tokens than these sees none."""
    query, key, value, start, end = inputs(CORRECTNESS[0])
    want = run(implementation, query, key, value, start, jnp.maximum(end - 40, 0))
    try:
        got = jitted(implementation, query.shape[-1], held_back=40)(query, key, value, start=start, end=end)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    np.testing.assert_array_equal(np.asarray(normalize(got)), np.asarray(normalize(want)))


@each_implementation
def test_a_row_that_sees_nothing_weighs_nothing(implementation):
    name = "tiles_empty_row" if implementation == "pallas_mosaic" else "empty_row"
    (case,) = [c for c in CORRECTNESS if c.name == name]
    query, key, value, start, end = inputs(case)
    for got, rows in (
        (run(implementation, query, key, value, start, end), slice(0, 1)),
        (run(implementation, query, key, value, start, jnp.minimum(end, start)), slice(None)),
    ):
        assert not np.asarray(got.out)[rows].any()
        assert np.isfinite(np.asarray(normalize(merge(got, got)))).all()
        other = AttentionPartial(
            jnp.ones_like(got.out), jnp.full_like(got.max, -50), jnp.ones_like(got.denom)
        )
        np.testing.assert_array_equal(np.asarray(normalize(merge(got, other)))[rows], 1)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("name", ["prime_pages", "wrapped", "window"])
def test_a_row_alone_equals_the_row_in_a_batch(implementation, name):
    (case,) = [c for c in CORRECTNESS if c.name == name]
    batch = inputs(case)
    together = normalize(run(implementation, *batch))
    for row in (0, case.batch - 1):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        got = normalize(run(implementation, *alone))
        assert relative_error(got[0], np.asarray(together[row])) < IMPLEMENTATIONS[implementation]


@each_implementation
def test_lengths_do_not_recompile(implementation):
    query, key, value, start, end = inputs(CORRECTNESS[0])
    call = jitted(implementation, query.shape[-1])
    for length in (1, 17, 128):
        try:
            call(query, key, value, start=start, end=jnp.full_like(end, length))
        except NotImplementedError as reason:
            pytest.skip(str(reason))
    assert call._cache_size() == 1


@pytest.mark.parametrize("name", ["prime_pages", "wrapped", "window", "groups_64", "head_8"])
@pytest.mark.parametrize("tokens", [32, 96, 160])
def test_xla_blocks_of_any_size_agree(name, tokens):
    """Blocks that do not divide the ring, and a last block that overlaps its neighbour."""
    (case,) = [c for c in CORRECTNESS if c.name == name]
    query, key, value, start, end = inputs(case)
    elements = tokens * case.batch * case.kv_heads * case.head_dim
    attend = functools.partial(xla.attend, scale=case.head_dim**-0.5, block_elements=elements)
    got = jax.jit(attend)(query, key, value, start=start, end=end)
    out, _, denom = expected(case)
    assert relative_error(normalize(got), out / denom[..., None]) < 2e-6


def test_xla_reads_only_blocks_that_a_row_needs():
    """Poison in every page outside the windows: a block that holds none of a window is not even read."""
    (case,) = [c for c in CORRECTNESS if c.name == "window"]
    query, key, value, start, end = inputs(case)
    first, last = int(start.min()) // 32, -(-int(end.max()) // 32)
    page = jnp.arange(case.slots // 32)
    outside = (page < first) | (page >= last)
    poison = outside[None, None, :, None]
    key = QuantizedTensor(
        key.words,
        jnp.where(poison, jnp.nan, key.scale),
        key.zero,
        key.bits,
        key.group_size,
        key.group_axis,
    )
    elements = 32 * case.batch * case.kv_heads * case.head_dim
    got = jax.jit(functools.partial(xla.attend, scale=1.0, block_elements=elements))(
        query, key, value, start=start, end=end
    )
    assert np.isfinite(np.asarray(got.out)).all()


def test_refuses_what_does_not_fit():
    query, key, value, start, end = inputs(CORRECTNESS[0])
    with pytest.raises(ValueError, match="grouped over tokens"):
        quantized_attention(query, value, key, start=start, end=end)
    with pytest.raises(ValueError, match="does not fit"):
        quantized_attention(query[:, :3], key, value, start=start, end=end)
