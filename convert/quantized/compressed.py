"""compressed-tensors: weights of 8 bits as they are, or fewer packed along inputs, with scales and zeros.

Source: compressed-tensors, `compressors/pack_quantized`, `compressors/naive_quantized` and
`quantization/lifecycle/forward.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from convert.errors import CheckpointError
from convert.quantized.parts import Parts, check_groups, check_shape, restored, runs, unpack
from convert.stored import Stored

_READ = ("dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "mixed-precision")


def restore(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Stored]:
    """The module's tensors, its weight dequantized in the scales' type if it is packed or of 8 bits.

    Raises:
        CheckpointError: the checkpoint's format is another, or tensors do not fit together.
    """
    groups = settings.get("config_groups") or {}
    formats = [settings.get("format"), *(group.get("format") for group in groups.values())]
    if unknown := [name for name in formats if name is not None and name not in _READ]:
        raise CheckpointError(
            f"compressed-tensors' format {unknown[0]!r} is not supported: only {', '.join(_READ)}"
        )
    if "weight_packed" in parts:
        return _packed(parts)
    if "weight_scale" not in parts:
        return dict(parts)
    said = (group.get("weights") or {} for group in groups.values())
    return _plain(parts, {_block(weights.get("block_structure")) for weights in said} - {None})


def _block(said: Any) -> tuple[int, ...] | None:
    """Rows and columns of a block: [128, 128], or "128x128" in older files."""
    return None if said is None else tuple(map(int, said.split("x") if isinstance(said, str) else said))


def _packed(parts: Parts) -> dict[str, Stored]:
    if "weight_shape" not in parts:
        raise CheckpointError("packed weights lack weight_shape")
    outputs, inputs = (int(size) for size in parts["weight_shape"].read(None))
    bits = parts["weight_packed"].shape[1] * 32 // inputs
    if not 1 <= bits <= 8 or -(-inputs * bits // 32) != parts["weight_packed"].shape[1]:
        raise CheckpointError(
            f"packed weights of shape {list(parts['weight_packed'].shape)} do not hold {outputs} x {inputs}"
        )
    middle = 2 ** (bits - 1)

    def rows(values: dict[str, np.ndarray]) -> Any:
        scales, zeros = values["weight_scale"], np.zeros((outputs, 1), np.int16)
        if "weight_zero_point" in values:  # packed along outputs
            zeros = unpack(values["weight_zero_point"].T, bits).T[:outputs].astype(np.int16) - middle
            check_shape("weight_zero_point", zeros, scales.shape)
        check_shape("weight_scale", scales, (outputs, scales.shape[1]))
        groups = values["weight_g_idx"] if "weight_g_idx" in values else runs(inputs, scales.shape[1])
        check_groups(groups, inputs, scales.shape[1])

        def make(part: slice) -> np.ndarray:
            codes = unpack(values["weight_packed"][part], bits)[:, :inputs].astype(np.int16) - middle
            return _scaled(codes, scales[part][:, groups], zeros[part][:, groups % zeros.shape[1]])

        return make

    optional = {"weight_zero_point", "weight_g_idx"} & parts.keys()
    used = {"weight_packed", "weight_scale", "weight_shape"} | optional
    return restored(parts, used, (outputs, inputs), rows)


def _plain(parts: Parts, blocks: Collection[tuple[int, ...] | None]) -> dict[str, Stored]:
    outputs, inputs = parts["weight"].shape

    def rows(values: dict[str, np.ndarray]) -> Any:
        weight, scales = values["weight"], _grid(values["weight_scale"])
        zeros = _grid(values.get("weight_zero_point", np.zeros(1, np.int8)))
        down, across = _places((outputs, inputs), scales.shape, blocks)

        def make(part: slice) -> np.ndarray:
            found = scales[down[part]][:, across]
            shift = zeros[down[part] % len(zeros)][:, across % zeros.shape[1]]
            return _scaled(weight[part], found, shift)

        return make

    used = {"weight", "weight_scale"} | ({"weight_zero_point"} & parts.keys())
    return restored(parts, used, (outputs, inputs), rows)


def _grid(values: np.ndarray) -> np.ndarray:
    """Scales of a tensor or of its rows as those of blocks."""
    return values.reshape(-1, 1) if values.ndim < 2 else values


def _places(
    shape: tuple[int, int], grid: tuple[int, ...], blocks: Collection[tuple[int, ...] | None]
) -> tuple[np.ndarray, ...]:
    """In which of the `grid`'s blocks each row and each column is: one of the sizes said, or equal parts."""
    fitting = [
        block
        for block in blocks
        if block and grid == tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    ]
    if len(fitting) > 1:
        raise ValueError(f"scales of shape {list(grid)} for blocks of any of {fitting}")
    if fitting:  # the last one may be cut
        return tuple(np.arange(size) // part for size, part in zip(shape, fitting[0], strict=True))
    return tuple(runs(size, count) for size, count in zip(shape, grid, strict=True))


def _scaled(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    return (codes.astype(scales.dtype) - zeros.astype(scales.dtype)) * scales
