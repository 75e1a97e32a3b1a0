"""`kivi-jax eval`: predictions that survive a cut, and what the report says of them."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kivi_jax.eval import generating
from kivi_jax.eval.jobs import read_records
from tests.convert.checkpoints import LLAMA, write_checkpoint
from tests.models import config, random_llama
from tests.tokenizers import VOCAB, build

pytest.importorskip("matplotlib", reason="plots need the extra eval")

CACHES = ("full", "kivi2:group_size=8:residual_length=8")


@pytest.fixture
def command(command):
    """`kivi-jax eval` in this process."""
    return functools.partial(command, "eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = LLAMA | dict(eos_token_id=None, num_hidden_layers=1)
    return write_checkpoint(tmp_path_factory.mktemp("eval") / "model", config, tokens=61)


@pytest.fixture
def computed(monkeypatch):
    """The prompts that were continued in this process."""
    prompts = []
    original = generating.continue_prompts

    def counting(model, batch, **options):
        prompts.extend(batch)
        return original(model, batch, **options)

    monkeypatch.setattr(generating, "continue_prompts", counting)
    return prompts


def needle(model, out):
    options = [option for cache in CACHES for option in ("--cache", cache)]
    lengths = ("--length", 60, "--length", 64)  # of one padded width
    return ("needle", "--model", model, "--out", out, *lengths, "--depths", 3, "--batch", 2, *options)


def test_an_evaluation_cut_off_is_finished_with_the_same_predictions(command, model, tmp_path, computed):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, _ = command(*needle(model, whole))
    assert code == 0
    names = [f"{cache.replace(':', ',')}.jsonl" for cache in CACHES]
    for name in names:  # the first in the middle of a line, the second before its first record
        data = (whole / "needle" / name).read_bytes()
        (cut / "needle").mkdir(parents=True, exist_ok=True)
        (cut / "needle" / name).write_bytes(data[: len(data) * 2 // 3] if name == names[0] else data[:10])
    held = len(read_records(cut / "needle" / names[0])[1])
    computed.clear()
    code, again, _ = command(*needle(model, cut))
    assert code == 0
    assert 0 < held < 6
    assert len(computed) == 12 - held
    for name in names:
        assert (cut / "needle" / name).read_bytes() == (whole / "needle" / name).read_bytes()
    assert again.replace(str(cut), str(whole)) == out
    assert "60 tokens" in out
    assert "vs full" in out
    assert (whole / "needle" / "needle.png").read_bytes().startswith(b"\x89PNG")
    code, reported, _ = command("report", whole)
    assert code == 0
    assert "60 tokens" in reported


@pytest.mark.slow
def test_an_evaluation_killed_is_finished_with_the_same_predictions(command, model, tmp_path, computed):
    """SIGKILL to a process that has written some predictions; the next one computes the others only."""
    whole, cut, name = tmp_path / "whole", tmp_path / "cut", "full.jsonl"
    options = ("--length", 64, "--depths", 5, "--repeats", 200, "--batch", 2, "--cache", "full")
    process = subprocess.Popen(
        [sys.executable, "-m", "kivi_jax.commands.main", "eval"]
        + [str(word) for word in ("needle", "--model", model, "--out", cut, *options)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    deadline = time.monotonic() + 300
    path = cut / "needle" / name
    while not (path.exists() and path.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    held = len(read_records(path)[1])
    assert 5 <= held < 1000
    limited = (*options, "--limit", held + 6)
    assert command("needle", "--model", model, "--out", cut, *limited)[0] == 0
    assert len(computed) == 6
    assert command("needle", "--model", model, "--out", whole, *limited)[0] == 0
    assert path.read_bytes() == (whole / "needle" / name).read_bytes()


def test_longgenbench_reports_its_tasks_together(command, model, tmp_path):
    """Run at once or one after another, from one folder; prompts have as many questions as the papers'."""
    data = tmp_path / "data"
    data.mkdir()
    for task, count, answer in (("gsm8k", 30, "#### 1"), ("csqa", 40, "A")):
        prompt = "".join(f"Question_{i}: w{i}\n" for i in range(1, count + 1))
        row = {"prompt": prompt, "answers": [answer] * count}
        (data / f"{task}_{count}.jsonl").write_text(json.dumps(row) + "\n")
    options = ("--model", model, "--data", data, "--max-new-tokens", 2, "--cache", "full", "--task")
    for out, runs in {"one": [["gsm8k"], ["csqa"]], "two": [["gsm8k", "--task", "csqa"]]}.items():
        for tasks in runs:
            code, printed, _ = command("longgenbench", *options, *tasks, "--out", tmp_path / out)
            assert code == 0
        assert "CSQA+" in printed
        assert "GSM8K+" in printed
    for task, message in (("mmlu", "there is no mmlu_30.jsonl"), ("x", "unknown task x")):
        code, _, error = command("longgenbench", *options, task, "--out", tmp_path / "three")
        assert code == 2
        assert message in error


def write_records(path, cache, scores, evaluation="ruler"):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"settings": {"eval": evaluation, "model": "m", "data": "d", "cache": cache}}]
    lines += [
        {"id": str(i), "task": "niah", "prediction": "yes" if score else "no", "answers": ["yes"]}
        for i, score in enumerate(scores)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_marks_differences_within_noise(command, tmp_path):
    write_records(tmp_path / "full.jsonl", "full", [1] * 30 + [0] * 10)
    write_records(tmp_path / "near.jsonl", "near", [1] * 29 + [0] * 11)
    write_records(tmp_path / "far.jsonl", "far", [1] * 5 + [0] * 35)
    code, out, _ = command("report", tmp_path)
    assert code == 0
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "percent of 40 samples" in out
    assert "75.00" in rows["full"]
    assert "72.50~" in rows["near"]
    assert "noise" in rows["near"]
    assert "12.50" in rows["far"]
    assert "-62.50" in rows["far"]
    assert "~" not in rows["far"]
    assert "noise" not in rows["far"]


def test_the_report_counts_what_a_cut_left_and_reads_nothing_twice(command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_records(tmp_path / "a" / "full.jsonl", "full", [1] * 4)
    write_records(tmp_path / "a" / "cut.jsonl", "cut", [1] * 3)
    code, out, _ = command("report", tmp_path, tmp_path / "a")
    assert code == 0
    assert "cut (3 samples)" in out
    write_records(tmp_path / "b" / "full.jsonl", "full", [0])
    code, _, error = command("report", tmp_path)
    assert code == 2
    assert "a/full.jsonl" in error
    assert "b/full.jsonl are of one evaluation and cache: name one of them" in " ".join(error.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "no predictions"),
        (("report", "answers"), "no predictions"),  # of no evaluation
        (("report", "lacking"), "a.jsonl is damaged (0 has no length, depth): move it away"),
        (("kept", "--out", "rows/train.jsonl"), "rows/train.jsonl/kept.png cannot be written"),
        (
            ("frontier", "--model", "MODEL", "--out", "o", "--data", "a/x.txt", "--data", "b/x.txt"),
            "b/x.txt have one name: rename one",
        ),
        (("passkey", "--out", "rows/train.jsonl"), "is a file of another kind, which would be lost"),
        (("needle", "--model", "MODEL", "--out", "o", "--cache", "kivi3"), "unknown cache 'kivi3'"),
        (("needle", "--model", "MODEL", "--out", "o", "--length", "5"), "no text fits"),
        (("perplexity", "--model", "MODEL", "--out", "o", "--data", "nowhere.txt"), "cannot be read"),
        (
            ("longgenbench", "--model", "MODEL", "--out", "o", "--data", "d", "--task", "x"),
            "unknown task",
        ),
        (
            ("gsm8k", "--model", "MODEL", "--out", "o", "--data", "rows"),
            "rows/train.jsonl: row 1 has no field",
        ),
        *(
            ((name, "--model", "MODEL", "--out", "o", "--data", "rows/train.jsonl"), "row 1 has no field")
            for name in ("ruler", "needle", "longgenbench")
        ),
        (("study", "--model", "MODEL", "--out", "o", "--data", "rows/train.jsonl"), "the text has"),
        (("kept", "--model", "MODEL", "--cache", "scope:window=4"), "recent=256 and window=4"),
    ],
)
def test_mistakes_end_in_one_line(command, model, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "answers" / "a.jsonl", "full", [1], evaluation=None)
    write_records(tmp_path / "lacking" / "a.jsonl", "full", [1], evaluation="needle")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"other": 1}\n')
    code, _, error = command(*(str(model) if word == "MODEL" else word for word in arguments))
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


ANSWERS = {"gsm8k": "Answer:", "ruler": " It is", "needle": " The pass key is"}


class NoEngine(contextlib.nullcontext):
    def __init__(self, *_, **__):
        super().__init__(self)


@pytest.mark.parametrize("name", ANSWERS)
def test_prompts_are_messages_where_that_is_asked_for(command, tmp_path, monkeypatch, name):
    """What an evaluation lets an answer begin with begins the reply."""
    tokenizer, seen = build("bytes", "chatml"), []

    def continued(model, prompts, **options):
        seen.extend(tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts)
        return [prompts[0][:1]] * len(prompts)

    loaded = random_llama(config(vocab_size=VOCAB)), tokenizer
    monkeypatch.setattr("kivi_jax.generation.loading.open_model", lambda *_: loaded)
    monkeypatch.setattr(generating, "continue_prompts", continued)
    monkeypatch.setattr(generating, "Engine", NoEngine)
    monkeypatch.setattr(generating, "in_slots", lambda _, batch: continued(None, [ids for _, ids in batch]))
    row = {"question": "1 + 1?", "answer": "#### 2"}
    row |= {"input": "Which?", "outputs": ["2"], "answer_prefix": " It is"}
    for file in ("train.jsonl", "test.jsonl", "niah.jsonl"):
        (tmp_path / file).write_text(json.dumps(row) + "\n")
    data = {
        "gsm8k": ("--data", tmp_path, "--examples", 1),
        "ruler": ("--data", tmp_path / "niah.jsonl"),
        "needle": ("--length", 200, "--depths", 1),
    }[name]
    options = ("--model", "demo", "--out", tmp_path / "out", "--cache", "full", "--chat")
    assert command(name, *data, *options)[0] == 0
    begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert seen[0].startswith(begin)
    assert seen[0].endswith(f"{ANSWERS[name]}{end}" if name == "gsm8k" else f"{end}{ANSWERS[name]}")


def test_rows_are_those_there_are_and_changed_data_is_other_data(command, tmp_path, monkeypatch):
    rows = []

    def continued(model, prompts, **options):
        rows.append(options["rows"])
        return [prompts[0][:1]] * len(prompts)

    loaded = random_llama(config(vocab_size=VOCAB)), build("bytes", "chatml")
    monkeypatch.setattr("kivi_jax.generation.loading.open_model", lambda *_: loaded)
    monkeypatch.setattr(generating, "continue_prompts", continued)
    text, model = tmp_path / "book.txt", tmp_path / "model"
    model.mkdir()
    text.write_text("The sun rose. " * 200)
    options = ("--model", model, "--data", text, "--length", 200, "--depths", 3, "--cache", "full")
    run = ("needle", *options, "--batch", 1000, "--out", tmp_path / "out")
    assert command(*run)[0] == 0
    assert rows == [3]
    assert command(*run, "--dtype", "float32")[0] == 0  # what is taken here where none is asked for
    code, _, error = command(*run, "--dtype", "bfloat16")
    assert (code, "was computed with dtype='float32', not 'bfloat16'" in error) == (2, True)
    (model / "config.json").write_text("{}")
    text.write_text("The moon rose. " * 200)
    code, _, error = command(*run)
    assert (code, "full.jsonl was computed with other contents of its data, model:" in error) == (2, True)
    assert len(rows) == 1
