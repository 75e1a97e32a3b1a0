"""A chat: the same tokens as one long prompt read token by token, within the memory planned."""

import io
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from kivi_jax.generation.chat import Chat, turn_tokens
from kivi_jax.generation.text import pad_prompts
from kivi_jax.plan.memory import plan_cache
from tests.models import AsciiTokenizer, config, random_llama

END = 3
CONTEXT, TURNS, NEW = 512, 20, 6
CACHES = {
    "kivi2": kj.kivi(2, 8, 16),
    "kivi2+scope": kj.kivi(
        2, 8, 16, prompt=kj.SnapKV(budget=24, window=4), decode=kj.Slide(window=24, recent=8)
    ),
}


class Templated(AsciiTokenizer):
    """A tokenizer with a chat template; END ends every turn."""

    chat_template = "yes"

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}{chr(END)}" for turn in turns) + "<assistant>"


def model_with(**fields):
    return random_llama(config(vocab_size=256, num_layers=1, **fields))


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


def test_turns_join_as_the_template_writes_them():
    """Whether a reply ends by itself or is cut, the template's end of turn stands there once."""
    endless = model_with()
    ending = model_with(eos_ids=(END,))
    tokenizer = Templated()
    for model in (endless, ending):
        chat = Chat(model, tokenizer, cache=kj.full(), context=128)
        written = []
        for message in ("one", "two"):
            written += tokenizer(f"<user>{message}{chr(END)}<assistant>")["input_ids"]
            reply = list(chat.reply(message, max_new_tokens=3))
            assert chat.tokens == written + reply
            chat.tokens[-1] = reply[-1] = (
                END if model is ending else reply[-1]
            )  # as if it had ended by itself
            written += reply if model is ending else [*reply, END]


def test_plain_text_is_read_as_it_is():
    tokenizer = AsciiTokenizer()
    assert turn_tokens(tokenizer, "one", first=True) == list(b"one")
    assert turn_tokens(tokenizer, "two", first=False) == list(b"\ntwo")


def test_a_template_without_replies_is_refused():
    class Forgetful(Templated):
        def apply_chat_template(self, turns, **options):
            return super().apply_chat_template(turns[-1:], **options)

    with pytest.raises(ValueError, match="template leaves replies out"):
        turn_tokens(Forgetful(), "two", first=False)


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
    assert re.fullmatch(
        r"10 of 64 tokens · cache [\d.]+ KiB, full cache [\d.]+ KiB \(1.00x smaller\)", notes[2]
    )
    assert notes[3].startswith("there is no /nope: /stats")
    assert notes[4].startswith("error: the conversation has 19 tokens and the message 100")
    assert len(notes) == 6


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
