"""What the formats share: integers packed in words, and weights made some rows at a time."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int, Int32, UInt8

from convert.errors import CheckpointError
from convert.stored import Stored

_BLOCK = 1 << 20  # elements that are made at a time: what stands between takes more room than the result
Parts = Mapping[str, Stored]  # the tensors of one module by field


def unpack(words: Int32[np.ndarray, "rows words"], bits: int) -> UInt8[np.ndarray, "rows values"]:
    """Unsigned integers of `bits` bits that stand one after the other in little-endian words."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    return np.packbits(
        stream[:, : count * bits].reshape(len(words), count, bits), axis=-1, bitorder="little"
    )[..., 0]


@contextmanager
def fitting(module: str) -> Iterator[None]:
    """Whatever arithmetic fails over here is that the module's tensors and settings are not of one kind.

    Raises:
        CheckpointError: something did.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"quantized weights of {module} do not fit together ({error}): copy or download them again"
        ) from error


def check_shape(field: str, values: np.ndarray, wanted: tuple[int, ...]) -> None:
    """NumPy would take part of what is too large.

    Raises:
        ValueError: `values` are of another shape; for `fitting`.
    """
    if values.shape != wanted:
        raise ValueError(f"{field} of shape {list(values.shape)}, not {list(wanted)}")


def runs(inputs: int, count: int) -> Int[np.ndarray, "inputs"]:
    """Which of `count` equal groups each input belongs to.

    Raises:
        ValueError: they cannot be equal; for `fitting`.
    """
    if inputs % count:
        raise ValueError(f"{count} groups of {inputs}")
    return np.arange(inputs) // (inputs // count)


def check_groups(groups: Int[np.ndarray, "..."], inputs: int, count: int) -> None:
    """NumPy would count a negative group from the end.

    Raises:
        ValueError: they are not one of `count` for each input; for `fitting`.
    """
    check_shape("g_idx", groups, (inputs,))
    if groups.min() < 0 or groups.max() >= count:
        raise ValueError(f"g_idx from {groups.min()} to {groups.max()} of {count} groups")


def restored(
    parts: Parts,
    used: set[str],
    shape: tuple[int, ...],
    rows: Callable[[dict[str, np.ndarray]], Callable[[slice], np.ndarray]],
    *,
    multiple: int = 1,
) -> dict[str, Stored]:
    """The module's tensors with a `weight` made of those that are `used`.

    `rows`, of their values, gives a function from a slice of the weight's rows, which begins and ends at a
    `multiple`, to these rows.

    Raises:
        CheckpointError: one of those that are used is missing.
    """
    if missing := sorted(used - parts.keys()):
        raise CheckpointError(
            f"quantized weights lack {', '.join(missing)} beside {', '.join(sorted(parts))}"
        )
    read = functools.partial(_read, {field: parts[field] for field in used}, shape, rows, multiple)
    weight = Stored(next(iter(parts.values())).file, shape, "F32", read)
    return {**{field: tensor for field, tensor in parts.items() if field not in used}, "weight": weight}


def _read(
    parts: Parts,
    shape: tuple[int, ...],
    rows: Callable[[dict[str, np.ndarray]], Callable[[slice], np.ndarray]],
    multiple: int,
    dtype: DTypeLike | None,
) -> np.ndarray:
    make = rows({field: tensor.read(None) for field, tensor in parts.items()})
    weight = np.empty(shape, np.float32 if dtype is None else dtype)
    step = max(1, _BLOCK // shape[1] // multiple) * multiple
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        weight[part] = make(part)
    return weight
