"""Run the Triton kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.pallas_kernels.quantized_attention.interpret_triton [EVERY FIRST]

A process of its own, because Triton decides when it is imported whether its functions are interpreted. It
prints, as JSON, the relative error of every case against the XLA implementation, or why it is refused; or of
every EVERY-th case from the FIRST on.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from triton.runtime import interpreter

from pallas_kernels.partials import AttentionPartial, normalize
from pallas_kernels.quantized_attention import triton as backend
from pallas_kernels.quantized_attention import triton_kernels, xla
from pallas_kernels.quantized_attention.cases import CORRECTNESS, Case
from pallas_kernels.quantized_attention.split_kv import operands, plan
from pallas_kernels.quantized_attention.tuning import Tuning
from tests.draws import dense


class HostArray:
    """The few methods of a torch tensor that Triton's interpreter asks for, over a NumPy array."""

    def __init__(self, array: Any) -> None:
        self.array = np.array(array)
        self.dtype = self.array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostArray":
        return self

    def cpu(self) -> "HostArray":
        return self

    def new_empty(self, size: int, device: str) -> "HostArray":
        return self

    def set_(self, *storage: Any) -> None:
        pass

    def copy_(self, other: "HostArray") -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


def attend(case: Case) -> tuple[AttentionPartial, AttentionPartial]:
    query, key, value = dense(case)
    key, value = jax.jit(case.pack)(key, value)
    start, end = case.token_ranges()
    scale = case.head_dim**-0.5
    tuning = Tuning(splits=3, pages=2)
    planned = plan(query, key, value, scale, tuning, interpret=True)
    backend.check(planned)
    arrays = jax.jit(functools.partial(operands, planned))(query, key, value, start, end)
    programs = arrays[2].shape[0]

    def empty(*lead: int) -> list[HostArray]:
        return [HostArray(np.full(s.shape, np.nan, s.dtype)) for s in backend.shapes(*lead, dim=planned.dim)]

    partials, merged = empty(programs, tuning.splits, planned.heads), empty(programs, planned.heads)
    constants = backend.constants(planned, arrays)
    grid = (programs, tuning.splits)
    triton_kernels.attend_split[grid](*map(HostArray, arrays), *partials, **constants)
    grid = backend.merge_grid(planned, programs)
    triton_kernels.merge_splits[grid](*partials, *merged, **backend.merge_constants(planned))
    out, top, denom = (jnp.asarray(x.array) for x in merged)
    heads = query.shape[:2]
    got = AttentionPartial(out.reshape(query.shape), top.reshape(heads), denom.reshape(heads))
    want = jax.jit(functools.partial(xla.attend, scale=scale))
    return got, want(query, key, value, start=start, end=end)


def relative_error(case: Case) -> float:
    got, want = attend(case)
    errors = []
    for of in (normalize, lambda partial: partial.log_sum_exp):
        a, b = (np.asarray(of(partial), np.float64) for partial in (got, want))
        errors.append(np.linalg.norm(a - b) / np.linalg.norm(b))
    return float(max(errors))


def allow_new_numpy() -> None:
    """Triton 3.6 makes loop bounds of arrays of one element by `int`, which NumPy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def main(every: int = 1, first: int = 0) -> None:
    allow_new_numpy()
    results: dict[str, float | str] = {}
    for case in CORRECTNESS[first::every]:
        try:
            results[case.name] = relative_error(case)
        except NotImplementedError as reason:
            results[case.name] = str(reason)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
