"""Quantized weights are what their format defines, to the bit; other formats are refused by name."""

import ml_dtypes
import numpy as np
import pytest

from convert.errors import CheckpointError
from convert.quantized import dequantized
from convert.quantized.parts import unpack
from convert.stored import Stored, stored_tensors

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
RANDOM = np.random.default_rng(0)


def held(tensors, module="layer"):
    def one(values):
        kind = "F32" if values.dtype.kind == "f" else "I32"
        return Stored(
            None, values.shape, kind, lambda dtype: values if dtype is None else values.astype(dtype)
        )

    return {f"{module}.{field}": one(values) for field, values in tensors.items()}


def weight(tensors, settings, dtype="float32"):
    return dequantized(held(tensors), settings)["layer.weight"].read(dtype)


def packed(codes, bits):
    """Rows of codes one after the other in words of 32 bits, one code at a time."""
    words = np.zeros((len(codes), -(-codes.shape[1] * bits // 32)), np.uint64)
    for row, values in zip(words, codes, strict=True):
        whole = sum(int(value) << (bits * index) for index, value in enumerate(values))
        row[:] = [(whole >> (32 * index)) & 0xFFFFFFFF for index in range(len(row))]
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_undoes_packing(bits):
    codes = RANDOM.integers(0, 2**bits, (3, 64), np.uint8)
    np.testing.assert_array_equal(unpack(packed(codes, bits), bits), codes)


@pytest.mark.parametrize("shape", [(8, 12), (7, 10)])  # blocks of 4, whole and cut
def test_fp8_blocks(shape):
    values = RANDOM.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
    scales = RANDOM.random((2, 3), np.float32)
    expected = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i, j] = np.float32(values[i, j]) * scales[i // 4, j // 4]
    tensors = {"weight": values, "weight_scale_inv": scales}
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    assert list(dequantized(held(tensors | {"activation_scale": scales}), settings)) == ["layer.weight"]
    np.testing.assert_array_equal(weight(tensors, settings), expected)
    with pytest.raises(CheckpointError, match=r"have scales of shape \[2, 3\]"):
        weight(tensors, settings | {"weight_block_size": [2, 4]})


def test_awq():
    codes, zeros = RANDOM.integers(0, 16, (8, 16), np.uint8), RANDOM.integers(0, 16, (2, 16), np.uint8)
    scales = RANDOM.random((2, 16), np.float32).astype(np.float16)
    places = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # the output that stands at each place of a word
    order = np.concatenate([places, places + 8])
    tensors = {"qweight": packed(codes[:, order], 4), "qzeros": packed(zeros[:, order], 4), "scales": scales}
    expected = np.empty((16, 8), np.float16)
    for i in range(8):
        for o in range(16):
            expected[o, i] = np.float16(int(codes[i, o]) - int(zeros[i // 4, o])) * scales[i // 4, o]
    np.testing.assert_array_equal(weight(tensors, {"quant_method": "awq", "bits": 4}), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(bits, layout, act_order):
    codes = RANDOM.integers(0, 2**bits, (32, 32), np.uint8)
    zeros = RANDOM.integers(0, 2**bits, (2, 32), np.uint8)
    scales = RANDOM.random((2, 32), np.float32).astype(np.float16)
    groups = RANDOM.permutation(32) % 2 if act_order else np.arange(32) // 16
    stored = (zeros - (layout == "gptq")) & (2**bits - 1)
    tensors = {"qweight": packed(codes.T, bits).T, "qzeros": packed(stored, bits), "scales": scales}
    tensors |= {"g_idx": groups.astype(np.int32)} if act_order else {}
    expected = np.empty((32, 32), np.float16)
    for i in range(32):
        for o in range(32):
            g = groups[i]
            expected[o, i] = scales[g, o] * np.float16(int(codes[i, o]) - int(zeros[g, o]))
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": layout}
    np.testing.assert_array_equal(weight(tensors, settings), expected)


CT = {"quant_method": "compressed-tensors"}
GPTQ, AWQ = {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4}
PACKED = {
    "gptq": {"qweight": (4, 32), "qzeros": (2, 4), "scales": (2, 32), "g_idx": (32,)},
    "awq": {"qweight": (32, 4), "qzeros": (2, 4), "scales": (2, 32)},
    "compressed-tensors": {"weight_packed": (32, 4), "weight_scale": (32, 2)},
}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (GPTQ, {"g_idx": np.full(32, 7, np.int32)}),
        (GPTQ, {"g_idx": np.full(32, -1, np.int32)}),
        (GPTQ, {"g_idx": np.zeros(16, np.int32)}),
        (GPTQ, {"scales": np.ones((2, 64), np.float16)}),
        (GPTQ, {"scales": np.ones((3, 32), np.float16)}),
        (GPTQ, {"qzeros": np.zeros((1, 4), np.int32)}),
        (GPTQ | {"bits": 4.0}, {}),
        (AWQ, {"scales": np.ones((2, 64), np.float16)}),
        (AWQ, {"scales": np.ones((3, 32), np.float16), "qzeros": np.zeros((3, 4), np.int32)}),
        (AWQ, {"scales": np.ones((0, 32), np.float16)}),
        (AWQ, {"qzeros": np.zeros((1, 4), np.int32)}),
        (CT, {"weight_shape": np.array([32, 32, 1])}),
        (CT, {"weight_shape": np.array([32, 0])}),
        (CT, {"weight_scale": np.ones((32, 40), np.float16)}),
        (CT, {"weight_scale": np.ones((32, 3), np.float16)}),
        (CT, {"weight_g_idx": np.full(32, 9, np.int32)}),
        (CT | {"config_groups": [1]}, {}),
    ],
)
def test_what_does_not_fit_together_is_refused(settings, changes):
    """NumPy takes part of what is too large, counts negative groups from the end, and else fails oddly."""
    shapes = PACKED[settings["quant_method"]]
    kinds = {"scales": np.float16, "weight_scale": np.float16}
    tensors = {field: np.zeros(shape, kinds.get(field, np.int32)) for field, shape in shapes.items()}
    tensors |= {"weight_shape": np.array([32, 32])} if settings["quant_method"] == CT["quant_method"] else {}
    assert weight(tensors, {"bits": 4, "quant_method": settings["quant_method"]}).shape == (32, 32)
    with pytest.raises(CheckpointError, match="quantized weights of layer do not fit together"):
        weight(tensors | changes, settings)


@pytest.mark.parametrize("blocks", [16, [0, 0], ["a", "b"], [4, 4, 4]])
def test_blocks_of_no_size_are_refused(blocks):
    tensors = {"weight": np.zeros((8, 8), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((2, 2))}
    with pytest.raises(CheckpointError, match="quantized weights of layer do not fit together"):
        weight(tensors, {"quant_method": "fp8", "weight_block_size": blocks})


@pytest.mark.parametrize("settings", [[1], "gptq"])
def test_settings_of_another_kind_are_refused(settings):
    with pytest.raises(CheckpointError, match="quantization_config must be a JSON object, got"):
        dequantized({}, settings)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_compressed_tensors_packed(bits, zero_points, act_order, groups):
    half = 2 ** (bits - 1)
    codes = RANDOM.integers(-half, half, (32, 32))
    zeros = RANDOM.integers(-half, half, (32, groups)) * zero_points
    scales = RANDOM.random((32, groups), np.float32).astype(BF16)
    index = RANDOM.permutation(32) % groups if act_order else np.arange(32) // (32 // groups)
    tensors = {
        "weight_packed": packed(codes + half, bits),
        "weight_scale": scales,
        "weight_shape": np.array([32, 32]),
    }
    tensors |= {"weight_zero_point": packed((zeros + half).T, bits).T} if zero_points else {}
    tensors |= {"weight_g_idx": index.astype(np.int32)} if act_order else {}
    expected = (codes - zeros[:, index]).astype(BF16) * scales[:, index]
    got = weight(tensors, CT | {"format": "pack-quantized"}, BF16)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("scales", [(1,), (8, 1), (2, 3)], ids=["tensor", "channel", "block"])
def test_compressed_tensors_of_8_bits(scales):
    values = RANDOM.standard_normal((8, 12)).astype(ml_dtypes.float8_e4m3fn)
    factors = RANDOM.random(scales, np.float32).astype(BF16)
    wide = factors.reshape(-1, 1) if len(scales) == 1 else factors
    wide = np.repeat(np.repeat(wide, 8 // wide.shape[0], 0), 12 // wide.shape[1], 1)
    tensors = {"weight": values, "weight_scale": factors, "input_scale": factors}
    found = dequantized(held(tensors), CT | {"format": "float-quantized"})
    assert list(found) == ["layer.weight"]
    np.testing.assert_array_equal(found["layer.weight"].read(BF16), values.astype(BF16) * wide)


@pytest.mark.parametrize("structure", [[5, 5], "5x5"])
def test_the_last_of_compressed_tensors_blocks_may_be_cut(structure):
    values = RANDOM.integers(-9, 9, (12, 12)).astype(np.int8)
    factors = RANDOM.random((3, 3), np.float32)
    expected = values * np.repeat(np.repeat(factors, 5, 0), 5, 1)[:12, :12]
    said = CT | {"config_groups": {"g": {"weights": {"block_structure": structure}}}}
    tensors = {"weight": values, "weight_scale": factors}
    np.testing.assert_array_equal(weight(tensors, said), expected)


@pytest.mark.parametrize("structures", [[], [[9, 9]], [[5, 5], [6, 6]]])
def test_blocks_of_sizes_that_are_not_said_are_not_guessed(structures):
    tensors = {"weight": np.ones((13, 13), np.int8), "weight_scale": np.ones((3, 3), np.float32)}
    groups = {str(i): {"weights": {"block_structure": block}} for i, block in enumerate(structures)}
    with pytest.raises(CheckpointError, match="quantized weights of layer do not fit together"):
        weight(tensors, CT | {"config_groups": groups})


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "compressed-tensors"])
def test_modules_that_are_left_out_are_as_they_are(method):
    tensors = held({"weight": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}, "lm_head")
    assert dequantized(tensors, {"quant_method": method}) == tensors


def test_floats_of_8_bits_are_read_from_safetensors(tmp_path):
    import json

    values = RANDOM.standard_normal((3, 4)).astype(ml_dtypes.float8_e4m3fn)
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [3, 4], "data_offsets": [0, 12]}}).encode()
    content = len(header).to_bytes(8, "little") + header + values.tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    stored = stored_tensors(tmp_path)["w"]
    assert stored.kind == "F8_E4M3"
    np.testing.assert_array_equal(stored.read(None), values)
    np.testing.assert_array_equal(stored.read("float32"), values.astype(np.float32))


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ([], {"quant_method": "bitsandbytes"}, "'bitsandbytes' are not supported: its 4-bit codes"),
        ([], {"quant_method": "quip"}, "'quip' are not supported: choose one of fp8, awq"),
        (["qweight"], {"quant_method": "awq", "version": "gemv"}, "version 'gemv', are not supported"),
        (["qweight"], {"quant_method": "awq"}, "quantized weights lack qzeros, scales beside qweight"),
        (["qweight"], {"quant_method": "gptq", "bits": 5}, "GPTQ weights of 5 bits"),
        (["weight"], CT | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not"),
        (["weight_packed"], CT, "packed weights lack weight_shape"),
    ],
)
def test_refusals(tensors, settings, message):
    parts = held({field: np.zeros((8, 8), np.int32) for field in tensors})
    with pytest.raises(CheckpointError, match=message):
        dequantized(parts, settings)


@pytest.fixture
def library(torch):
    """compressed-tensors, which reads its own formats and AutoAWQ's: NumPy's arrays in and out."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import FloatQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.entrypoints.convert import AutoAWQConverter, FP8BlockDequantizer
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    class Library:
        packed, floats = PackedQuantizationCompressor, FloatQuantizationCompressor
        awq, fp8 = AutoAWQConverter, FP8BlockDequantizer

        @staticmethod
        def scheme(**weights):
            return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))

        @staticmethod
        def arrays(tensors):
            views = {torch.bfloat16: (torch.int16, BF16), torch.float8_e4m3fn: (torch.uint8, FP8)}
            return {
                name: tensor.view(views[tensor.dtype][0]).numpy().view(views[tensor.dtype][1])
                if tensor.dtype in views
                else tensor.numpy()
                for name, tensor in tensors.items()
            }

    return Library


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_packed_weights_are_what_compressed_tensors_makes_of_them(torch, library, bits, symmetric, strategy):
    half, groups = 2 ** (bits - 1), 2 if strategy == "group" else 1
    size = {"group_size": 32} if strategy == "group" else {}
    scheme = library.scheme(num_bits=bits, symmetric=symmetric, strategy=strategy, **size)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(32, 64, generator=generator).to(torch.bfloat16),
        "weight_scale": (torch.rand(32, groups, generator=generator) / half).to(torch.bfloat16),
        "weight_zero_point": torch.randint(-half, half, (32, groups), generator=generator, dtype=torch.int8),
    }
    if symmetric:
        tensors["weight_zero_point"].zero_()
    stored = library.packed.compress(tensors, scheme)
    expected = library.packed.decompress(stored, scheme)
    got = weight(library.arrays(stored), CT | {"format": "pack-quantized"}, BF16)
    np.testing.assert_array_equal(got, library.arrays(expected)["weight"])


def test_awq_weights_are_what_compressed_tensors_makes_of_them(torch, library):
    codes, zeros = (RANDOM.integers(-(2**31), 2**31, shape, np.int32) for shape in ((64, 4), (2, 4)))
    tensors = {"qweight": codes, "qzeros": zeros, "scales": RANDOM.random((2, 32)).astype(np.float16)}
    named = {f"layer.{name}": torch.from_numpy(tensor) for name, tensor in tensors.items()}
    stored = library.awq(group_size=32).process(named)
    scheme = library.scheme(num_bits=4, symmetric=False, strategy="group", group_size=32)
    local = {name.removeprefix("layer."): tensor for name, tensor in stored.items()}
    expected = library.arrays(library.packed.decompress(local, scheme))["weight"]
    np.testing.assert_array_equal(weight(tensors, {"quant_method": "awq", "bits": 4}, np.float16), expected)


@pytest.mark.parametrize("shape", [(8, 12), (7, 10)])
def test_fp8_blocks_are_what_compressed_tensors_makes_of_them(torch, library, shape):
    tensors = {
        "weight": torch.from_numpy(RANDOM.standard_normal(shape)).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.from_numpy(RANDOM.random((2, 3), np.float32)),
    }
    convert = library.fp8(weight_block_size=(4, 4))
    expected = convert.process({f"layer.{name}": tensor for name, tensor in tensors.items()})["layer.weight"]
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    got = weight(library.arrays(tensors), settings, BF16)
    np.testing.assert_array_equal(got, library.arrays({"": expected})[""])


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_floats_of_8_bits_are_what_compressed_tensors_makes_of_them(torch, library, strategy):
    scheme = library.scheme(num_bits=8, type="float", symmetric=True, strategy=strategy)
    tensors = {
        "weight": torch.from_numpy(RANDOM.standard_normal((8, 12))).to(torch.bfloat16),
        "weight_scale": torch.from_numpy(RANDOM.random((8, 1) if strategy == "channel" else (1,))).to(
            torch.bfloat16
        ),
    }
    stored = library.floats.compress(tensors, scheme)
    expected = library.arrays(library.floats.decompress(stored, scheme))["weight"]
    got = weight(library.arrays(stored), CT | {"format": "float-quantized"}, BF16)
    np.testing.assert_array_equal(got, expected)
