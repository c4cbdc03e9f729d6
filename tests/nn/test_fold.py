"""A folded model computes what the model did, and only what may be folded is."""

import pytest
import torch
from bantamweight import QuantizedWeight
from bantamweight.nn import PackedLinear, SimulatedLinear, fold_batchnorm
from torch import nn


def settle(model: nn.Module, *shape: int) -> torch.Tensor:
    """Gives every BatchNorm statistics and weights of its own; returns an input."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = torch.randn(shape)
    with torch.no_grad():
        for _ in range(3):
            model(x + torch.randn(shape))
    model.eval()
    return x


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (4, 3, 7, 7)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False), nn.ReLU()), (4, 4, 7, 7)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (4, 3, 9)),
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), (2, 2, 5, 5, 5)),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2, bias=False)), (8, 6)),
    ],
)
@torch.no_grad()
def test_folding_is_exact_to_rounding(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = settle(model, *shape)
    before = model(x)
    folded, names = fold_batchnorm(model)
    assert names == ["1"] and isinstance(folded[1], nn.Identity) and not isinstance(model[1], nn.Identity)
    assert folded.folded_batchnorms == {"1": "0"}
    torch.testing.assert_close(folded(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), before)
    again, more = fold_batchnorm(folded)
    assert more == [] and again.folded_batchnorms == {"1": "0"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shared, self.norm_a, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.branch, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.first, self.norm_d = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.untracked_conv, self.untracked = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm(self.conv(x))
        x = self.norm_a(self.shared(x)) + self.norm_b(self.shared(x))  # a layer that is called twice
        y = self.branch(x)
        x = self.norm_c(y) + y  # an output with a second user
        x = self.norm_d(self.first(x))  # a BatchNorm in front
        return self.untracked(self.untracked_conv(x))  # statistics of the batch


@torch.no_grad()
def test_only_single_pairs_are_folded() -> None:
    model = Residual()
    x = settle(model, 2, 4, 6, 6)
    folded, names = fold_batchnorm(model)
    assert names == ["norm"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_quantized_layers_are_passed_over() -> None:
    w = QuantizedWeight.from_codes(torch.randint(0, 4, (6, 6), dtype=torch.uint8), 0.1, 2.0, levels=4)
    layers = (
        SimulatedLinear(w, activation_bits=8),
        nn.BatchNorm1d(6),
        PackedLinear(w),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
    )
    model = nn.Sequential(*layers)
    x = settle(model, 8, 6)
    folded, names = fold_batchnorm(model)
    assert names == ["4"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if x.sum() > 0 else x


@torch.no_grad()
def test_what_cannot_be_traced_is_folded_on_data(caplog: pytest.LogCaptureFixture) -> None:
    model = Untraceable()
    x = settle(model, 4, 3, 7, 7).abs()
    with caplog.at_level("INFO"):
        folded, names = fold_batchnorm(model)
    assert names == [] and isinstance(folded.body[1], nn.BatchNorm2d)
    assert "Untraceable: torch.fx finds no BatchNorms to fold" in caplog.text
    assert folded.kept_batchnorms == {"body.1": "torch.fx cannot trace the model"}
    folded, names = fold_batchnorm(model, lambda net: net(x))
    assert names == ["body.1"] and isinstance(folded.body[1], nn.Identity)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert fold_batchnorm(nn.Linear(2, 2))[1] == []


class Tricky(nn.Module):
    """Pairs that look right to a trace and are not, around one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Linear(6, 6), nn.BatchNorm1d(6)  # over [n, 6, 6], whose channels are dimension 1
        self.b, self.b_norm = nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)
        self.c, self.c_norm = nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)  # the output is kept and read later
        self.grid: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        x = self.b_norm(self.b(self.a_norm(self.a(x))))
        y = self.c(x.to(self.c_norm.weight.dtype))
        if self.grid is None:
            self.grid = torch.linspace(0, 1, 6).to(y)
        if skip is None:
            skip = y
        return self.c_norm(y) + skip + self.grid


@torch.no_grad()
def test_folding_that_would_change_the_output_is_undone() -> None:
    model = Tricky()
    x = settle(model, 8, 6, 6)
    model.grid = None
    folded, names = fold_batchnorm(model, lambda net: net(x))
    assert names == ["b_norm"] and folded.grid is None and model.grid is None
    assert folded.kept_batchnorms["a_norm"] == "the network computes something else without it"
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
