"""What tests of several commands share."""

import sys

import pytest

from kivi_jax.commands.app import app
from kivi_jax.console import run


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in this process: exit code, stdout and stderr, without colors and 200 wide."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kivi-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run(app)
        return caught.value.code, *capsys.readouterr()

    return call
