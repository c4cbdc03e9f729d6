"""The packed layers equal the simulated ones up to float rounding, for every scheme and every kernel."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bantamweight import _C, QuantizedWeight
from bantamweight.errors import BantamweightError, KernelError
from bantamweight.nn import (
    PackedChain,
    PackedConv2d,
    PackedLinear,
    PackedLinears,
    SimulatedConv2d,
    SimulatedLinear,
    Stage,
)
from bantamweight.ops.quantized_rows import quantize_rows

SCHEMES = [(3, None), (3, 32), (4, None), (4, 16), (7, None), (8, 64), (15, 128), (16, None), (16, 32), (256, None)]
KERNELS = [name for name, missing in _C.linear_variants() if not missing]


def weight(n: int, k: int, levels: int = 16, group_size: int | None = None, symmetric: bool = True) -> QuantizedWeight:
    groups = -(-k // (group_size or max(k, 1)))
    codes = torch.randint(0, levels, (n, k), dtype=torch.uint8)
    zero = float(levels // 2) if symmetric else torch.rand(n, groups) * levels
    return QuantizedWeight.from_codes(codes, torch.rand(n, groups) + 0.1, zero, group_size=group_size, levels=levels)


def assert_equal_to_rounding(packed: PackedLinear, x: torch.Tensor) -> None:
    """Within float rounding of the simulated form: 1e-6 of the terms that are summed (the sum may cancel)."""
    simulated = SimulatedLinear(packed.quantized, packed.bias, activation_bits=8)
    ours, expected = packed(x), simulated(x)
    assert ours.shape == expected.shape
    if ours.numel() > 0:
        w = packed.quantized
        terms = QuantizedWeight.from_codes(w.codes, w.scale, -w.zero, group_size=w.group_size, levels=w.levels)
        size = x.abs() @ terms.dequantize().T + (0.0 if packed.bias is None else packed.bias.abs())
        assert ((ours - expected).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize(("levels", "group_size"), SCHEMES)
@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_packed_equals_simulated(levels: int, group_size: int | None, symmetric: bool) -> None:
    for n, k in ((1, 1), (7, 65), (48, 333), (130, 512)):
        w, bias = weight(n, k, levels, group_size, symmetric), torch.randn(n)
        packed = PackedLinear.from_quantized(w, bias)
        assert packed.quantized.equals(w)
        for shape in ((k,), (1, k), (3, k), (2, 2, 33, k), (0, k), (2, 0, k)):
            assert_equal_to_rounding(packed, torch.randn(shape))


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_every_kernel_can_be_forced(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
    packed = PackedLinear.from_quantized(weight(70, 200, 8, 64))
    assert packed.kernel == kernel and f"packed W3-g64 {kernel}" in repr(packed)
    assert_equal_to_rounding(packed, torch.randn(9, 200))


TRIT_KERNELS = [name for name in KERNELS if name in ("amx", "avx512_vbmi")]


@pytest.mark.skipif(not TRIT_KERNELS, reason="no kernel of this CPU stores ternary codes in 5/3 bits")
@torch.no_grad()
def test_large_ternary_layers_take_fewer_than_two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    n, k = 1303, 8190
    large, bias = weight(n, k, 3), torch.randn(n)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", "avx512_vnni")
        plain = PackedLinear.from_quantized(large, bias)
        small = PackedLinear.from_quantized(weight(40, k))
        assert plain.stored_bits == 2 and "bits in memory" not in repr(plain)
        for kernel in TRIT_KERNELS:
            monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
            packed = PackedLinear.from_quantized(large, bias)
            assert packed.kernel == kernel and f"packed ternary {kernel}, 1.67 bits in memory" in repr(packed)
            assert packed.layout.nbytes < 0.85 * plain.layout.nbytes
            assert packed.quantized.equals(large)
            loaded = PackedLinear.from_quantized(weight(n, k, 3), torch.zeros(n))
            loaded.load_state_dict(packed.state_dict())
            assert loaded.stored_bits == packed.stored_bits and torch.equal(loaded.layout, packed.layout)
            for rows in (1, 2, 5, 70):
                x = torch.randn(rows, k)
                assert torch.equal(packed(x), plain(x))
            x = torch.randn(3, k)
            assert torch.equal(PackedLinears([packed, small])(x)[0], plain(x))
            torch.set_num_threads(before)
            assert torch.equal(copy.deepcopy(packed)(x), plain(x))  # packed for one thread, run with others
            torch.set_num_threads(1)
            for activations in ("int8-block", "int16"):
                assert PackedLinear.from_quantized(large, activations=activations).stored_bits == 2
            assert PackedLinear.from_quantized(weight(n, k, 3, 630)).stored_bits == 2
    finally:
        torch.set_num_threads(before)


def test_a_kernel_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", "abacus")
    with pytest.raises(KernelError, match="BANTAMWEIGHT_FORCE_KERNEL=abacus names no kernel"):
        PackedLinear.from_quantized(weight(4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_inputs_of_any_strides_and_float_dtypes(dtype: torch.dtype) -> None:
    packed = PackedLinear.from_quantized(weight(16, 40), torch.randn(16))
    x = torch.randn(40, 6).to(dtype)
    y = packed(x.T)
    assert y.dtype == dtype and torch.equal(y, packed(x.T.float().contiguous()).to(dtype))
    wide = torch.randn(6, 80).to(dtype)
    assert torch.equal(packed(wide[:, ::2]), packed(wide[:, ::2].contiguous()))


@torch.no_grad()
def test_torchs_defaults_do_not_leak_in() -> None:
    packed, x = PackedLinear.from_quantized(weight(16, 40)), torch.randn(6, 40)
    y = packed(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(packed(x), y) and packed(x).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(packed(x), y)


@torch.no_grad()
def test_forms_load_each_others_state_dicts() -> None:
    w, bias = weight(16, 40, 3, 16), torch.randn(16)
    packed, simulated = PackedLinear(w, bias), SimulatedLinear(w, bias, activation_bits=8)
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, simulated.state_dict()[name])
    x = torch.randn(5, 40)
    expected = packed(x)
    other = PackedLinear(weight(16, 40), torch.zeros(16))
    other.load_state_dict(simulated.state_dict())
    assert torch.equal(other(x), expected) and other.quantized.equals(w) and other.scheme == "ternary-g16"
    other = SimulatedLinear(weight(16, 40), torch.zeros(16), activation_bits=8)
    other.load_state_dict(packed.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="a weight of 16x41 came for a PackedLinear of 16x40"):
        packed.load_state_dict(SimulatedLinear(weight(16, 41), torch.zeros(16)).state_dict())


@torch.no_grad()
def test_hooks_run() -> None:
    layer, x, seen = PackedLinear(weight(8, 16)), torch.randn(3, 16), []
    plain = layer(x)
    removable = [
        layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
        layer.register_forward_hook(lambda module, inputs, y: y + 1.0),
        torch.nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: seen.append("before")),
        torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append("after")),
    ]
    assert torch.equal(layer(x), 2.0 * plain + 1.0)
    assert seen == ["before", "after"]
    for index in (0, 2, 1):  # whatever is left alone still runs
        removable[index].remove()
        expected = plain + 1.0 if index != 1 else plain
        seen.clear()
        assert torch.equal(layer(x), expected)
        assert seen == (["before", "after"] if index == 0 else ["after"])
    removable[3].remove()
    assert torch.equal(layer(input=x), plain)


def test_a_deep_copy_outlives_the_original() -> None:
    packed = PackedLinear(weight(64, 64), torch.randn(64))
    x = torch.randn(2, 64)
    expected = packed(x)
    twin = copy.deepcopy(packed)
    assert twin.layout.data_ptr() != packed.layout.data_ptr()
    packed.layout.zero_()
    packed.bias.zero_()
    assert torch.equal(twin(x), expected)


@torch.no_grad()
def test_a_replaced_bias_is_used() -> None:
    packed, x = PackedLinear(weight(8, 16), torch.zeros(8)), torch.randn(2, 16)
    without = packed(x)
    packed.bias = torch.ones(8)
    torch.testing.assert_close(packed(x), without + 1)
    packed.load_state_dict(packed.state_dict() | {"bias": torch.full((8,), 2.0)})
    torch.testing.assert_close(packed(x), without + 2)
    packed.load_state_dict(packed.state_dict() | {"bias": torch.full((8,), 3.0)}, assign=True)
    torch.testing.assert_close(packed(x), without + 3)


@torch.no_grad()
def test_moves_and_dtypes_leave_the_weights_alone() -> None:
    packed, x = PackedLinear(weight(8, 16), torch.randn(8) / 3), torch.randn(2, 16)
    expected = packed(x)
    net = torch.nn.Sequential(packed).half().double().to("cpu").share_memory()
    assert torch.equal(net(x), expected) and packed.bias is not None and packed.bias.dtype == torch.float32
    with pytest.raises(BantamweightError, match="PackedLinear 8x16 is packed for the CPU and cannot move to meta"):
        net.to("meta")
    assert torch.equal(net(x), expected)


def test_refuses_inputs_with_a_sentence() -> None:
    packed = PackedLinear(weight(8, 16))
    for x, says in (
        (torch.zeros(2, 15), r"PackedLinear 8x16 takes inputs \[..., 16\], but \[2, 15\] came"),
        (torch.tensor(1.0), r"but \[\] came"),
        (torch.zeros(2, 16, dtype=torch.float64), "float64 came; convert with .float()"),
        (torch.zeros(2, 16, dtype=torch.int64), "int64 came"),
        (torch.full((2, 16), float("nan")), "PackedLinear 8x16: the input holds NaN or infinity"),
        (torch.zeros(2, 16, requires_grad=True), "requires a gradient; call it under torch.no_grad"),
    ):
        with pytest.raises(BantamweightError, match=says):
            packed(x)
    with torch.no_grad():
        assert packed(torch.zeros(2, 16, requires_grad=True)).shape == (2, 8)
    with torch.inference_mode():
        assert packed(torch.zeros(2, 16)).shape == (2, 8)


def test_refuses_weights_no_kernel_takes() -> None:
    w = weight(2, 70000, 16, 68000)
    with pytest.raises(KernelError, match="no kernel takes a 2x70000 weight in groups of 68000"):
        PackedLinear.from_quantized(w)
    with pytest.raises(BantamweightError, match=r"bias is torch.float32 \[3\], but 8 channels"):
        PackedLinear.from_quantized(weight(8, 16), torch.zeros(3))


@torch.no_grad()
def test_a_long_row_is_summed_exactly() -> None:
    w, x = weight(3, 70001, 256), torch.ones(1, 70001)
    packed = PackedLinear(w)
    assert packed.quantized.equals(w)
    codes = w.codes.long() - w.zero.long()
    torch.testing.assert_close(packed(x), (codes.sum(1) * w.scale[:, 0].double()).float().view(1, 3), rtol=1e-6, atol=0)


@torch.no_grad()
def test_threads_do_not_change_the_result() -> None:
    packed, x = PackedLinear(weight(300, 400)), torch.randn(100, 400)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@torch.no_grad()
def test_python_threads_share_a_layer() -> None:
    linear = PackedLinear(weight(64, 48), torch.randn(64))
    conv = PackedConv2d.from_quantized(weight(8, 36), in_channels=4, kernel_size=3)
    inputs = [(torch.randn(5 + i, 48), torch.randn(1 + i % 3, 4, 9, 9)) for i in range(12)]
    expected = [(linear(x), conv(image)) for x, image in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda pair: (linear(pair[0]), conv(pair[1])), inputs))
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "groups": 4, "bias": False},
    {"kernel_size": 3, "groups": 8, "padding": 1},  # depthwise
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 1, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's note about its own copy
@pytest.mark.parametrize("arguments", CONVOLUTIONS)
@pytest.mark.parametrize(("levels", "group_size"), [(3, None), (8, 8), (16, None), (256, None)])
@torch.no_grad()
def test_packed_conv_equals_simulated(arguments: dict, levels: int, group_size: int | None) -> None:
    conv = torch.nn.Conv2d(8, 8, **arguments)
    w = weight(8, conv.weight[0].numel(), levels, group_size, symmetric=levels != 16)
    oracle = SimulatedConv2d.from_float(conv, w, activation_bits=8)
    packed = PackedConv2d.from_quantized(w, conv.bias, **vars(oracle.geometry))
    assert packed.quantized.equals(w)
    for shape in ((2, 8, 9, 11), (1, 8, 5, 5), (8, 9, 11), (0, 8, 9, 11)):
        x = torch.randn(shape)
        ours, expected = packed(x), oracle(x)
        assert ours.shape == expected.shape
        if x.numel() > 0:
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    x = torch.randn(2, 8, 9, 11).to(memory_format=torch.channels_last)
    torch.testing.assert_close(packed(x), packed(x.contiguous()), rtol=0, atol=0)
    assert packed(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_packed_conv_copies_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(6, 36, 3), torch.randn(2, 4, 7, 7)
    packed = PackedConv2d.from_quantized(w, torch.randn(6), in_channels=4, kernel_size=3, padding=1)
    assert "padding=(1, 1)" in repr(packed) and f"packed ternary {packed.kernel}" in repr(packed)
    expected = packed(x)
    twin = copy.deepcopy(packed)
    packed.layout.zero_()
    assert torch.equal(twin(x), expected)
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", "reference")
    other = PackedConv2d.from_quantized(weight(6, 36), torch.zeros(6), in_channels=4, kernel_size=3, padding=1)
    other.load_state_dict(twin.state_dict())
    assert other.kernel == "reference" and torch.equal(other(x), expected)


def test_packed_conv_refuses_with_a_sentence() -> None:
    packed = PackedConv2d.from_quantized(weight(6, 36), in_channels=4, kernel_size=3)
    for x, says in (
        (torch.zeros(2, 5, 7, 7), r"takes inputs \[n, 4, h, w\], but \[2, 5, 7, 7\] came"),
        (torch.zeros(2, 4, 2, 7), "takes images of at least 3x3"),
        (torch.zeros(4, 4), r"\[4, 4\] came"),
        (torch.zeros(2, 4, 7, 7, dtype=torch.float64), "float64 came"),
        (torch.full((2, 4, 7, 7), float("inf")), "NaN or infinity"),
        (torch.zeros(2, 4, 7, 7, requires_grad=True), "PackedConv2d 6x36 is for inference"),
    ):
        with pytest.raises(BantamweightError, match=says):
            packed(x)
    with pytest.raises(BantamweightError, match="whose matrix has 72 columns"):
        PackedConv2d.from_quantized(weight(6, 36), in_channels=8, kernel_size=3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activations", ["int8-block", "int16"])
@torch.no_grad()
def test_finer_activations_equal_the_simulated_form(
    kernel: str, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
    for n, k, levels, group_size in ((7, 65, 3, None), (48, 333, 16, None), (130, 512, 16, 128), (20, 200, 256, 32)):
        w, bias = weight(n, k, levels, group_size, symmetric=False), torch.randn(n)
        packed = PackedLinear.from_quantized(w, bias, activations=activations)
        assert packed.kernel == kernel and packed.quantized.equals(w)
        assert repr(packed).endswith(f"{kernel}, {activations} inputs)")
        simulated = SimulatedLinear(w, bias, activation_bits=8, activations=activations)
        for shape in ((k,), (1, k), (3, k), (2, 33, k), (0, k)):
            x = torch.randn(shape)
            x[..., ::50] *= 20
            ours, expected = packed(x), simulated(x)
            terms = QuantizedWeight.from_codes(w.codes, w.scale, -w.zero, group_size=group_size, levels=levels)
            # What a block is counted from is as large as its largest, and is added and taken off again.
            reach = x.abs() if activations == "int16" else x.abs().amax(-1, keepdim=True).expand_as(x)
            size = reach @ terms.dequantize().T + bias.abs()
            assert ours.shape == expected.shape and ((ours - expected).abs() <= 2e-6 * size).all()


@torch.no_grad()
def test_error_of_each_activation_mode() -> None:
    """Relative to the float matmul: the bounds that are promised, and what blocks gain where columns stand out."""
    torch.manual_seed(0)
    w = QuantizedWeight.from_codes(torch.randint(0, 15, (256, 1024), dtype=torch.uint8), 0.1, 7.0, levels=15)
    gaussian = torch.randn(64, 1024)
    outliers = gaussian.clone()
    outliers[:, [3, 500, 777]] *= 40
    errors = {}
    for activations in ("int8", "int8-block", "int16"):
        layer = PackedLinear.from_quantized(w, activations=activations)
        for name, x in (("gaussian", gaussian), ("outliers", outliers)):
            exact = x @ w.dequantize().T
            errors[activations, name] = float((layer(x) - exact).norm() / exact.norm())
    assert errors["int8", "gaussian"] <= 1.1e-2
    assert errors["int8-block", "gaussian"] <= 6e-3
    assert errors["int16", "gaussian"] <= 5e-5 and errors["int16", "outliers"] <= 4e-4
    assert errors["int8-block", "outliers"] <= 0.4 * errors["int8", "outliers"]


def test_activations_that_do_not_exist_or_fit() -> None:
    with pytest.raises(BantamweightError, match="activations is 'int4', but must be one of 'int8', 'int8-block'"):
        PackedLinear.from_quantized(weight(4, 8), activations="int4")
    with pytest.raises(BantamweightError, match="activations is 'int4'"):
        SimulatedLinear(weight(4, 8), activations="int4")
    with pytest.raises(KernelError, match="which groups of 33 neither divide nor are a multiple of"):
        PackedLinear.from_quantized(weight(4, 100, group_size=33), activations="int8-block")
    packed = PackedLinear.from_quantized(weight(4, 100, group_size=33), activations="int16")
    assert copy.deepcopy(packed).activations == "int16"
    packed.load_state_dict(PackedLinear.from_quantized(weight(4, 100, group_size=33)).state_dict())
    assert packed.activations == "int16"  # of the layer, not of the weight


@torch.no_grad()
def test_fused_layers_take_finer_activations_too() -> None:
    int16 = [PackedLinear(weight(8, 24), activations="int16") for _ in range(2)]
    x = torch.randn(5, 24)
    for fused, layer in zip(PackedLinears(int16)(x), int16, strict=True):
        assert torch.equal(fused, layer(x))
    blocks = [PackedLinear(weight(8, 256, group_size=g), activations="int8-block") for g in (None, 32, 128)]
    x = torch.randn(5, 256)
    for fused, layer in zip(PackedLinears(blocks)(x), blocks, strict=True):
        assert torch.equal(fused, layer(x))
    chain = PackedChain([Stage(linear=blocks[0]), Stage(linear=PackedLinear(weight(4, 8), activations="int16"))])
    assert torch.equal(chain(x), chain.linears[1](blocks[0](x)))
    with pytest.raises(BantamweightError, match="rounds its input once, but these layers want int16 and int8"):
        PackedLinears([int16[0], PackedLinear(weight(8, 24))])
    with pytest.raises(BantamweightError, match="rounds its inputs to int16, but int8 rows came; pass the float"):
        PackedLinears(int16)(quantize_rows(torch.randn(5, 24)))
