"""What the pages say of the code is true of it: messages, public names, paths, commands, examples."""

import ast
import importlib
import itertools
import re
import shlex
import typing
from pathlib import Path

import pytest
import typer

from kivi_jax.commands.app import app

ROOT = Path(__file__).parents[2]
PACKAGES = ("kivi_jax", "pallas_kernels", "convert")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TROUBLESHOOT = ROOT / "docs" / "how-to" / "troubleshoot.md"
ERRORS = {
    "ValueError",
    "NotImplementedError",
    "OSError",
    "RuntimeError",
    "CheckpointError",
    "TooLong",
    "QueueFull",
    "Refused",
    "warning",
    "warn_once",
}
NEVER_SEEN = {  # caught where they are raised, or put into another, as by `quantized.parts.fitting`
    "negative",
    "… of shape …, not …",
    "… groups of …",
    "scales of shape … for blocks of any of …",
    "it is no JSON object",
    "g_idx from … to … of … groups",
    "GGUF magic invalid",
    "it holds … twice",
    "its general.alignment is …",
    "it ends early",
    "it has a value of unknown type …",
    "its version is …, not …",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def written(message: ast.expr) -> str:
    """A message with an ellipsis for everything that is put in."""
    match message:
        case ast.Constant(value=str(text)):
            return text.replace("%s", "…")
        case ast.JoinedStr(values=parts):
            return "".join(written(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return written(left) + written(right)
    return "…"


def messages() -> set[str]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
    found = {
        written(call.args[0])
        for call in calls
        if getattr(call.func, "id", getattr(call.func, "attr", "")) in ERRORS
    }
    return {text for text in found - NEVER_SEEN if re.search(r"\w", text)}


def test_every_message_has_its_cause_and_cure():
    rows = re.findall(r"^\| `(.+?)` \| (.*?) \| (.*?) \|$", TROUBLESHOOT.read_text("utf-8"), re.MULTILINE)
    assert messages() - {message for message, _, _ in rows} == set()  # add a row to the page
    assert {
        message for message, _, _ in rows
    } - messages() == set()  # remove it, or spell it as the code does
    assert all(cause or cure for _, cause, cure in rows)


def public_names(package: str) -> list[str]:
    """What a package says that it gives."""
    return importlib.import_module(package).__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_shows_every_public_name(package):
    page = (ROOT / "docs" / "reference" / f"{package}.md").read_text("utf-8")
    shown = re.findall(rf"^::: {package}\.(\w+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(public_names(package))
    module = importlib.import_module(package)
    assert [name for name in shown if not getattr(module, name).__doc__] == []


def test_every_file_and_test_named_is_there():
    roots = "|".join((*PACKAGES, "tests", "notebooks", "docs"))
    missing = []
    for page in PAGES:
        for path, test in re.findall(rf"`((?:{roots})/[\w./-]+\.\w+)(?:::(\w+))?`", page.read_text("utf-8")):
            file = ROOT / path
            if not file.is_file() or (test and f"def {test}(" not in file.read_text("utf-8")):
                missing.append(f"{page.name}: {path} {test}")
    assert missing == []


def commands() -> list[tuple[str, ...]]:
    """The words of every call of `kivi-jax` in a page's shell blocks."""
    called = set()
    for page in [*PAGES, ROOT / "README.md"]:
        for block in blocks(page.read_text("utf-8"), "bash"):
            lexer = shlex.shlex(block.replace("\\\n", " "), posix=True, punctuation_chars="\n;&|<>")
            lexer.whitespace, lexer.whitespace_split = " \t", True
            for separator, words in itertools.groupby(lexer, lambda word: not word.strip("\n;&|<>")):
                words = tuple(words)
                if not separator and words[0] == "kivi-jax":
                    called.add(words)
    return sorted(called)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_spelled_as_the_command_line_reads_them(words):
    command: typing.Any = typer.main.get_command(app)
    name, *words = words
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(name, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text("utf-8"), "python")], ids=lambda page: page.stem
)
def test_examples_run(page, monkeypatch, tmp_path, capsys):
    """The Python of a page, from top to bottom: what it asserts holds, and it prints what the page shows."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    exec(compile("\n".join(blocks(text, "python")), str(page), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert [shown for shown in blocks(text, "text") if shown not in printed] == []
