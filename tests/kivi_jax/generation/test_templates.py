"""Texts and conversations become the tokens that they have as one text, cut in two or not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kivi_jax as kj
from kivi_jax.generation.templates import encode_conversation, open_turn, user_turn, write
from kivi_jax.generation.text import as_batch, encode_prompt
from kivi_jax.generation.tokens import encode, encode_after, encode_as_is, ending_ids
from tests.models import AsciiTokenizer, config, random_llama
from tests.tokenizers import TEMPLATES, TEXTS, VOCAB, build

DOCUMENT, QUESTION = " The old sailor told us. ", " what is there?"
KINDS = ("spaced", "bytes")


def small():
    return random_llama(config(vocab_size=VOCAB, num_layers=1))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)  # the first builds the tokenizer
@given(st.sampled_from(TEXTS), st.data())
def test_a_text_that_follows_is_spelled_as_in_one_text(kind, text, data):
    """Wherever the tokenizer allows it: where the whole begins with the tokens of its beginning."""
    tokenizer = build(kind)
    cut = data.draw(st.integers(1, len(text)))
    before, whole = encode(tokenizer, text[:cut]), encode(tokenizer, text)
    new = encode_after(tokenizer, before, text[cut:])
    if whole[: len(before)] == before:
        assert before + new == whole
    assert tokenizer.decode(before + new, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_turn_in_two_parts_is_the_turn(kind, template):
    tokenizer = build(kind, template)
    model = small()
    prefix = kj.read_prefix(model, tokenizer, user_turn(DOCUMENT), cache=kj.full())
    assert prefix.turn
    read = encode_as_is(tokenizer, open_turn(tokenizer, user_turn(DOCUMENT)))
    whole = encode_conversation(tokenizer, user_turn(DOCUMENT + QUESTION))
    for question in (QUESTION, user_turn(QUESTION)):
        assert read + encode_prompt(tokenizer, question, prefix) == whole
    later = [*user_turn(QUESTION), {"role": "assistant", "content": "a"}, *user_turn("b")]
    joint = [*user_turn(DOCUMENT + QUESTION), *later[1:]]
    assert read + encode_prompt(tokenizer, later, prefix) == encode_conversation(tokenizer, joint)


def test_reading_once_says_what_the_whole_conversation_does(tmp_path):
    """In memory and from a file; the full cache does not mind whether a question is inside the prompt."""
    tokenizer, model = build("spaced", "llama2"), small()
    options = dict(max_new_tokens=4)
    asked = user_turn(DOCUMENT + QUESTION, "be brief")
    wanted = kj.completions(model, tokenizer, asked, cache=kj.full(), **options)[0]
    prefix = kj.read_prefix(model, tokenizer, user_turn(DOCUMENT, "be brief"), cache=kj.full())
    kj.save_prefix(tmp_path / "document", prefix, model)
    for held in (prefix, kj.load_prefix(tmp_path / "document", model)):
        found = kj.completions(model, tokenizer, [QUESTION, ""], prefix=held, **options)[0]
        assert (found.text, found.tokens) == (wanted.text, wanted.tokens)


def test_a_conversation_is_one_prompt_and_a_batch_holds_several():
    tokenizer, model = build("bytes", "llama3"), small()
    one, two = user_turn("hello", "be brief"), user_turn("what is there?")
    options = dict(cache=kj.full(), max_new_tokens=4)
    (alone,) = kj.complete(model, tokenizer, one, **options)
    assert kj.complete(model, tokenizer, [one, two], **options)[0] == alone
    written = write(tokenizer, one)
    assert kj.complete(model, tokenizer, [written], **options) == [alone]
    assert "".join(kj.stream(model, tokenizer, one, **options)) == alone
    assert as_batch(one) == [one]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[{"role": "user"}]], "a message is a dict of the strings role and content, got"),
        (
            [[{"role": "user", "content": [{"type": "text", "text": "a"}]}]],
            "content is one text, not parts of it",
        ),
        ([user_turn("a"), "b"], "a prefix is of texts or of conversations"),
        ([[]], "at least one message"),
    ],
)
def test_what_is_no_conversation_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        kj.read_prefix(small(), build("bytes", "chatml"), prompts, cache=kj.full())


def test_a_conversation_needs_a_template_and_an_open_turn():
    model, plain, templated = small(), build("bytes"), build("bytes", "chatml")
    with pytest.raises(ValueError, match="no chat template"):
        kj.complete(model, plain, user_turn("a"), cache=kj.full(), max_new_tokens=1)
    prefix = kj.read_prefix(model, templated, ["a"], cache=kj.full())
    with pytest.raises(ValueError, match="the prefix is plain text, which no conversation can follow"):
        kj.complete(model, templated, user_turn("a"), prefix=prefix, max_new_tokens=1)


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{{ 'a' + 1 }}", "{% for i in range(10**12) %}{% endfor %}", "{% for", 3]
)
def test_whatever_a_template_raises_is_one_sentence(monkeypatch, template):
    tokenizer = build("bytes", "chatml")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="the tokenizer's chat template refuses the conversation: "):
        write(tokenizer, user_turn("a"))


def test_a_template_that_hides_messages_cannot_be_cut():
    tokenizer = build("bytes", "chatml")
    tokenizer.chat_template = "{{ messages[0].content.upper() }}{{ messages | length }}"
    try:
        assert open_turn(tokenizer, user_turn("a")) == "A"
        tokenizer.chat_template = "{{ messages | length }}"
        with pytest.raises(ValueError, match="does not show messages as they are"):
            open_turn(tokenizer, user_turn("a"))
    finally:
        tokenizer.chat_template = TEMPLATES["chatml"]


def test_whatever_a_template_raises_is_a_refusal(monkeypatch):
    tokenizer = build("bytes", "chatml")
    for template in (
        "{{ 1 + messages[0].content }}",
        "{{ raise_exception('no') }}",
        "{{ tools[0].none.none }}",
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(ValueError, match="the tokenizer's chat template refuses the conversation: "):
            write(tokenizer, user_turn("a"), tools=[{"type": "function"}])


def test_text_that_begins_with_the_begin_token_gets_no_other():
    tokenizer = build("spaced")
    assert encode(tokenizer, "<s> hello").count(1) == encode(tokenizer, "hello").count(1) == 1


def test_a_text_ends_at_the_models_or_the_tokenizers_end():
    tokenizer = build("bytes")
    end = tokenizer.eos_token_id
    assert ending_ids(config(eos_ids=(end, 7)), tokenizer) == (end, 7)
    assert ending_ids(config(eos_ids=(7,)), tokenizer) == (7, end)
    assert ending_ids(config(eos_ids=(7,)), AsciiTokenizer()) == (7,)
    assert ending_ids(config(eos_ids=(-1, 7, 10**6)), None) == (7,)  # others are never drawn
