"""How commands end, and how their tables fit a terminal."""

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from rich.console import Console
from rich.table import Table

from kivi_jax import console
from kivi_jax.figures import CACHE_COLORS, cache_colors, check_place

WAITING = """
import sys, time
from kivi_jax import console
def app():
    try:
        print("computing", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)
console.main(app)
"""


SWALLOWED = """
import signal, time
from kivi_jax import console
class Deaf:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0)
def app():
    Deaf()
    time.sleep(60)
console.main(app)
"""


def test_a_signal_that_goes_nowhere_comes_again():
    """What is raised in a destructor is dropped by Python."""
    environment = os.environ | {console.COMPILED: "off"}
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, env=environment, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, b"")


def test_a_warning_is_one_line_without_a_module_s_name():
    warning = "import logging; from kivi_jax import console\n" + (
        "console.main(lambda: logging.getLogger('kivi_jax.checks').warning('so it is'))"
    )
    done = subprocess.run([sys.executable, "-c", warning], capture_output=True, text=True, check=True)
    assert done.stderr == "WARNING: so it is\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_and_ends(number):
    """What a `with` block owes is done; then the process is gone, without a traceback."""
    environment = os.environ | {console.COMPILED: "off"}
    not_ignored = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n"  # as nohup has it
    with subprocess.Popen(
        [sys.executable, "-c", not_ignored + WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout.readline() == b"computing\n"
        process.send_signal(number)
        out, error = process.communicate()
    assert (process.returncode, out, error) == (128 + number, b"cleaned\n", b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["kivi_jax", "kivi_jax.commands.main", "convert"])
def test_a_signal_while_the_process_still_imports_ends_it(module, number):
    """NumPy is the first of what JAX imports: seconds pass until a command runs."""
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert any(b"numpy" in line for line in process.stderr)
        process.send_signal(number)
        out, error = process.communicate()
    said = [line for line in error.splitlines() if not line.startswith(b"import time:")]
    assert (process.returncode, out, said) == (128 + number, b"", [])


@pytest.mark.parametrize("kind", ["RESOURCE_EXHAUSTED", "INTERNAL: Error dispatching computation"])
def test_out_of_memory_is_one_line(monkeypatch, capsys, kind):
    monkeypatch.setenv("COLUMNS", "200")

    def app():
        raise jax.errors.JaxRuntimeError(f"{kind}: Out of memory allocating 2199023255552 bytes.")

    with pytest.raises(SystemExit) as caught:
        console.run(app)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: out of memory: 2 TiB more wanted, ")
    assert "on this CPU in all: take fewer tokens, fewer rows, or fewer bits" in error
    assert error.count("\n") == 1


def test_a_full_disk_is_not_memory():
    """Tensorstore calls both RESOURCE_EXHAUSTED."""
    assert console.out_of_memory(ValueError("x cannot be written: RESOURCE_EXHAUSTED: No space left")) is None


def test_a_full_disk_is_named_where_nothing_else_is(capsys):
    def app():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit):
        console.run(app)
    said = capsys.readouterr().err
    assert said == "error: what this prints cannot be written: No space left on device\n"


def test_a_backend_that_is_not_there_is_one_line(capsys):
    def app():
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu (set JAX_PLATFORMS='' to choose)")

    with pytest.raises(SystemExit):
        console.run(app)
    assert capsys.readouterr().err.startswith("error: Unable to initialize backend 'tpu'")


def test_other_errors_of_the_runtime_are_not_hidden():
    def app():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        console.run(app)


@pytest.mark.parametrize(("width", "columns"), [(120, 6), (70, 6), (60, 5), (10, 2)])
def test_a_narrow_terminal_shows_fewer_columns(width, columns):
    table = Table("cache", "bytes", "total", "smaller", "packed", "scales")
    table.add_row("kivi2+scope", "1,234,567", "12.4 GiB", "5.00x", "11.4 GiB", "1.05 GiB")
    out = io.StringIO()
    console.print_table(Console(file=out, width=width), table)
    assert len(table.columns) == columns
    said = " ".join(out.getvalue().split())
    assert ("a wider terminal also shows: " in said) == (columns < 6)
    assert "kivi2" in said


def test_advice_to_install_torch_is_left_out():
    def record(text):
        return logging.LogRecord("transformers", logging.WARNING, "", 0, text, (), None)

    assert not console._is_no_advice(record("PyTorch was not found. Models won't be available"))
    assert console._is_no_advice(record("the tokenizer is slow"))


def test_a_terminal_of_no_columns_is_one_of_unknown_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    console.accept_all_text()
    assert Console(file=io.StringIO()).width > 0


@pytest.mark.parametrize("chosen", ["off", "0", "OFF"])
def test_keeping_compiled_programs_can_be_switched_off(monkeypatch, chosen):
    monkeypatch.setenv(console.COMPILED, chosen)
    monkeypatch.setattr(jax.config, "update", pytest.fail)
    console.keep_compiled()


def test_a_directory_for_compiled_programs_that_cannot_be_made_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(console.COMPILED, str(tmp_path / "file" / "below"))
    unset = types.SimpleNamespace(values={"jax_compilation_cache_dir": None}, update=pytest.fail)
    monkeypatch.setattr(console, "jax", types.SimpleNamespace(config=unset))
    with pytest.raises(SystemExit):
        console.keep_compiled()
    assert "cannot be written (Not a directory): choose another directory, or off" in capsys.readouterr().err
    monkeypatch.delenv(console.COMPILED)  # the default's is nobody's wish
    monkeypatch.setattr(console.platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "file")
    console.keep_compiled()
    assert capsys.readouterr().err == ""


def test_a_cache_has_one_color_everywhere():
    names = ["full", "kivi2", "kivi2:group_size=64", "scope:window=8", "scope:decode=h2o", "other"]
    colors = cache_colors(names)
    assert len(set(colors.values())) == len(names)
    assert all(colors[name] == CACHE_COLORS[name] for name in ("full", "kivi2"))
    assert colors["scope:window=8"] == CACHE_COLORS["scope"]


def test_a_closed_stream_is_an_empty_one(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    console.accept_all_text()
    with sys.stdin as opened:
        assert opened.readline() == ""


def test_a_place_for_a_plot_is_checked_before(tmp_path):
    check_place(tmp_path / "new" / "plot.png")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    check_place(tmp_path / "file")
    for bad in (tmp_path, tmp_path / "file" / "plot.png", Path(os.devnull)):
        with pytest.raises(ValueError, match="cannot be written: choose another file"):
            check_place(bad)
    (tmp_path / "file").write_text("a thesis")
    with pytest.raises(ValueError, match="is a file of another kind, which would be lost"):
        check_place(tmp_path / "file")
