"""A chat: the same tokens as one long prompt read token by token, within the memory planned."""

import io
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from kivi_jax.generation.chat import Chat
from kivi_jax.generation.prefix import prefill
from kivi_jax.generation.tokens import pad_prompts
from kivi_jax.plan.memory import plan_cache
from tests.models import AsciiTokenizer, config, random_llama
from tests.tokenizers import TEMPLATES, VOCAB, build

CONTEXT, TURNS, NEW = 512, 20, 6
CACHES = {
    "kivi2": kj.kivi(2, 8, 16),
    "kivi2+scope": kj.kivi(
        2, 8, 16, prompt=kj.SnapKV(budget=24, window=4), decode=kj.Slide(window=24, recent=8)
    ),
}


def model_with(**fields):
    return random_llama(config(**(dict(vocab_size=256, num_layers=1) | fields)))


def messages():
    rng = np.random.default_rng(0)
    return [f"turn {turn}" + "?" * int(rng.integers(0, 9)) for turn in range(TURNS)]


@pytest.mark.parametrize("name", CACHES)
def test_20_turns_say_what_one_long_prompt_would(name):
    """The oracle reads the conversation once: its first turn as a prompt, then one token after the other."""
    model = model_with()
    chat = Chat(model, AsciiTokenizer(), cache=CACHES[name], context=CONTEXT)
    replied, planned = [], None  # spans of replies
    for message in messages():
        reply = list(chat.reply(message, max_new_tokens=NEW))
        replied.append((len(chat.tokens) - len(reply), len(chat.tokens)))
        assert len(reply) == NEW
        planned = planned or plan_cache(
            model.config, CACHES[name], batch=1, context=CONTEXT, prompt_tokens=32, dtype="float32"
        )
        assert kj.cache_bytes(chat.prefix.cache) == planned

    first = replied[0][0]
    tokens, lengths = (jnp.asarray(x) for x in pad_prompts([chat.tokens[:first]]))
    logits, cache = model.prefill(tokens, lengths, cache=CACHES[name], capacity=CONTEXT)
    next_tokens = {first: int(logits.argmax())}
    for position, token in enumerate(chat.tokens[first:], start=first):
        logits, cache = model.decode(jnp.asarray([token], jnp.int32), cache)
        next_tokens[position + 1] = int(logits.argmax())
    for begin, end in replied:
        assert chat.tokens[begin:end] == [next_tokens[position] for position in range(begin, end)]


@pytest.mark.parametrize(
    ("name", "kind", "template"),
    [
        *(("full", "spaced", template) for template in TEMPLATES),
        *(pytest.param("full", "bytes", template, marks=pytest.mark.slow) for template in TEMPLATES),
        pytest.param("kivi2", "spaced", "llama2", marks=pytest.mark.slow),
    ],
)
def test_a_conversations_tokens_are_its_templates(name, kind, template):
    """And each reply is what a new conversation of these messages is told: nothing stale was attended to."""
    tokenizer = build(kind, template)
    model = model_with(vocab_size=VOCAB)
    cache = kj.full() if name == "full" else CACHES[name]
    chat = Chat(model, tokenizer, cache=cache, context=512)
    for message in ("hello there", " what is it? ", "[INST]"):
        reply = list(chat.reply(message, max_new_tokens=NEW))
        asked = chat.messages[:-1]
        assert asked[-1] == {"role": "user", "content": message}
        wanted = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert chat.tokens == wanted + reply
        assert chat.prefix.cache.lengths.tolist() == [len(chat.tokens) - 1]
        if name == "full":
            out = kj.completions(model, tokenizer, asked, cache=cache, max_new_tokens=NEW)[0]
            assert reply == out.tokens
            assert chat.messages[-1]["content"] == out.text
    assert len(chat.messages) == 6


def replying(tokenizer, *texts):
    """In the place of `stream_after`: a model that gives these replies, whatever it is asked."""
    replies = iter(texts)

    def after(model, start, *, eos_ids, **options):
        ids = tokenizer(next(replies), add_special_tokens=False)["input_ids"]
        cache = start.cache
        for token in ids:
            yield token, cache
            _, cache = model.decode(jnp.asarray([token], jnp.int32), cache)
        yield eos_ids[0], cache

    return after


@pytest.mark.parametrize(("template", "again"), [("chatml", 0), ("llama2", 0), ("forgetful", 2)])
def test_only_what_the_template_writes_anew_is_read_again(template, again, monkeypatch):
    """Replies as models spell them: their turns are appended, however the template ends and begins turns."""
    tokenizer = build("spaced", template)
    model = model_with(vocab_size=VOCAB, eos_ids=(2,))
    reads = []
    monkeypatch.setattr(
        "kivi_jax.generation.chat.prefill", lambda *a, **k: reads.append(a) or prefill(*a, **k)
    )
    said = ("the harbour", "a garden", "a bridge")
    monkeypatch.setattr("kivi_jax.generation.chat.stream_after", replying(tokenizer, *said))
    chat = Chat(model, tokenizer, cache=CACHES["kivi2"], context=512)
    for message in ("hello there", "what is it?", "and then?"):
        list(chat.reply(message, max_new_tokens=NEW))
    assert len(reads) == 1 + again
    assert [message["content"].strip() for message in chat.messages[1::2]] == list(said)


def test_a_reply_may_be_stopped():
    """What was given until then is the reply, and the conversation goes on."""
    tokenizer = build("bytes", "chatml")
    model = model_with(vocab_size=VOCAB)
    chat = Chat(model, tokenizer, cache=CACHES["kivi2"], context=512, system="say little")
    tokens = chat.reply("hello", max_new_tokens=NEW)
    heard = [next(tokens), next(tokens)]
    tokens.close()
    assert chat.tokens[-2:] == heard
    list(chat.reply("go on", max_new_tokens=2))
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    wanted = tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, return_dict=False)
    assert chat.tokens[:-2] == wanted
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_what_a_template_refuses_leaves_the_conversation_as_it_was():
    tokenizer = build("bytes", "mistral")
    model = model_with(vocab_size=VOCAB)
    chat = Chat(model, tokenizer, cache=kj.full(), context=64, system="be brief")
    with pytest.raises(ValueError, match="refuses the conversation: only user and assistant take turns"):
        list(chat.reply("hello", max_new_tokens=1))
    assert chat.tokens == []
    with pytest.raises(ValueError, match="no chat template, which a system message needs"):
        Chat(model, build("bytes"), cache=kj.full(), context=64, system="be brief")


def test_plain_text_stands_on_a_line_of_its_own():
    tokenizer = build("spaced")
    model = model_with(vocab_size=VOCAB)
    chat = Chat(model, tokenizer, cache=kj.full(), context=128)
    first = list(chat.reply("hello there", max_new_tokens=3))
    assert chat.tokens == tokenizer("hello there")["input_ids"] + first
    second = list(chat.reply("what is", max_new_tokens=3))
    new = chat.tokens[len(tokenizer("hello there")["input_ids"]) + 3 : -3]
    assert tokenizer.convert_ids_to_tokens(new)[0] == "<0x0A>"  # no space before it
    assert second == chat.tokens[-3:]


def test_a_full_context_says_what_to_do():
    chat = Chat(model_with(), AsciiTokenizer(), cache=kj.full(), context=20)
    assert len(list(chat.reply("0123456789", max_new_tokens=99))) == 10  # cut where the context ends
    held = list(chat.tokens)
    with pytest.raises(
        ValueError, match=r"has 20 tokens and the message 2, .* of 20: reset .* larger context"
    ):
        list(chat.reply("?", max_new_tokens=1))
    assert chat.tokens == held
    chat.reset()
    assert len(list(chat.reply("0123456789", max_new_tokens=4))) == 4


def test_chat_in_the_terminal(command, monkeypatch):
    lines = "/stats\nhello\n\n/stats\nabc\n/nope\n" + "long " * 20 + "\n/reset\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr("kivi_jax.generation.loading.open_model", lambda *_: (model_with(), AsciiTokenizer()))
    options = ("--context", "64", "--max-new-tokens", "5", "--cache", "full")
    code, out, error = command("chat", "demo", *options)
    assert code == 0
    assert [len(line) for line in out.splitlines()] == [5, 5]
    notes = error.splitlines()
    assert notes[0].startswith("full cache, up to 64 tokens; /stats")
    assert notes[1] == notes[-1] == "nothing yet, of 64 tokens"
    assert notes[2] == notes[4] == "cut at --max-new-tokens"
    assert re.fullmatch(
        r"10 of 64 tokens · cache [\d.]+ KiB, full cache [\d.]+ KiB \(1.00x smaller\)", notes[3]
    )
    assert notes[5].startswith("there is no /nope: /stats")
    assert notes[6].startswith("error: the conversation has 19 tokens and the message 100")
    assert len(notes) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens=0 must be at least 1"),
        (("--context", "0"), "context=0 must be positive"),
        (("--cache", "kivi3"), "unknown cache 'kivi3'"),
    ],
)
def test_a_mistake_is_one_line(command, options, message):
    code, out, error = command("chat", "demo", *options)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error
