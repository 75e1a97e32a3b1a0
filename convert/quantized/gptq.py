"""GPTQ: weights of 2, 3, 4 or 8 bits, packed along inputs, with a zero and a scale for each group of inputs.

`g_idx` says which group an input belongs to; after act-order that is no run of neighbours.

Source: AutoGPTQ and GPTQModel, `qlinear_torch`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.errors import CheckpointError
from convert.quantized.parts import Parts, check_groups, check_shape, restored, runs, unpack
from convert.stored import Stored

_BITS = (2, 3, 4, 8)


def restore(parts: Parts, settings: Mapping[str, Any]) -> dict[str, Stored]:
    """The module's tensors, its weight dequantized in the scales' type if it is packed.

    Raises:
        CheckpointError: the number of bits, or the way they are stored, is not supported.
    """
    if "qweight" not in parts:
        return dict(parts)
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in _BITS or layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"GPTQ weights of {bits} bits, checkpoint_format {layout!r}, are not supported: only "
            f"{', '.join(map(str, _BITS))}, gptq or gptq_v2"
        )
    words, outputs = parts["qweight"].shape
    inputs = words * 32 // bits

    def rows(values: dict[str, np.ndarray]) -> Any:
        scales = values["scales"]
        zeros = unpack(values["qzeros"], bits)[:, :outputs]
        if layout == "gptq":  # stored less one
            zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
        check_shape("scales", scales, (len(scales), outputs))
        check_shape("qzeros", zeros, (len(scales), outputs))
        groups = values["g_idx"] if "g_idx" in values else runs(inputs, len(scales))
        check_groups(groups, inputs, len(scales))

        def make(part: slice) -> np.ndarray:
            codes = unpack(values["qweight"][:, part].T, bits).astype(np.int16)
            shifted = codes - zeros[:, part].T.astype(np.int16)[:, groups]
            return shifted.astype(scales.dtype) * scales[:, part].T[:, groups]

        return make

    used = {"qweight", "qzeros", "scales"} | ({"g_idx"} & parts.keys())
    return restored(parts, used, (outputs, inputs), rows)
