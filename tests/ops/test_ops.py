"""The torch ops: registered as torch wants them, and seen by compile and export."""

import io

import pytest
import torch
from bantamweight import QuantizedWeight, pack
from bantamweight.errors import BantamweightError, KernelError
from bantamweight.nn import PackedConv2d, PackedLinear, SimulatedConv2d, SimulatedLinear
from bantamweight.ops import describe_linear, lowbit_linear, pack_linear, unpack_linear
from torch import nn


def weight(n: int, k: int, levels: int = 16) -> QuantizedWeight:
    codes = torch.randint(0, levels, (n, k), dtype=torch.uint8)
    return QuantizedWeight.from_codes(codes, torch.rand(n) / k, float(levels // 2), levels=levels)


def network() -> nn.Module:
    conv = SimulatedConv2d(weight(8, 27), torch.randn(8), in_channels=3, kernel_size=(3, 3), stride=(2, 2))
    return pack(
        nn.Sequential(conv, nn.ReLU(), nn.Flatten(), SimulatedLinear(weight(10, 72, 3), torch.randn(10)))
    ).eval()


@pytest.mark.parametrize("bias", [None, torch.randn(20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_passes_opcheck(bias: torch.Tensor | None, dtype: torch.dtype) -> None:
    layout = pack_linear(weight(20, 30))
    for shape in ((3, 30), (2, 3, 30), (30,)):
        torch.library.opcheck(
            torch.ops.bantamweight.lowbit_linear.default, (torch.randn(shape).to(dtype), layout, bias, 20)
        )


@torch.no_grad()
def test_compile_sees_ops_and_no_breaks() -> None:
    net, x = network(), torch.randn(4, 3, 7, 7)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(compiled(x[:3]), net(x[:3]))


@torch.no_grad()
def test_export_holds_the_ops_and_saves() -> None:
    net, x = network(), torch.randn(4, 3, 7, 7)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"bantamweight.lowbit_linear.default", "bantamweight.lowbit_conv2d.default"} <= called
    torch.testing.assert_close(exported.module()(x[:2]), net(x[:2]))


@torch.no_grad()
def test_an_exported_program_survives_saving() -> None:
    net, x, file = network(), torch.randn(4, 3, 7, 7), io.BytesIO()
    torch.export.save(torch.export.export(net, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
@torch.no_grad()
def test_the_older_tracers_see_ops_too() -> None:
    net, x = network(), torch.randn(4, 3, 7, 7)
    graph = torch.fx.symbolic_trace(net)
    assert sum("bantamweight" in str(node.target) for node in graph.graph.nodes) == 2
    assert torch.equal(graph(x), net(x))
    traced = torch.jit.trace(net, (x,))
    other = torch.randn(4, 3, 7, 7)
    assert torch.equal(traced(other), net(other))


@torch.no_grad()
def test_the_op_equals_the_layer() -> None:
    w, bias, x = weight(20, 30), torch.randn(20), torch.randn(2, 5, 30)
    layer = PackedLinear(w, bias)
    assert torch.equal(lowbit_linear(x, layer.layout, bias, 20), layer(x))
    # A graph's constants may lie anywhere in memory; the kernels want 64 bytes.
    anywhere = torch.empty(layer.layout.numel() + 1, dtype=torch.uint8)[1:].copy_(layer.layout)
    assert torch.equal(lowbit_linear(x, anywhere, bias, 20), layer(x))
    conv = PackedConv2d(weight(8, 27), in_channels=3, kernel_size=(3, 3))
    image = torch.randn(1, 3, 6, 6)
    assert torch.equal(conv(nn.Parameter(image)), conv(image))  # no plain tensor: the way through the dispatcher


def test_pack_and_unpack_are_inverse() -> None:
    w = weight(33, 70, 8)
    layout = pack_linear(w, "reference")
    found = describe_linear(layout)
    assert (found.out_features, found.in_features, found.bits, found.kernel) == (33, 70, 3, "reference")
    assert found.stored_bits == 3
    assert unpack_linear(layout, 8).equals(w)


def test_refuses_with_a_sentence() -> None:
    layout, x = pack_linear(weight(20, 30)), torch.zeros(2, 30)
    with pytest.raises(KernelError, match="kernel is 'avx512', but the linear kernels of this machine are"):
        pack_linear(weight(20, 30), "avx512")  # a variant of other ops only
    with pytest.raises(KernelError, match="'abacus' names no kernel"):
        pack_linear(weight(20, 30), "abacus")
    with pytest.raises(KernelError, match="made by another version or for another CPU"):
        lowbit_linear(x, layout[: layout.numel() // 2], None, 20)
    with pytest.raises(KernelError, match="must be contiguous uint8 on the CPU"):
        describe_linear(layout.float())
    with pytest.raises(BantamweightError, match="out_features is 21"):
        lowbit_linear(x, layout, None, 21)
    with pytest.raises(BantamweightError, match=r"bias is torch.float32 \[19\]"):
        lowbit_linear(x, layout, torch.zeros(19), 20)
    with pytest.raises(BantamweightError, match=r"takes inputs \[..., 30\], but \[2, 31\] came"):
        lowbit_linear(torch.zeros(2, 31), layout, None, 20)
