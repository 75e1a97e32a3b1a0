from hypothesis import given
from hypothesis import strategies as st

from kivi_jax.demo import MODEL, tokenizer

ENCODER = tokenizer.build()


@given(st.text())
def test_any_text_decodes_to_itself(text):
    tokens = ENCODER.encode(text).ids
    assert ENCODER.decode(tokens, skip_special_tokens=False) == tokenizer.BEGIN + text


def test_a_text_begins_with_the_begin_token_and_padding_is_zero():
    assert ENCODER.encode("the").tokens[0] == tokenizer.BEGIN
    assert ENCODER.token_to_id(tokenizer.PAD) == 0


def test_numbers_are_tokens_of_up_to_two_digits():
    assert ENCODER.encode(" 84213").tokens[1:] == ["Ġ84", "21", "3"]
    assert ENCODER.encode("A12: 3+5=8").tokens[1:] == ["A", "12:", "Ġ3", "+5", "=8"]


def test_the_shipped_tokenizer_is_the_one_that_is_built():
    assert (MODEL / "tokenizer.json").read_text() == ENCODER.to_str(pretty=True)
