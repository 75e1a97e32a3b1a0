"""The memory checker's driver, rehearsed on a CPU: both sides are XLA's."""

import os
import subprocess
import sys

from kivi_jax.bench import memcheck


def test_the_first_of_every_kind_runs():
    checks = [next(part()) for part in memcheck.PARTS.values()]
    records = list(memcheck.run(checks))
    assert [record["what"] for record in records] == [check.what for check in checks]
    for record in records:
        assert record["error"] == 0
        assert record["largest"] > 0


def test_a_refusal_is_said():
    def refuse():
        raise NotImplementedError("no block")

    assert list(memcheck.run([memcheck.Check("it", refuse, ())])) == [{"what": "it", "refused": "no block"}]


def test_what_jax_has_to_find_is_set_before_it_looks_for_devices():
    """Importing the driver starts no backend: flags that are set then are still read."""
    code = (
        "import os, jax; from kivi_jax.bench import memcheck; os.environ.update(memcheck.environment());"
        "os.environ['XLA_FLAGS'] += ' --xla_no_such_flag'; jax.devices()"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "xla_no_such_flag" in ended.stderr
    assert "autotune" not in ended.stderr
