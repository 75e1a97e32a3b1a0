"""Weights of 4 and 8 bits as the floats that they stand for: one file a format, chosen by `quant_method`.

What is quantized the tensors themselves say, module by module, so modules that a checkpoint leaves out
(`modules_to_not_convert`, `ignore`) are read as they are. Arithmetic is in the types of each format's own
library, so values are equal to its own, and cast last.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from convert.errors import CheckpointError
from convert.quantized import awq, compressed, fp8, gptq
from convert.quantized.parts import fitting
from convert.stored import Stored

_FORMATS = {
    "fp8": fp8.restore,
    "awq": awq.restore,
    "gptq": gptq.restore,
    "compressed-tensors": compressed.restore,
}
_REFUSED = {
    "bitsandbytes": "its 4-bit codes can be read by bitsandbytes only: save the dequantized model",
    "fbgemm_fp8": "convert the original checkpoint",
    "mxfp4": "it is for mixtures of experts",
}
_OF_ACTIVATIONS = {
    *("activation_scale", "input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale"),
}


def dequantized(tensors: Mapping[str, Stored], settings: Any) -> dict[str, Stored]:
    """A checkpoint's tensors with a `weight` for every quantized module; none is read.

    `settings` is the quantization_config of config.json. Scales of activations are left out: we compute
    those in the model's own type.

    Raises:
        CheckpointError: the format is not supported, the message says why; or a module's tensors do not fit
            together, which may show only when one is read.
    """
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config must be a JSON object, got {settings!r:.60}")
    method = settings.get("quant_method")
    if method not in _FORMATS:
        reason = _REFUSED.get(str(method), f"choose one of {', '.join(_FORMATS)}")
        raise CheckpointError(f"weights quantized by {method!r} are not supported: {reason}")
    modules: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, field = name.rpartition(".")
        modules[module][field] = tensor
    return {
        f"{module}.{field}".removeprefix("."): tensor
        for module, parts in modules.items()
        for field, tensor in _restored(module, parts, settings).items()
        if field not in _OF_ACTIVATIONS
    }


def _restored(module: str, parts: Mapping[str, Stored], settings: Mapping[str, Any]) -> dict[str, Stored]:
    """One module's tensors; what does not fit together is said with its name, now or when it is read."""
    with fitting(module):
        found = _FORMATS[settings["quant_method"]](parts, settings)

    def read(tensor: Stored, dtype: DTypeLike | None) -> np.ndarray:
        with fitting(module):
            return tensor.read(dtype)

    return {
        field: tensor if tensor is parts.get(field) else tensor._replace(read=functools.partial(read, tensor))
        for field, tensor in found.items()
    }
