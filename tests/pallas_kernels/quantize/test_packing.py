import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantize.packing import PAGE, from_pages, pack, plane, to_pages, unpack, words_per_token

BITS = (1, 2, 4, 8)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS), words=st.integers(1, 40), tokens=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_round_trip(bits, words, tokens, seed):
    channels = words * 8 // bits
    codes = np.random.default_rng(seed).integers(0, 2**bits, (tokens, channels), dtype=np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (tokens, words_per_token(channels, bits))
    np.testing.assert_array_equal(unpack(packed, bits), codes)


def test_the_drawing():
    """Bits 7..0 of word 0 hold channels 6, 4, 2, 0; of word 1 channels 7, 5, 3, 1."""
    c = [3, 0, 1, 2, 2, 1, 0, 3]
    word_0 = f"{c[6]:02b}{c[4]:02b}{c[2]:02b}{c[0]:02b}"
    word_1 = f"{c[7]:02b}{c[5]:02b}{c[3]:02b}{c[1]:02b}"
    packed = pack(jnp.array([c], jnp.uint8), 2)
    assert packed.tolist() == [[int(word_0, 2), int(word_1, 2)]]


@pytest.mark.parametrize("bits", BITS)
def test_bit_field_j_of_word_w_is_channel_j_times_width_plus_w(bits):
    planes, width = 8 // bits, 3
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, planes * width), dtype=np.uint8)
    packed = np.asarray(pack(jnp.asarray(codes), bits)).astype(int)
    for j in range(planes):
        np.testing.assert_array_equal(
            plane(jnp.asarray(packed, jnp.uint8), j, bits), codes[:, j * width : (j + 1) * width]
        )
        for w in range(width):
            assert ((packed[:, w] >> (bits * j)) % 2**bits == codes[:, j * width + w]).all()


def test_pages_put_tokens_minor():
    x = jnp.arange(2 * 64 * 3).reshape(2, 64, 3)
    pages = to_pages(x)
    assert pages.shape == (2, 2, 3, PAGE)
    assert pages[1, 1, 2, 5] == x[1, PAGE + 5, 2]
    np.testing.assert_array_equal(from_pages(pages), x)


def test_refuses_codes_that_do_not_fill_bytes():
    with pytest.raises(ValueError, match="multiple of 4"):
        words_per_token(6, 2)
    with pytest.raises(ValueError, match="1, 2, 4 or 8"):
        words_per_token(8, 3)
