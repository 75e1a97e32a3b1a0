"""Strings in, strings out: padding, streaming, and characters that span tokens."""

import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kivi_jax as kj
from kivi_jax.generation.loading import load_tokenizer
from kivi_jax.generation.stops import decode_stream
from kivi_jax.generation.text import decode_after, stream_tokens
from kivi_jax.generation.tokens import Tokenizer, encode, pad_prompts
from tests.models import AsciiTokenizer, config, random_llama, stories
from tests.tokenizers import VOCAB, build

PROMPTS = ["Once upon a time", "The cat", "Ünïcödé 日 🙂"]


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token_ids).decode(errors="replace")


class Words:
    """A tokenizer that, like sentencepiece, leaves out the space before the first word."""

    def __call__(self, text):
        raise NotImplementedError

    def decode(self, token_ids, *, skip_special_tokens):
        kept = [token for token in token_ids if not (skip_special_tokens and token == 0)]
        return " ".join(f"w{token}" for token in kept)


@pytest.fixture(scope="module")
def tokenizer(shared):
    return load_tokenizer(shared / "models" / "stories260K")


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=300), min_size=1, max_size=4))
def test_pad_prompts_keeps_every_token(prompts):
    tokens, lengths = pad_prompts(prompts)
    assert [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)] == prompts
    assert not any(row[n:].any() for row, n in zip(tokens, lengths, strict=True))


@given(st.integers(1, 200_000))
def test_pad_prompts_wastes_little(longest):
    width = pad_prompts([range(longest)])[0].shape[1]
    assert longest <= width < longest + max(32, longest / 8 + 1)
    assert width % 32 == 0


def test_similar_lengths_share_a_width():
    """Few programs serve all lengths up to 4096."""
    assert len({pad_prompts([[0] * n])[0].shape[1] for n in range(1, 4097)}) <= 8 + 8 * 4


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "at least one prompt"), ([[1], []], "prompt 1 has no")]
)
def test_pad_prompts_refuses_nothing(prompts, message):
    with pytest.raises(ValueError, match=message):
        pad_prompts(prompts)


def test_one_string_instead_of_a_list_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"got one string: pass \[prompt\]"):
        kj.complete(random_llama(config()), tokenizer, PROMPTS[0], cache=kj.full(), max_new_tokens=1)


@pytest.mark.parametrize("call", [kj.complete, kj.stream])
def test_an_empty_prompt_is_refused(call):
    prompt = [""] if call is kj.complete else ""
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        list(call(random_llama(config()), Bytes(), prompt, cache=kj.full(), max_new_tokens=1))


def test_streaming_no_tokens_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        next(stream_tokens(random_llama(config()), [1], cache=kj.full(), max_new_tokens=0))


@pytest.mark.parametrize(
    ("cache", "sampler"),
    [
        (kj.full(), None),
        pytest.param(
            kj.kivi(2, 8, 32),
            kj.Sample(temperature=0.8, top_k=50, repetition_penalty=1.1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["greedy", "sampled kivi2"],
)
def test_a_stream_joined_is_what_complete_gives(shared, tokenizer, cache, sampler):
    model = stories(shared)
    options = dict(cache=cache, max_new_tokens=32, sampler=sampler)
    keys = jax.random.split(jax.random.key(5), 3)
    texts = kj.complete(model, tokenizer, PROMPTS, key=None if sampler is None else keys, **options)
    assert all(texts)
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        key = None if sampler is None else keys[row : row + 1]
        pieces = list(kj.stream(model, tokenizer, prompt, key=key, **options))
        assert "".join(pieces) == text
        assert len(pieces) > 8


def test_a_stream_ends_where_complete_ends(shared, tokenizer):
    model = stories(shared)
    options = dict(cache=kj.full(), max_new_tokens=32)
    text = kj.complete(model, tokenizer, PROMPTS, **options)[0]
    end = tokenizer(PROMPTS[0] + text)["input_ids"][12]
    tokens = stream_tokens(model, tokenizer(PROMPTS[0])["input_ids"], eos_ids=(end,), **options)
    ids = [token for token, _ in tokens]
    assert ids.index(end) == len(ids) - 1 < 31
    (short, *_) = kj.complete(model, tokenizer, PROMPTS, eos_ids=(end,), **options)
    assert short == tokenizer.decode(ids[:-1], skip_special_tokens=True)  # what ends a row is no text
    assert "".join(kj.stream(model, tokenizer, PROMPTS[0], eos_ids=(end,), **options)) == short


def test_characters_come_whole():
    text = "é 日本 🙂!"
    pieces = list(decode_stream(Bytes(), iter(text.encode())))
    assert pieces == list(text)


def test_bytes_that_are_no_text_come_at_the_end():
    assert "".join(decode_stream(Bytes(), [65, 0xF0, 0x9F])) == "A\ufffd"
    assert "".join(decode_stream(Bytes(), [0xFF, 65, 0xFF, 66])) == "\ufffdA\ufffdB"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_streams_in_whole_characters(text):
    pieces = list(decode_stream(Bytes(), iter(text.encode())))
    assert "".join(pieces) == text
    assert all(pieces)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_spaces_between_words_and_special_tokens_survive(tokens):
    pieces = decode_stream(Words(), tokens)
    assert "".join(pieces) == Words().decode(tokens, skip_special_tokens=True)


def test_the_trained_tokenizer_streams_any_text(tokenizer):
    for text in (*PROMPTS, "  two  spaces\n\nand lines "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(decode_stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_counts_as_a_tokenizer(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(Bytes(), Tokenizer)
    assert not isinstance(functools.partial(str), Tokenizer)


def test_no_tokenizer_files_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}, "trust_remote_code"),
        ({"model_max_length": "long"}, "not supported between"),
    ],
)
def test_a_tokenizer_that_cannot_read_or_is_code_is_refused(tmp_path, monkeypatch, said, message):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    build("bytes").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | said))
    (tmp_path / "code.py").write_text("raise SystemExit('this must not run')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_load_gives_model_and_tokenizer(shared):
    model, tokenizer = kj.load(shared / "models" / "stories260K", dtype="bfloat16")
    assert model.embed.embedding[...].dtype == np.dtype("bfloat16")
    assert tokenizer("Once")["input_ids"][0] == 1


@pytest.mark.parametrize("text", ["moon \ud83d owl", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_what_is_no_unicode_is_one_line(text):
    with pytest.raises(ValueError, match="the text holds what is no Unicode"):
        encode(AsciiTokenizer(), text)


def test_details_of_a_completion():
    """Tokens, why it finished, and log-probabilities: those of the model's own logits."""
    tokenizer = build("bytes")
    model = random_llama(config(vocab_size=VOCAB, num_layers=1))
    options = dict(cache=kj.full(), max_new_tokens=40, log_probs=True)
    sampler = kj.Sample(temperature=0.5, repetition_penalty=1.3)
    outs = kj.completions(
        model, tokenizer, ["hello", "a garden"], sampler=sampler, key=jax.random.key(1), **options
    )
    for prompt, out in zip(("hello", "a garden"), outs, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert (out.prompt_tokens, len(out.tokens), out.finish_reason) == (len(ids), 40, "length")
        logits = jax.nn.log_softmax(model(jnp.asarray([ids + out.tokens]))[0], axis=-1)
        expected = logits[jnp.arange(len(ids) - 1, len(ids) + 39), jnp.asarray(out.tokens)]
        np.testing.assert_allclose(out.log_probs, expected, atol=1e-4)
    end = outs[0].tokens[3]
    (ended,) = kj.completions(
        model, tokenizer, ["hello"], sampler=sampler, key=jax.random.key(1), eos_ids=(end,), **options
    )
    assert (ended.tokens, ended.finish_reason) == (outs[0].tokens[:4], "stop")
    assert ended.text == tokenizer.decode(outs[0].tokens[:3], skip_special_tokens=True)
    assert ended.log_probs == pytest.approx(outs[0].log_probs[:4])


@pytest.mark.parametrize("at", [2, 35])
def test_stop_strings_end_rows(at):
    """In the first burst of the compiled loop and in a later one; and a stream says the same."""
    tokenizer = build("bytes")
    model = random_llama(config(vocab_size=VOCAB, num_layers=1))
    options = dict(cache=kj.full(), max_new_tokens=40)
    prompts = ["hello", "a garden"]
    plain = kj.completions(model, tokenizer, prompts, **options)
    until = tokenizer.decode(plain[0].tokens[: at + 1], skip_special_tokens=True)
    stop = until[-3:]
    expected = until[: until.index(stop)]
    outs = kj.completions(model, tokenizer, prompts, stop=[stop], **options)
    assert outs[0].text == expected
    assert outs[0].finish_reason == "stop"
    assert outs[0].tokens == plain[0].tokens[: len(outs[0].tokens)]
    assert stop in tokenizer.decode(outs[0].tokens, skip_special_tokens=True)
    assert stop not in tokenizer.decode(outs[0].tokens[:-1], skip_special_tokens=True)
    if stop not in plain[1].text:
        assert outs[1] == plain[1]
    assert "".join(kj.stream(model, tokenizer, prompts[0], stop=stop, **options)) == expected


def test_a_first_space_belongs_to_the_completion():
    tokenizer = build("spaced")
    whole = tokenizer("hello there what")["input_ids"]
    cut = len(tokenizer("hello")["input_ids"])
    assert decode_after(tokenizer, whole[:cut], whole[cut:]) == " there what"
