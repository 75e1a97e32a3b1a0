"""Fine-grained FP8: a float of 8 bits for each weight, a scale for each block of rows and columns.

Source: transformers, `integrations/finegrained_fp8.py` (DeepSeek-V3's layout).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import CheckpointError
from convert.quantized.parts import Parts, restored
from convert.stored import Stored


def restore(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Stored]:
    """The module's tensors, its weight multiplied by its scales in float32 if it has any.

    Raises:
        CheckpointError: the scales' shape does not fit the weight's and the blocks'.
    """
    if "weight_scale_inv" not in parts:
        return dict(parts)
    shape, grid = parts["weight"].shape, parts["weight_scale_inv"].shape
    block = tuple(settings.get("weight_block_size") or shape)
    if len(grid) == 2 and tuple(-(-size // part) for size, part in zip(shape, block, strict=True)) != grid:
        raise CheckpointError(
            f"FP8 weights of shape {list(shape)} in blocks of {list(block)} have scales of shape {list(grid)}"
        )

    def rows(values: dict[str, np.ndarray]) -> Any:
        weight, scales = values["weight"], values["weight_scale_inv"].astype(np.float32)
        scales = scales.reshape(1, 1) if scales.ndim != 2 else scales
        wide = np.repeat(scales, block[1], axis=1)[:, : shape[1]]
        return lambda part: (
            weight[part].astype(np.float32) * wide[np.arange(part.start, part.stop) // block[0]]
        )

    return restored(parts, {"weight", "weight_scale_inv"}, shape, rows)
