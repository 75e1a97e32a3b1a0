"""Lower the Mosaic kernel for an H100; print the size of each case's module, or why it is refused.

    python -m tests.pallas_kernels.quantized_attention.lower_mosaic [--compile] CASE...

With --compile, the module is the one that XLA compiles, for which Mosaic makes PTX (needs JAX's CUDA plugin).
In a process of its own: Mosaic's compiler can abort the one it runs in.
"""

import functools
import json
import sys

import jax

from kivi_jax.bench import aot, compiled
from pallas_kernels.quantized_attention import pallas_mosaic
from pallas_kernels.quantized_attention.cases import COMPILED, Case


def module_size(case: Case, *, compiles: bool) -> int | str:
    tuning = aot.tuning_for(case, aot.DEVICES[90])
    attend = functools.partial(pallas_mosaic.attend, scale=case.head_dim**-0.5, tuning=tuning)
    arguments = jax.eval_shape(lambda: (case.query(), *case.pack(*case.dense()[1:]), *case.token_ranges()))

    def call(query, key, value, start, end):
        return attend(query, key, value, start=start, end=end)

    try:
        if compiles:
            return len(compiled.compile_for(compiled.described_gpu(), jax.jit(call), *arguments))
        return len(aot._lower(call, *arguments, sm=90).as_text())
    except NotImplementedError as reason:
        return str(reason)


if __name__ == "__main__":
    names = sys.argv[1:]
    compiles = "--compile" in names
    sizes = {case.name: module_size(case, compiles=compiles) for case in COMPILED if case.name in names}
    sys.stdout.write(json.dumps(sizes))
