"""The package as a user meets it: its names, version, types and ways to be called."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import kivi_jax as kj

ROOT = Path(__file__).parents[2]


def test_tab_shows_public_names_only():
    shown = dir(kj)
    assert set(shown) == {*kj.__all__, "__version__"}
    assert {"Chat", "parse_cache", "plan_cache", "largest_batch", "stream_tokens"} <= set(shown)
    modules = [name for name in kj.__all__ if getattr(getattr(kj, name), "__module__", None) is None]
    assert modules == []  # rooms are not names of the package


@pytest.mark.parametrize("package", ["kivi_jax", "pallas_kernels", "convert"])
def test_types_are_marked(package):
    assert (ROOT / package / "py.typed").read_text() == ""


def test_version(command):
    assert command("--version") == (0, f"{kj.__version__}\n", "")
    assert importlib.metadata.version("kivi-jax") == kj.__version__


def test_the_package_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "kivi_jax", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"{kj.__version__}\n"


def test_shells_can_complete(command):
    assert "--install-completion" in command("--help")[1]
