"""AWQ: weights of 4 bits with a zero and a scale for each group of inputs, eight outputs to a word.

Source: AutoAWQ, `awq/utils/packing_utils.py` (the GEMM layout).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import CheckpointError
from convert.quantized.parts import Parts, check_shape, restored, runs, unpack
from convert.stored import Stored

_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word each of its eight outputs stands


def restore(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Stored]:
    """The module's tensors, its weight dequantized in the scales' type if it is packed.

    Raises:
        CheckpointError: the weights are not of 4 bits in the GEMM layout.
    """
    if "qweight" not in parts:
        return dict(parts)
    bits, layout = settings.get("bits", settings.get("w_bit", 4)), settings.get("version", "gemm")
    if bits != 4 or str(layout).lower() != "gemm":
        raise CheckpointError(
            f"AWQ weights of {bits} bits, version {layout!r}, are not supported: only 4, gemm"
        )
    inputs, words = parts["qweight"].shape

    def rows(values: dict[str, np.ndarray]) -> Any:
        scales = values["scales"]
        groups = runs(inputs, len(scales))
        check_shape("scales", scales, (len(scales), 8 * words))
        check_shape("qzeros", values["qzeros"], (len(scales), words))

        def make(part: slice) -> np.ndarray:
            columns = slice(part.start // 8, part.stop // 8)
            codes, zeros = (_ordered(values[name][:, columns]) for name in ("qweight", "qzeros"))
            shifted = codes.astype(np.int8) - zeros.astype(np.int8)[groups]
            return (shifted.astype(scales.dtype) * scales[:, part][groups]).T

        return make

    return restored(parts, {"qweight", "qzeros", "scales"}, (8 * words, inputs), rows, multiple=8)


def _ordered(words: np.ndarray) -> np.ndarray:
    return unpack(words, 4).reshape(len(words), -1, 8)[:, :, _ORDER].reshape(len(words), -1)
