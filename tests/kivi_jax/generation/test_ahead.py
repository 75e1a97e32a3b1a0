"""Programs compiled ahead: the very ones that are called then; errors and interrupts come through."""

import threading
from unittest.mock import create_autospec

import jax
import numpy as np
import pytest
from jax.stages import Lowered

import kivi_jax as kj
from kivi_jax.generation.ahead import compiled_meanwhile
from tests.models import config, random_llama


@pytest.mark.parametrize("committed", [False, True])
def test_a_loop_is_lowered_and_compiled_once(caplog, committed):
    """For arguments that lie where they are said to: else it would be compiled again when it is called."""
    model = random_llama(config())
    if committed:
        model = jax.device_put(model, jax.devices()[0])
    for times in (1, 0):
        caplog.clear()
        with caplog.at_level("DEBUG", logger="jax"):  # in all threads, unlike `jax.log_compiles`
            kj.generate(model, np.ones((1, 5), int), [5], cache=kj.full(), max_new_tokens=7 + committed)
        said = [record.getMessage() for record in caplog.records if "_advance" in record.getMessage()]
        assert sum("MLIR module conversion" in line for line in said) == times
        assert sum("XLA compilation" in line for line in said) == times


def test_what_the_compiler_refuses_is_raised():
    lowered = create_autospec(Lowered, instance=True)
    lowered.compile.side_effect = ValueError("no such kernel")
    with pytest.raises(ValueError, match="no such kernel"), compiled_meanwhile(lowered):
        pass


def test_an_interrupt_does_not_wait_for_the_compiler():
    release = threading.Event()
    lowered = create_autospec(Lowered, instance=True)
    lowered.compile.side_effect = lambda: release.wait(60)
    with pytest.raises(KeyboardInterrupt), compiled_meanwhile(lowered):
        raise KeyboardInterrupt
    release.set()
    lowered.compile.assert_called_once_with()
