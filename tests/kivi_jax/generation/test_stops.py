"""New tokens become text: whole characters, the space that stands before them, and no stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_jax.generation.stops import Decoder, StopFilter, decode_stream, find_stop, may_begin
from kivi_jax.generation.text import decode_after
from tests.tokenizers import TEXTS, build

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def shown(pieces, stop):
    out = StopFilter(stop)
    return "".join(map(out.push, pieces)) + out.finish(), out.stopped


@given(st.lists(LETTERS, max_size=5), STOPS)
def test_text_ends_before_what_stops_it_however_it_is_divided(pieces, stop):
    text = "".join(pieces)
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    first = min(ends, default=None)  # the oracle reads character by character
    longest = None if first is None else max(len(s) for s in stop if text[:first].endswith(s))
    assert shown(pieces, stop) == (text if first is None else text[: first - longest], first is not None)


@given(LETTERS, STOPS)
def test_what_is_held_back_is_the_longest_begin_of_a_stop(text, stop):
    begins = {s[:length] for s in stop for length in range(1, len(s))}
    expected = max(
        (length for length in range(len(text) + 1) if text[len(text) - length :] in begins), default=0
    )
    assert may_begin(text, stop) == expected


def test_what_is_certain_is_shown_at_once():
    out = StopFilter(["\nQ:"])
    assert [out.push(piece) for piece in ("an", "swer\n", "\nQ", "uite")] == ["an", "swer", "\n", "\nQuite"]
    assert [out.push(piece) for piece in ("\n", "Q: next", "more")] == ["", "", ""]
    assert out.stopped
    assert out.finish() == ""
    assert find_stop("abc", ()) is None


@pytest.mark.parametrize("stop", [[""], ["a", ""], ""])
def test_a_stop_of_nothing_is_refused(stop):
    with pytest.raises(ValueError, match="at least one character"):
        StopFilter(stop or [stop])


@pytest.mark.parametrize("kind", ["spaced", "bytes"])
@settings(deadline=None, max_examples=50)  # the first builds the tokenizer
@given(st.data())
def test_a_completion_is_what_the_whole_text_has_more(kind, data):
    """prompt + completion == the text of all tokens, streamed or at once."""
    tokenizer = build(kind)
    texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
    ids = tokenizer(data.draw(texts), add_special_tokens=False)["input_ids"]
    cut = data.draw(st.integers(0, len(ids)))
    before, new = tokenizer("", add_special_tokens=True)["input_ids"] + ids[:cut], ids[cut:]
    start, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (before, before + new))
    if start.endswith("\ufffd"):  # the prompt is no text: it ends inside a character
        return
    assert start + decode_after(tokenizer, before, new) == whole
    assert "".join(decode_stream(tokenizer, new, before)) == whole[len(start) :]


def test_stops_may_span_tokens_and_ends_have_no_text():
    tokenizer = build("bytes")
    ids = tokenizer("a harbour, a garden", add_special_tokens=False)["input_ids"]
    decoder = Decoder(tokenizer, stop=["r, a"])
    pieces = []
    for token in ids:
        pieces.append(decoder.push(token))
        if decoder.stopped:
            break
    assert "".join(pieces) + decoder.finish() == "a harbou"
    assert token != ids[-1]
    assert "".join(decode_stream(tokenizer, ids, ends=ids[-1:])) == tokenizer.decode(ids[:-1])
