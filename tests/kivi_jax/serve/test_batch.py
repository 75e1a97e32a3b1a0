"""`kivi-jax batch`: OpenAI's lines in, its lines out, in one file that a cut run goes on in."""

import contextlib
import json

import pytest

import kivi_jax as kj
from kivi_jax.commands import serve as commands

from .conftest import CACHE


@pytest.fixture
def batch(engine, monkeypatch, tmp_path, command):
    """The command on the shared engine; `asked` are the lines of its input, `mark` stands for the model."""
    monkeypatch.setattr(commands, "open_engine", lambda *_: contextlib.nullcontext(engine))

    def call(asked, *options, mark="fp_1"):
        monkeypatch.setattr(commands, "fingerprint", lambda *_: mark)
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in asked))
        return command("batch", "tiny", source, "--out", tmp_path / "out.jsonl", *options)

    return call


def line(name, url="/v1/completions", **body):
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": name, "method": "POST", "url": url, "body": asked}


HELLO = [{"role": "user", "content": "hello"}]
LINES = [
    line("text", prompt="hello"),
    line("chat", "/v1/chat/completions", messages=HELLO),
    line("wrong", prompt="hello", temperature=9),
    line("long", prompt="hello", max_tokens=1000),
    line("many", prompt=["a", "b"], n=3, temperature=1.0, seed=3),
]


def answers(path):
    return {found["custom_id"]: found for found in map(json.loads, path.read_text("utf-8").splitlines())}


def test_every_line_is_answered_and_a_cut_run_goes_on(openai, batch, engine, tmp_path):
    out = tmp_path / "out.jsonl"
    code, printed, error = batch(LINES)
    assert (code, printed) == (0, "")
    assert "5 answers in" in error
    assert "2 of them refusals" in error
    found = answers(out)
    assert found.keys() == {asked["custom_id"] for asked in LINES}
    statuses = {name: answer["response"]["status_code"] for name, answer in found.items()}
    assert statuses == {"text": 200, "chat": 200, "wrong": 422, "long": 400, "many": 200}
    assert all(answer["error"] is None for answer in found.values())
    assert len(found["many"]["response"]["body"]["choices"]) == 6
    reply = openai.types.chat.ChatCompletion.model_validate(found["chat"]["response"]["body"])
    (alone,) = kj.complete(engine.model, engine.tokenizer, HELLO, cache=CACHE, max_new_tokens=4)
    assert (reply.choices[0].message.content, reply.system_fingerprint) == (alone, "fp_1")
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # cut in the middle of the third
    before = engine.stats().requests
    assert batch(LINES)[0] == 0
    assert out.read_bytes().splitlines()[:2] == whole.splitlines()[:2]
    assert answers(out).keys() == found.keys()
    rows = {"text": 1, "chat": 1, "many": 6}  # what is refused has none
    kept = [json.loads(line)["custom_id"] for line in lines[:2]]
    assert engine.stats().requests - before == sum(rows.values()) - sum(rows.get(name, 0) for name in kept)
    again = out.read_bytes()
    assert batch(LINES)[0] == 0
    assert out.read_bytes() == again


def test_what_was_computed_otherwise_is_not_gone_on_with(batch, tmp_path):
    assert batch(LINES[:1])[0] == 0
    for asked, mark in [(LINES[:1], "fp_2"), ([line("text", prompt="other")], "fp_1")]:
        code, _, error = batch(asked, mark=mark)
        assert (code, "out.jsonl holds an answer for 'text' that is to another request" in error) == (
            2,
            True,
        )


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("precious", "is not what a cut run left"),
        ('{"precious": 1}\n', "holds what is no answer of a batch"),
        ("[]\n", "holds what is no answer of a batch"),
    ],
)
def test_nothing_of_others_is_replaced(batch, tmp_path, held, message):
    (tmp_path / "out.jsonl").write_text(held)
    code, _, error = batch(LINES[:1])
    assert (code, message in error, error.count("\n")) == (2, True, 1)
    assert (tmp_path / "out.jsonl").read_text() == held


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": "hello"}, "row 1 is no request of a batch: it must have custom_id, method POST"),
        (line("a", "/v1/embeddings"), "row 1 asks '/v1/embeddings': only"),
        (line("a", prompt="a", model="gpt-4o"), "row 1 asks for the model 'gpt-4o', not 'tiny'"),
        (line("a", prompt="a", stream=True), "row 1 wants a stream"),
    ],
)
def test_lines_that_are_no_requests_are_refused_before_anything_is_computed(batch, tmp_path, asked, message):
    code, _, error = batch([asked])
    assert (code, message in error, error.count("\n")) == (2, True, 1)
    assert not (tmp_path / "out.jsonl").exists()


def test_mistakes_of_the_command_line_are_one_line(batch, command, monkeypatch, tmp_path):
    assert "has the custom_id text twice" in batch([LINES[0], LINES[0]])[2]
    assert batch([line("a", prompt="a", model="gpt-4o")], "--name", "gpt-4o")[0] == 0
    source = tmp_path / "in.jsonl"
    code, _, error = command("batch", "gpt-4o", source, "--out", source)
    assert (code, "is the file of requests: choose another" in error) == (2, True)
    code, _, error = command("batch", "gpt-4o", source, "--out", tmp_path)
    assert (code, "is a directory: name a file in it" in error) == (2, True)
    code, _, error = command("batch", "gpt-4o", tmp_path / "none", "--out", tmp_path / "out")
    assert (code, "is no file of requests" in error) == (2, True)
    monkeypatch.setattr(commands, "NEEDED", ("starlette", "nowhere"))
    code, _, error = command("serve", "demo")
    assert (code, error.count("\n")) == (2, 1)
    assert "kivi-jax serve needs nowhere: pip install 'kivi-jax[serve]'" in error


def test_slots_and_memory_exclude_each_other(command):
    code, _, error = command("serve", "demo", "--slots", "2", "--memory", "1GiB", "--port", "0")
    assert (code, "--slots and --memory both say how many rows there are" in error) == (2, True)
