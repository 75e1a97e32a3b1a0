"""Lower the Mosaic kernel for an H100; print the size of each case's module, or why it is refused.

In a process of its own: Mosaic's compiler can abort the one it runs in.
"""

import functools
import json
import sys

import jax

from kivi_jax.bench import aot
from pallas_kernels.quantized_attention import pallas_mosaic
from pallas_kernels.quantized_attention.cases import COMPILED, Case
from pallas_kernels.quantized_attention.tuning import choose


def lowered_size(case: Case) -> int | str:
    tuning = choose(
        rows=case.batch * case.kv_heads,
        slots=case.slots,
        heads=case.query_groups,
        dim=case.head_dim,
        bits=max(case.key_bits, case.value_bits),
        device_kind=aot.DEVICES[90],
    )
    attend = functools.partial(pallas_mosaic.attend, scale=case.head_dim**-0.5, tuning=tuning)
    query, key, value, start, end = jax.eval_shape(
        lambda: (case.query(), *case.pack(*case.dense()[1:]), *case.token_ranges())
    )

    def call(query, key, value, start, end):
        return attend(query, key, value, start=start, end=end)

    try:
        return len(aot._lower(call, query, key, value, start, end, sm=90).as_text())
    except NotImplementedError as reason:
        return str(reason)


if __name__ == "__main__":
    names = sys.argv[1:]
    sizes = {case.name: lowered_size(case) for case in COMPILED if case.name in names}
    sys.stdout.write(json.dumps(sizes))
