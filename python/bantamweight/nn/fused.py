"""Packed linear layers run together, each group in one call of the extension.

What stands between the layers of a transformer block (bias, activation, residual, layer norm, rounding to int8) is
done on rows that are still in the cache, and the rows that several layers read are rounded once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from .._C import LinearChain, LinearGroup
from ..errors import BantamweightError
from ..ops.lowbit_linear import check_input, check_status
from ..ops.quantized_rows import QuantizedRows
from .packed import PackedLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in the order of the extension's enum
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_RESIDUALS = {None: -1, "input": -2, "given": -3}
_NO_ROWS = (0, 0, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a chain: ``h = norm(activation(linear(h)) + residual)``.

    ``residual`` is None, "input" (the chain's), "given" (an argument of the call) or the index of an earlier stage,
    whose output is added.
    """

    linear: PackedLinear
    activation: str = "none"
    residual: str | int | None = None
    norm: nn.LayerNorm | None = None


class _Fused(nn.Module):
    """Packed layers and the C++ object over their addresses, which is made again when one of them moves."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_key", "_runner", "_kept")}

    def _rows_of(self, x: Tensor | QuantizedRows, k: int, name: str) -> tuple[int, Tensor | None, tuple[int, ...]]:
        """How many rows x has, x as float rows (None if it is rounded already), and the addresses if it is."""
        if type(x) is QuantizedRows:
            if not x.shape or x.shape[-1] != k:
                raise BantamweightError(f"{name} takes rows of {k}, but rows of {list(x.shape)} came")
            finer = next((m for m in self.modules() if isinstance(m, PackedLinear) and m.activations != "int8"), None)
            if finer is not None:
                raise BantamweightError(
                    f"{name} holds a layer that rounds its inputs to {finer.activations}, but int8 rows came; pass the "
                    "float tensor"
                )
            return len(x.scale), None, x.addresses
        if not isinstance(x, Tensor):
            raise BantamweightError(f"{name} takes a tensor or QuantizedRows, but a {type(x).__name__} came")
        if x.requires_grad and torch.is_grad_enabled():
            raise BantamweightError(
                f"{name} is for inference, but the input requires a gradient; call it under torch.no_grad()"
            )
        if x.dtype is not torch.float32 or not x.is_contiguous() or not x.is_cpu or not x.ndim or x.shape[-1] != k:
            x = check_input(x.detach(), k, name)
        return x.numel() // k if k else x.shape[:-1].numel(), x, _NO_ROWS


def in_graph(x: object) -> bool:
    """True where the extension cannot be called: in a graph, and for tensors that are more than a plain one."""
    return (isinstance(x, Tensor) and type(x) is not Tensor) or is_compiling() or is_tracing()


class PackedLinears(_Fused):
    """Several packed layers over the same input, as Q, K and V are: one call, one rounding.

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> from bantamweight.nn import PackedLinear, PackedLinears
        >>> w = QuantizedWeight.from_codes(torch.randint(0, 16, (8, 32), dtype=torch.uint8), 0.1, 8.0, levels=16)
        >>> q, k, v = PackedLinears([PackedLinear(w), PackedLinear(w), PackedLinear(w)])(torch.randn(4, 32))
        >>> q.shape
        torch.Size([4, 8])
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        super().__init__()
        if not layers or not all(isinstance(layer, PackedLinear) for layer in layers):
            raise BantamweightError("PackedLinears takes one PackedLinear or more; call pack first")
        widths = sorted({layer.in_features for layer in layers})
        if len(widths) > 1:
            raise BantamweightError(f"PackedLinears takes layers of one number of inputs, but these have {widths}")
        modes = sorted({layer.activations for layer in layers})
        if len(modes) > 1:
            raise BantamweightError(f"PackedLinears rounds its input once, but these layers want {' and '.join(modes)}")
        self.layers = nn.ModuleList(layers)
        self.in_features = widths[0]
        self.out_features = [layer.out_features for layer in layers]

    def forward(self, x: Tensor | QuantizedRows) -> tuple[Tensor, ...]:
        """One output [..., out] a layer, views side by side in one tensor, in the dtype of x [..., in].

        Raises:
            BantamweightError: x is neither such a tensor nor such rows, or requires a gradient.
            KernelError: x holds NaN or infinity.
        """
        if in_graph(x):
            return tuple(layer(x) for layer in self.layers)
        m, floats, rows = self._rows_of(x, self.in_features, f"PackedLinears of {self.in_features} inputs")
        key = [layer._addresses for layer in self.layers]  # type: ignore[union-attr]
        if self.__dict__.get("_key") != key:
            self.__dict__["_key"], self.__dict__["_runner"] = key, LinearGroup(key)  # type: ignore[arg-type]
        width = sum(self.out_features)
        y = torch.empty((*x.shape[:-1], width), dtype=torch.float32, device="cpu")
        address = 0 if floats is None else floats.data_ptr()
        status = self.__dict__["_runner"].forward(address, self.in_features, rows, m, 0, 0, 0, y.data_ptr(), width)
        check_status(status, "PackedLinears")
        if type(x) is Tensor and x.dtype is not torch.float32:
            y = y.to(x.dtype)
        return y.split(self.out_features, dim=-1)


class PackedChain(_Fused):
    """Packed layers in a row, with what stands between them, in one call.

    Rows go through all layers in chunks whose intermediate outputs stay in the L2 cache.

    Args:
        stages: first to last, at most 8.
        norm: of the input, before the first stage; "input" residuals add the input as it was.
    """

    def __init__(self, stages: Sequence[Stage], norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        _check_stages(stages, norm)
        self.stages = tuple(
            (stage.activation, stage.residual, stage.norm is not None) for stage in stages
        )  # what the layers below do not say
        self.linears = nn.ModuleList(stage.linear for stage in stages)
        self.norms = nn.ModuleList(stage.norm or nn.Identity() for stage in stages)
        self.norm: nn.Module | None
        self.register_module("norm", norm)
        self.in_features = stages[0].linear.in_features
        self.out_features = stages[-1].linear.out_features
        self._name = f"{type(self).__name__} {self.in_features} to {self.out_features}"
        self._reads_floats = norm is not None or any(stage.residual == "input" for stage in stages)
        self._takes_residual = any(stage.residual == "given" for stage in stages)

    def forward(self, x: Tensor | QuantizedRows, residual: Tensor | None = None) -> Tensor:
        """y [..., out], in the dtype of x [..., in].

        Args:
            residual: what a stage with residual="given" adds, [..., n of that stage].

        Raises:
            BantamweightError: x or the residual is not what the stages take, or x requires a gradient.
            KernelError: x or an intermediate output holds NaN or infinity.
        """
        if in_graph(x):
            return self._compose(x, residual)  # type: ignore[arg-type]
        y, _ = self.run(x, residual)
        if type(x) is Tensor and x.dtype is not torch.float32:
            return y.to(x.dtype)
        return y

    def run(
        self,
        x: Tensor | QuantizedRows,
        residual: Tensor | None = None,
        *,
        group_size: int | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, QuantizedRows | None]:
        """As forward, in float32, and with a group size the outputs as `QuantizedRows` too; into `out` where given."""
        shape = torch.Size((*x.shape[:-1], self.out_features))
        if out is not None and (out.shape != shape or out.dtype is not torch.float32 or not out.is_contiguous()):
            raise BantamweightError(
                f"{self._name} writes contiguous float32 {list(shape)}, but out is {out.dtype} {list(out.shape)}"
            )
        y = torch.empty(shape, dtype=torch.float32, device="cpu") if out is None else out
        rounded = None if group_size is None else QuantizedRows.empty(shape, group_size)
        self._call(x, residual, y.data_ptr(), rounded)
        return y, rounded

    def run_rounded(
        self, x: Tensor | QuantizedRows, residual: Tensor | None = None, *, group_size: int | None = None
    ) -> QuantizedRows:
        """As forward, but only the outputs rounded to int8, for a packed layer to read."""
        shape = torch.Size((*x.shape[:-1], self.out_features))
        rounded = QuantizedRows.empty(shape, group_size or max(self.out_features, 1))
        self._call(x, residual, 0, rounded)
        return rounded

    def _call(self, x: Tensor | QuantizedRows, residual: Tensor | None, y: int, rounded: QuantizedRows | None) -> None:
        name = self._name
        m, floats, rows = self._rows_of(x, self.in_features, name)
        if floats is None and self._reads_floats:
            raise BantamweightError(f"{name} adds or normalises its input, so it takes a float tensor, not rows")
        added, width = self._residual(residual, x, name)
        status = self._runner_of().forward(
            0 if floats is None else floats.data_ptr(),
            self.in_features,
            rows,
            m,
            0 if added is None else added.data_ptr(),
            width,
            y,
            self.out_features,
            _NO_ROWS if rounded is None else rounded.addresses,
        )
        check_status(status, name)

    def _residual(self, residual: Tensor | None, x: Tensor | QuantizedRows, name: str) -> tuple[Tensor | None, int]:
        if residual is None:
            if self._takes_residual:
                raise BantamweightError(f"{name} adds a residual, but none came; pass it as the second argument")
            return None, 0
        if not self._takes_residual:
            raise BantamweightError(f'{name} has no stage with residual="given", but a residual came')
        index = next(i for i, (_, source, _) in enumerate(self.stages) if source == "given")
        width = int(self.linears[index].out_features)  # type: ignore[arg-type]
        if residual.shape[:-1] != x.shape[:-1]:
            raise BantamweightError(
                f"{name}: a residual of {list(residual.shape)} came with an input of {list(x.shape)}"
            )
        return check_input(residual.detach(), width, f"{name}: the residual"), width

    def _runner_of(self) -> LinearChain:
        linears = [linear._addresses for linear in self._modules["linears"]._modules.values()]  # type: ignore
        norms = [*self._modules["norms"]._modules.values(), self._modules["norm"]]  # type: ignore[union-attr]
        key = (
            linears,
            [p.data_ptr() for norm in norms if norm is not None for p in norm._parameters.values() if p is not None],
        )
        if self.__dict__.get("_key") != key:
            self._build(linears, key)
        return self.__dict__["_runner"]

    def _build(self, linears: list[Any], key: Any) -> None:
        kept: list[Tensor] = []

        def addresses(norm: nn.Module | None) -> tuple[int, int, float] | None:
            if not isinstance(norm, nn.LayerNorm):
                return None
            found = []
            for part in (norm.weight, norm.bias):
                if part is not None:
                    kept.append(part.detach().to("cpu", torch.float32).contiguous())
                found.append(0 if part is None else kept[-1].data_ptr())
            return found[0], found[1], norm.eps

        names = list(ACTIVATIONS)
        stages = [
            (*linear, names.index(activation), _RESIDUALS.get(residual, residual), addresses(norm))  # type: ignore
            for linear, (activation, residual, _), norm in zip(linears, self.stages, self.norms, strict=True)
        ]
        runner = LinearChain(stages, addresses(self.norm))
        self.__dict__.update(_key=key, _runner=runner, _kept=kept)

    def _compose(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same from torch's own functions: what compiled and exported graphs hold."""
        h, outputs = x if self.norm is None else self.norm(x), []
        given: dict[str, Any] = {"input": x, "given": residual}
        for linear, norm, (activation, source, _) in zip(self.linears, self.norms, self.stages, strict=True):
            h = ACTIVATIONS[activation](linear(h))
            if source is not None:
                h = h + (outputs[source] if isinstance(source, int) else given[source])
            h = norm(h)
            outputs.append(h)
        return h

    def extra_repr(self) -> str:
        return ", ".join(
            f"{i}: {activation}" + ("" if residual is None else f" + {residual}") + (" norm" if norm else "")
            for i, (activation, residual, norm) in enumerate(self.stages)
        )


class PackedFFN(PackedChain):
    """A transformer's feed-forward block in one call: ``x + second(activation(first(x)))`` and its layer norm.

    Args:
        first, second: packed layers, d to hidden and hidden to d.
        activation: "gelu", "gelu_tanh", "relu" or "none".
        residual: True to add the input; "given" to add an argument of the call; False for neither.
        norm: None, or the block's layer norm.
        norm_first: True for ``x + ffn(norm(x))`` (pre-norm), False for ``norm(x + ffn(x))`` (post-norm, as in BERT).

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> from bantamweight.nn import PackedFFN, PackedLinear
        >>> def layer(n, k):
        ...     codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        ...     return PackedLinear(QuantizedWeight.from_codes(codes, 0.01, 8.0, levels=16), torch.zeros(n))
        >>> ffn = PackedFFN(layer(128, 32), layer(32, 128), residual=True, norm=torch.nn.LayerNorm(32))
        >>> ffn(torch.randn(4, 32)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        first: PackedLinear,
        second: PackedLinear,
        *,
        activation: str = "gelu",
        residual: bool | str = False,
        norm: nn.LayerNorm | None = None,
        norm_first: bool = False,
    ) -> None:
        if residual not in (True, False, "given"):
            raise BantamweightError(f'residual is {residual!r}, but must be True, False or "given"')
        source = "input" if residual is True else residual or None
        super().__init__(
            [
                Stage(linear=first, activation=activation),
                Stage(linear=second, residual=source, norm=None if norm_first else norm),
            ],
            norm=norm if norm_first else None,
        )


def _check_stages(stages: Sequence[Stage], norm: nn.LayerNorm | None) -> None:
    if not 1 <= len(stages) <= 8:
        raise BantamweightError(f"a chain has 1 to 8 stages, but {len(stages)} came")
    widths = []
    for i, stage in enumerate(stages):
        linear = stage.linear
        if not isinstance(linear, PackedLinear):
            raise BantamweightError(
                f"stage {i} is a {type(linear).__name__}, but must be a PackedLinear; call pack first"
            )
        if widths and linear.in_features != widths[-1]:
            raise BantamweightError(f"stage {i} takes {linear.in_features} inputs, but {widths[-1]} come from the last")
        if stage.activation not in ACTIVATIONS:
            raise BantamweightError(
                f"the activation of stage {i} is {stage.activation!r}, but must be one of {', '.join(ACTIVATIONS)}"
            )
        width = linear.out_features
        if isinstance(stage.residual, int):
            if not 0 <= stage.residual < i or widths[stage.residual] != width:
                raise BantamweightError(f"stage {i} cannot add the output of stage {stage.residual}")
        elif stage.residual not in _RESIDUALS:
            raise BantamweightError(
                f'the residual of stage {i} is {stage.residual!r}, but must be None, "input", "given" or a stage'
            )
        elif stage.residual == "input" and stages[0].linear.in_features != width:
            raise BantamweightError(
                f"stage {i} has {width} outputs and cannot add the input of {stages[0].linear.in_features}"
            )
        _check_norm(stage.norm, width, f"the norm of stage {i}")
        widths.append(width)
    if sum(stage.residual == "given" for stage in stages) > 1:
        raise BantamweightError("only one stage of a chain can add the residual that is given")
    _check_norm(norm, stages[0].linear.in_features, "the first norm")


def _check_norm(norm: nn.LayerNorm | None, width: int, name: str) -> None:
    if norm is not None and (not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != (width,)):
        raise BantamweightError(f"{name} is {norm}, but must be an nn.LayerNorm of {width} or None")
