"""`kivi-jax`: what the commands print, and how they end."""

import inspect
import io
import re
import shlex
import sys

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import kivi_jax as kj
from kivi_jax.commands.app import app
from kivi_jax.console import run
from tests.convert.checkpoints import LLAMA, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("cli") / "model", LLAMA | dict(eos_token_id=None), tokens=61
    )


def completed(model, cache, **options):
    loaded, tokenizer = kj.load(model)
    return kj.complete(loaded, tokenizer, ["w3 w1 w4"], cache=cache, max_new_tokens=6, **options)[0]


OPTIONS = ("--max-new-tokens", "6", "--cache", "kivi2:group_size=8:residual_length=8")


def test_generate_prints_what_complete_gives_and_what_it_cost(command, model):
    code, out, error = command("generate", model, "w3 w1 w4", *OPTIONS)
    assert code == 0
    assert out == completed(model, kj.kivi(2, 8, 8)) + "\n"
    cost = error.splitlines()[-1]
    assert re.fullmatch(
        r"3 prompt tokens · 6 new tokens · first after [\d.]+ s \(compiling and reading the prompt\) · "
        r"then [\d.]+ tokens/s · cache [\d.]+ \w+, full cache [\d.]+ \w+ \([\d.]+x (smaller|larger)\) · "
        r"cut at --max-new-tokens",
        cost,
    )


def test_generate_reads_the_prompt_from_standard_input(command, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w1 w4"))
    code, out, _ = command("generate", model, "-", *OPTIONS)
    assert (code, out) == (0, completed(model, kj.kivi(2, 8, 8)) + "\n")


def test_generate_samples(command, model):
    import jax

    sampler = kj.Sample(temperature=2.0, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    options = ("--temperature=2", "--top-k=20", "--top-p=0.9", "--min-p=0.01", "--repetition-penalty=1.2")
    code, out, _ = command("generate", model, "w3 w1 w4", *OPTIONS, *options, "--seed=3")
    expected = completed(model, kj.kivi(2, 8, 8), sampler=sampler, key=jax.random.key(3))
    assert (code, out) == (0, expected + "\n")


def test_inspect_prints_a_plan(command, model):
    code, out, _ = command("inspect", model, "--context", "64", "--batch", "2", "--cache", "full")
    assert code == 0
    assert "64 tokens x 2 rows, bfloat16" in out
    # Two layers, two KV heads of 8 channels in bfloat16: 128 bytes of keys and values a token, and lengths.
    (row,) = [line for line in out.splitlines() if re.match(r"\W*full ", line)]
    cells = [cell.strip() for cell in re.split("[│┃|]", row) if cell.strip()]
    assert cells[:-1] == ["full", "16 KiB", "128", "1.00x", "0 B", "0 B", "16 KiB", "0 B"]


def test_inspect_needs_no_weights(command, tmp_path):
    directory = write_checkpoint(
        tmp_path / "model", LLAMA | dict(head_dim=128, max_position_embeddings=65536), tokens=61
    )
    (directory / "model.safetensors").unlink()
    code, out, _ = command("inspect", directory, "--memory", "1GiB")
    assert code == 0
    ratios = dict(re.findall(r"(full|kivi2|kivi4) .*?([\d.]+)x", out))
    assert float(ratios["kivi2"]) >= 5.0
    assert float(ratios["kivi4"]) >= 3.1
    assert ratios["full"] == "1.00"


def test_inspect_plans_pools_and_shows_whole_names(command, tmp_path, monkeypatch):
    """In a narrow terminal, too, where two caches may differ in their last field only."""
    directory = write_checkpoint(tmp_path / "model", LLAMA | dict(head_dim=128), tokens=61)
    monkeypatch.setenv("COLUMNS", "80")
    dense, packed = "kivi2+scope:window=512", "kivi2+scope:window=512:pool_bits=4"
    options = ("--context", "11500", "--prompt", "7400", "--cache", dense, "--cache", packed)
    code, out, _ = command("inspect", directory, *options)
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    rows: list[list[str]] = []
    for row in cells:  # a name goes on in the first cell of the next line
        if row[3]:
            rows.append(row)
        else:
            rows[-1][0] += row[0]
    assert [row[0] for row in rows] == [dense, packed]
    assert 5.2 < float(rows[0][3][:-1]) < float(rows[1][3][:-1])


def test_inspect_knows_shapes_by_name(command):
    code, out, _ = command("inspect", "llama-1b", "--context", "64", "--cache", "full")
    assert code == 0
    assert "64 tokens x 1 row, bfloat16; weights 2.3 GiB" in out


def test_inspect_draws_its_plan(command, model, tmp_path):
    file = tmp_path / "new" / "memory.png"
    code, out, error = command("inspect", model, "--context", "64", "--cache", "full", "--plot", file)
    assert code == 0
    assert "64 tokens x 1 row" in out
    assert error.endswith(f"wrote {file}\n")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in file.parent.iterdir()] == ["memory.png"]


HELP = {
    (): ["demo", "generate", "convert", "inspect", "eval", "bench"],
    ("demo",): ["--problems", "--plot"],
    ("eval",): ["passkey", "recall", "longgen"],
    ("eval", "passkey"): ["--model", "--cache", "--tokens", "--out"],
    ("generate",): ["--cache", "--top-p"],
    ("convert",): ["--dtype", "--verify", "--overwrite"],
    ("inspect",): ["--context", "--memory", "--plot", "llama-8b"],
    ("bench",): [],
}


@pytest.mark.parametrize("name", HELP, ids=lambda name: "-".join(name) or "kivi-jax")
def test_help(command, name):
    code, out, _ = command(*name, "--help")
    assert code == 0
    assert "Usage: " in out  # then the name of the program, which is pytest under `python -m pytest`
    for shown in HELP[name]:
        assert shown in out


def commands(group, *path):
    """Every command and group below `group`, by its words."""
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name), command
        yield from commands(command, *path, name)


ALL = dict(commands(get_command(app)))


@pytest.mark.parametrize("path", ALL, ids="-".join)
def test_every_command_says_what_it_does_with_examples_that_it_takes(path):
    """On one line of a terminal of 80 columns, so that they can be copied."""
    text = inspect.cleandoc(ALL[path].help)
    assert re.match(r"[A-Z][^\n]*[.?]", text)
    examples = re.findall(r"((?:Example|First|Then):  (kivi-jax .*))", text)
    assert examples
    for shown, line in examples:
        assert len(shown) <= 78
        command, words = get_command(app), shlex.split(line)
        while isinstance(command, TyperGroup):
            words = words[1:]
            command = command.commands[words[0]]
        command.make_context(line, words[1:])  # raises where an option or a value is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "MODEL", "w1", "--cache", "kivi3"), "unknown cache 'kivi3'"),
        (("generate", "MODEL", "w1", "--cache", "kivi2:group_size=32"), "value_group_size=32 must divide"),
        (("generate", "MODEL", "w1", "--temperature", "-1"), "temperature=-1.0 must be positive"),
        (("generate", "MODEL", "w1", "--max-new-tokens", "0"), "max_new_tokens=0 must be at least 1"),
        (("generate", "MODEL", "", "--cache", "full"), "prompt 0 has no tokens"),
        (("generate", "nowhere", "w1"), "nowhere does not exist"),
        (("inspect", "nowhere"), "nowhere does not exist"),
        (("inspect", "MODEL", "--memory", "much"), "cannot read 'much' as a memory size"),
        (("inspect", "MODEL", "--context", "0"), "must be positive"),
        (("generate", "MODEL", "--bach", "2"), "no such option: --bach"),
        (("generate", "MODEL", "w1", "w2"), "generate --help shows what there is"),
        (("generate",), "missing argument"),
        (("generate", "MODEL", "w1", "--dtype", "int3"), "'int3' is not one of 'float32', 'bfloat16'"),
        (("generate", "MODEL", "w1", "--seed", "[/x]"), "invalid value for '--seed'"),
        (("eval", "needle", "--model", "MODEL"), "missing option '--out'"),
        (("evil",), "no such command 'evil'"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_mistake_is_one_line(command, model, arguments, message):
    code, out, error = command(*(model if argument == "MODEL" else argument for argument in arguments))
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("group", [(), ("eval",)])
def test_a_group_alone_shows_its_help(command, group):
    code, out, error = command(*group)
    assert (code, error) == (2, "")
    assert "Usage: " in out


def test_inspect_shows_the_total_in_the_narrowest_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "26")
    code, out, _ = command("inspect", "llama-1b", "--context", "64", "--cache", "full")
    assert code == 0
    assert re.search(r"full\W+2 MiB\b", out)


def test_a_model_without_tokenizer_cannot_read_a_prompt(command, tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    code, _, error = command("generate", directory, "w1", "--cache", "full")
    assert code == 2
    assert "has no tokenizer files: copy the tokenizer's files there" in error


def test_a_traceback_on_demand(model, monkeypatch):
    monkeypatch.setenv("KIVI_JAX_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["kivi-jax", "generate", str(model), "w1", "--cache", "kivi3"])
    with pytest.raises(ValueError, match="unknown cache"):
        run(app)
