"""`kivi-jax generate`, `cache save` and `chat` with an instruct model."""

import dataclasses
import io
import itertools
import json
import signal
import sys

import jax
import pytest

import kivi_jax as kj
from kivi_jax.checks import warn_once
from kivi_jax.commands.hints import FIRST_TOKEN, say_once
from kivi_jax.console import accept_all_text
from kivi_jax.generation.stops import Decoder
from kivi_jax.generation.templates import encode_conversation
from tests.models import config, random_llama
from tests.tokenizers import VOCAB, build

FULL = ("--cache", "full", "--max-new-tokens", "6")
HINT = "plain text for a model that has a chat template"


@pytest.fixture
def instruct(monkeypatch):
    """The model that every command opens, and its tokenizer, which has a chat template."""
    model = random_llama(config(vocab_size=VOCAB, num_layers=1, max_position_embeddings=512))
    tokenizer = build("bytes", "chatml")
    monkeypatch.setattr("kivi_jax.generation.loading.open_model", lambda *_: (model, tokenizer))
    warn_once.cache_clear()
    say_once.cache_clear()
    return model, tokenizer


def user(text, system=None):
    said = [] if system is None else [{"role": "system", "content": system}]
    return [*said, {"role": "user", "content": text}]


def answered(instruct, prompt, **options):
    return kj.completions(*instruct, [prompt], **(dict(cache="full", max_new_tokens=6) | options))[0]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (("--chat",), user("hello")),
        (("--system", "be brief"), user("hello", "be brief")),
        ((), "hello"),
    ],
)
def test_a_text_is_a_message_where_that_is_asked_for(command, instruct, options, prompt):
    code, out, error = command("generate", "demo", "hello", *FULL, *options)
    assert (code, out) == (0, answered(instruct, prompt).text + "\n")
    assert "cut at --max-new-tokens" in error
    assert (HINT in error) == (prompt == "hello")


def test_a_text_ends_at_a_stop_string_and_is_json(command, instruct):
    whole = answered(instruct, user("hello"))
    stop = whole.text[2:4]
    ended = answered(instruct, user("hello"), stop=[stop])
    code, out, error = command("generate", "demo", "hello", *FULL, "--chat", "--stop", stop, "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert found["text"] == ended.text
    assert found["tokens"] == ended.tokens
    assert (found["finish_reason"], found["prompt_tokens"]) == ("stop", ended.prompt_tokens)
    assert found["cache_bytes"] == found["full_cache_bytes"] > 0
    assert found["seconds_to_first_token"] > 0
    _, _, error = command(
        "generate", "demo", "hello", *FULL, "--chat", "--stop", whole.text[:1], "--stop", "\\n"
    )
    assert "hint: a --stop has a backslash and an n" in error
    assert "1 new tokens" in error
    assert FIRST_TOKEN not in error


def test_what_ends_at_its_first_token_is_said_to(command, instruct, monkeypatch, caplog):
    first = answered(instruct, "hello").tokens[0]
    ending = dataclasses.replace(instruct[0].config, eos_ids=(first,))
    monkeypatch.setattr(instruct[0], "config", ending)
    code, out, error = command("generate", "demo", "hello", *FULL)
    assert (code, out) == (0, "\n")
    assert error.endswith(f"{FIRST_TOKEN}\n")
    assert answered(instruct, "hello").text == "".join(
        kj.stream(*instruct, "hello", cache="full", max_new_tokens=6)
    )
    assert [record.getMessage()[:32] for record in caplog.records] == ["a text ended at its first token,"]


def test_a_document_in_a_chat_is_read_once_and_asked_often(command, instruct, tmp_path):
    file, saved = tmp_path / "novel.txt", tmp_path / "novel.prefix"
    file.write_text("it was a dark night.")
    options = ("--cache", "full", "--system", "be brief")
    code, _, error = command("cache", "save", "demo", file, saved, *options)
    assert code == 0
    assert "a conversation, whose user goes on" in error
    whole = user("it was a dark night. who?", "be brief")
    code, out, _ = command("generate", "demo", " who?", "--prefix", saved, "--max-new-tokens", "6")
    assert (code, out) == (0, answered(instruct, whole).text + "\n")
    code, _, error = command("generate", "demo", " who?", "--prefix", saved, "--system", "be brief")
    assert (code, "the prefix begins the conversation" in error) == (2, True)


def test_a_file_of_prompts_is_answered_and_goes_on_where_it_was_cut(command, instruct, tmp_path):
    asked, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "hello"}, {"id": "b", "messages": user("what is it?")}, {"prompt": "a garden"}]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--input", asked, "--output", answers, *FULL, "--temperature=1", "--seed=3", "--batch=2")
    code, out, error = command("generate", "demo", *options)
    assert (code, out) == (0, "")
    assert f"3 answers in {answers}" in error
    settings, *records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert settings["settings"]["seed"] == 3
    found = {record["id"]: record for record in records}
    prompts = {"0": "hello", "b": rows[1]["messages"], "2": "a garden"}
    for number, (name, prompt) in enumerate(prompts.items()):
        keys = jax.random.fold_in(jax.random.key(3), number)[None]
        expected = answered(instruct, prompt, sampler=kj.Sample(temperature=1.0), key=keys)
        assert found[name] == {
            "id": name,
            "text": expected.text,
            "finish_reason": expected.finish_reason,
            "prompt_tokens": expected.prompt_tokens,
            "new_tokens": len(expected.tokens),
        }
    whole = answers.read_bytes()
    answers.write_bytes(whole[: whole.rindex(b'{"id"') + 9])  # cut in the middle of the last one
    assert command("generate", "demo", *options)[0] == 0
    assert answers.read_bytes() == whole
    code, _, error = command("generate", "demo", *options, "--seed", "4")
    assert code == 2
    assert "was computed with seed=3, not 4: choose another place" in error


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("prompts.jsonl", "is the file of prompts: choose another"),
        ("link.jsonl", "is the file of prompts: choose another"),
        (".", "is a directory: name a file in it"),
        ("other.json", "does not begin with settings: kivi-jax did not write it"),
    ],
)
def test_answers_replace_nothing(command, instruct, tmp_path, output, message):
    asked = tmp_path / "prompts.jsonl"
    asked.write_text('{"prompt": "hello"}')  # without a line's end, as many programs write
    (tmp_path / "link.jsonl").symlink_to(asked)
    (tmp_path / "other.json").write_text('{"precious": 1}')
    code, _, error = command("generate", "demo", "--input", asked, "--output", tmp_path / output, *FULL)
    assert (code, message in error) == (2, True)
    assert asked.read_text() == '{"prompt": "hello"}'
    assert (tmp_path / "other.json").read_text() == '{"precious": 1}'


def test_prompts_that_ask_nothing_or_twice_are_refused(command, instruct, tmp_path):
    asked = tmp_path / "prompts.jsonl"
    options = ("--input", asked, "--output", tmp_path / "answers.jsonl", *FULL)
    code, _, error = command("generate", "demo", *options)
    assert (code, "is no file of prompts" in error) == (2, True)
    asked.write_text('{"prompt": "hello", "messages": []}\n')
    code, _, error = command("generate", "demo", *options)
    assert (code, "row 1 has both a prompt and messages: keep one" in error) == (2, True)


@pytest.fixture
def asked(instruct, monkeypatch):
    """What a file of prompts asks, batch by batch, as text; nothing is computed."""
    batches = []

    def answer(model, tokenizer, prompts, **options):
        batches.append([tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts])
        return [kj.Completion("yes", [1], "stop", len(ids)) for ids in prompts]

    monkeypatch.setattr("kivi_jax.commands.answers.complete_tokens", answer)
    return batches


def write_rows(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--input", file, "--output", file.with_name("answers.jsonl"), *FULL)


def test_no_more_rows_are_computed_than_there_are(command, asked, tmp_path):
    options = write_rows(tmp_path / "in.jsonl", *[{"prompt": word} for word in ("a", "b", "hello " * 40)])
    assert command("generate", "demo", *options, "--batch", "1000")[0] == 0
    assert [len(batch) for batch in asked] == [1, 2]


def test_the_system_speaks_before_messages(command, asked, tmp_path):
    rows = ({"messages": user("hello"), "prompt": None}, {"prompt": "hello", "messages": None, "id": None})
    options = write_rows(tmp_path / "in.jsonl", *rows)  # tables have all columns in all rows
    assert command("generate", "demo", *options, "--system", "be brief")[0] == 0
    assert len(set(asked[0])) == 1
    assert "system\nbe brief" in asked[0][0]
    options = write_rows(tmp_path / "two.jsonl", {"prompt": "a"}, {"messages": user("hello", "be long")})
    code, _, error = command("generate", "demo", *options, "--system", "be brief")
    assert (code, error.count("\n")) == (2, 1)
    assert "two.jsonl: row 2 has a system message: leave it out there" in error


def test_what_was_written_anew_at_its_path_is_another(command, asked, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    options = write_rows(tmp_path / "in.jsonl", {"prompt": "a"})
    assert command("generate", model, *options)[0] == 0
    assert command("generate", model, *options, "--dtype", "float32")[0] == 0  # as without --dtype here
    assert "dtype='float32', not 'bfloat16'" in command("generate", model, *options, "--dtype", "bfloat16")[2]
    (model / "tokenizer_config.json").write_text("{}")
    code, _, error = command("generate", model, *options)
    assert (code, error.count("\n")) == (2, 1)
    assert "answers.jsonl was computed with other contents of its model: choose another place" in error
    write_rows(tmp_path / "in.jsonl", {"prompt": "b"})
    assert "other contents of its input, model:" in command("generate", model, *options)[2]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("in.jsonl", "in.jsonl holds no rows"),
        ("-", "- is no file of prompts: pass one"),
        ("a/b", "a/b is no"),
    ],
)
def test_nothing_is_written_for_what_asks_nothing(command, asked, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl")
    code, _, error = command("generate", "demo", "--input", source, "--output", "answers.jsonl", *FULL)
    assert (code, message in error, error.count("\n")) == (2, True, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_empty_prompt_is_refused_by_its_row_before_others_are_computed(
    command, asked, tmp_path, monkeypatch
):
    letters = "kivi_jax.commands.answers.encode_prompt"  # of a tokenizer that begins no text with a token
    monkeypatch.setattr(letters, lambda tokenizer, prompt, prefix: [3] * len(prompt))
    options = write_rows(tmp_path / "in.jsonl", {"prompt": "hello"}, {"prompt": ""})
    code, _, error = command("generate", "demo", *options)
    assert (code, "in.jsonl: row 2 has a prompt without tokens" in error, asked) == (2, True, [])


def test_what_rows_cannot_choose_is_said(command, asked, tmp_path):
    row = {"prompt": "hello", "max_new_tokens": 3, "stop": ["x"], "answer": "1"}
    code, _, error = command("generate", "demo", *write_rows(tmp_path / "in.jsonl", row))
    assert (code, "hint: max_new_tokens, stop in rows of" in error) == (0, True)


def test_a_prefix_does_not_take_the_place_of_where_one_stands(command, instruct, tmp_path, monkeypatch):
    """`demo` is no folder here, so nothing can be in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    code, _, error = command("cache", "save", "demo", "text.txt", ".", "--overwrite")
    assert (code, f"as {tmp_path} is in it" in error or "as text.txt is in it" in error) == (2, True)


def test_bytes_that_are_no_text_do_not_end_a_chat(command, instruct, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"hello \xff\n/stats\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    accept_all_text()
    code, _, error = command("chat", "demo", *FULL, "--context", "128")
    _, refused, stats = error.splitlines()
    assert (code, "error: the text holds what is no Unicode" in refused) == (0, True)
    assert stats.startswith("nothing yet")


def test_a_reply_that_the_context_cuts_is_said_to_be(command, instruct, monkeypatch):
    context = len(encode_conversation(instruct[1], user("hello"))) + 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    code, _, error = command("chat", "demo", *FULL, "--context", context)
    assert (code, error.splitlines()[1:]) == (
        0,
        ["cut where the context ends: /reset, or start with a larger --context"],
    )


def test_ctrl_c_stops_a_reply_and_not_the_chat(command, instruct, monkeypatch):
    """The second token of the first reply is answered by a signal."""
    push, pushed = Decoder.push, itertools.count()

    def interrupting(self, token):
        if next(pushed) == 1:
            signal.raise_signal(signal.SIGINT)
        return push(self, token)

    monkeypatch.setattr(Decoder, "push", interrupting)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/stats\ngo on\n"))
    code, _, error = command("chat", "demo", *FULL, "--context", "128", "--system", "be brief")
    assert code == 0
    _, stopped, stats, cut = error.splitlines()
    assert stopped == "stopped"
    asked = encode_conversation(instruct[1], user("hello", "be brief"))
    assert stats.startswith(f"{len(asked) + 2} of 128 tokens")
    assert cut == "cut at --max-new-tokens"
    assert signal.getsignal(signal.SIGINT) is not None


def test_more_tokens_than_positions_are_said_once(command, instruct, caplog):
    model, tokenizer = instruct
    kj.complete(model, tokenizer, ["hello"], cache="full", max_new_tokens=6)
    assert not caplog.records
    kj.Chat(model, tokenizer, cache="full", context=513)
    kj.Chat(model, tokenizer, cache="full", context=514)
    assert [record.getMessage()[:52] for record in caplog.records] == [
        "rows may become longer than the 512 tokens that the "
    ]
    code, out, _ = command("inspect", "llama-1b", "--context", "200000", "--cache", "kivi2", "--json")
    assert code == 0
    assert len(caplog.records) == 2
    plan = json.loads(out)
    assert (plan["context"], list(plan["caches"])) == (200000, ["kivi2"])
    assert plan["caches"]["kivi2"]["total"] > plan["caches"]["kivi2"]["packed"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "pass either a prompt or --input"),
        (("hello", "--input", "x.jsonl"), "pass either a prompt or --input"),
        (("--input", "x.jsonl"), "--input needs --output"),
        (("hello", "--output", "x.jsonl"), "--input needs --output"),
        (("hello", "--stop", ""), "stop strings must be strings with at least one character"),
        (("--input", "x.jsonl", "--output", "y.jsonl"), "row 1 has neither a text prompt nor a list"),
    ],
)
def test_a_mistake_is_one_line(command, instruct, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"question": "?"}\n')
    code, out, error = command("generate", "demo", *options)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error
