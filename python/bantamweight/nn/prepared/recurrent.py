"""nn.LSTM, nn.GRU and nn.RNN on plain linear layers: one for the inputs of all steps, one that every step calls.

The input gates of a whole sequence do not depend on the state, so they are one product [steps * batch, inputs]; only
the hidden gates are left to the loop.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from torch.nn.utils.rnn import PackedSequence

from .base import PreparedModule, bare, linear

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM: [batch, size]
# What a step makes of the input gates of its time and of the state.
Step = Callable[[Tensor, State], State]


def lstm_step(hidden: nn.Module, projection: nn.Module | None = None) -> Step:
    """Hochreiter and Schmidhuber 1997, with torch's order of gates i, f, g, o; a projection as in arXiv:1402.1128."""

    def step(gates: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = (gates + hidden(h)).chunk(4, 1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        h = o.sigmoid() * c.tanh()
        return (h if projection is None else projection(h)), c

    return step


def gru_step(hidden: nn.Module, size: int) -> Step:
    """Cho et al. 2014 (arXiv:1406.1078) as torch has it: the reset gate multiplies the hidden part of the new gate."""
    sizes = [2 * size, size]

    def step(gates: Tensor, state: State) -> State:
        (h,) = state
        (input_gates, input_new), (hidden_gates, hidden_new) = gates.split(sizes, 1), hidden(h).split(sizes, 1)
        reset, update = (input_gates + hidden_gates).sigmoid().chunk(2, 1)
        new = torch.addcmul(input_new, reset, hidden_new).tanh()
        return (torch.addcmul(new, update, h - new),)

    return step


def rnn_step(hidden: nn.Module, nonlinearity: str) -> Step:
    """Elman 1990: tanh or ReLU of the sum of both parts."""
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu

    def step(gates: Tensor, state: State) -> State:
        return (activation(gates + hidden(state[0])),)

    return step


def run_steps(step: Step, gates: Sequence[Tensor], state: State, *, reverse: bool) -> tuple[list[Tensor], State]:
    """Every step of one direction.

    Args:
        gates: the input gates, one tensor [n_t, gates] a step; sequences that end early are the last of a batch, so
            n_t falls over time.
        state: of all sequences, before their first step.

    Returns:
        h [n_t, size] of every step, in the order of `gates`, and the state of each sequence after its last step.
    """
    outputs: list[Tensor] = []
    if len(gates[0]) == len(gates[-1]):
        for each in reversed(gates) if reverse else gates:
            state = step(each, state)
            outputs.append(state[0])
    elif reverse:
        first = state
        state = tuple(part[:0] for part in first)
        for each in reversed(gates):
            begun = len(state[0])
            if len(each) > begun:  # more sequences have this step than the one after it
                state = tuple(
                    torch.cat((part, start[begun : len(each)])) for part, start in zip(state, first, strict=True)
                )
            state = step(each, state)
            outputs.append(state[0])
    else:
        ended: list[State] = []
        for each in gates:
            if len(each) < len(state[0]):
                ended.append(tuple(part[len(each) :] for part in state))
                state = tuple(part[: len(each)] for part in state)
            state = step(each, state)
            outputs.append(state[0])
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return (outputs[::-1] if reverse else outputs), state


class PreparedRNNBase(PreparedModule, nn.RNNBase):
    """What the three kinds share: per layer k and direction the children ``input_l{k}`` and ``hidden_l{k}``.

    The second direction's have the suffix ``_reverse``, as torch's parameters; ``projection_l{k}`` where proj_size is
    set.
    """

    @classmethod
    def prepare(cls, module: nn.RNNBase) -> Self:
        new: Any = bare(cls, module)
        held = module._parameters
        for suffix in _suffixes(module):
            names = {"input": "ih", "hidden": "hh", "projection": "hr"}
            for child, part in names.items():
                weight = held.get(f"weight_{part}_{suffix}")
                if weight is not None:
                    setattr(new, f"{child}_{suffix}", linear(weight, held.get(f"bias_{part}_{suffix}")))
        new._init_flat_weights()
        return new

    @classmethod
    def why_not(cls, module: nn.RNNBase) -> str | None:
        missing = [name for names in module._all_weights for name in names if module._parameters.get(name) is None]
        return f"its parameter {missing[0]} is made anew at every call; make it plain first" if missing else None

    def __getattr__(self, name: str) -> Any:
        part, _, rest = name.partition("_")
        matrix, _, suffix = rest.partition("_")
        child = {"ih": "input", "hh": "hidden", "hr": "projection"}.get(matrix)
        layer = self._modules.get(f"{child}_{suffix}") if part in ("weight", "bias") else None
        return super().__getattr__(name) if layer is None else getattr(layer, part)

    def _init_flat_weights(self) -> None:
        # torch's lists of parameters, which its own methods walk: there are none left to list.
        self._flat_weights_names: list[str] = []
        self._flat_weights: list[Tensor | None] = []
        self._flat_weight_refs: list[Any] = []

    def flatten_parameters(self) -> None:
        """Does nothing: there is no cuDNN buffer to flatten into."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        layer = self._modules["input_l0"]
        # A layer of codes takes every float type.
        dtype = layer.weight.dtype if isinstance(layer, nn.Linear) else input.dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). Convert input: "
                f"input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        wanted = 2 if batch_sizes is not None else 3
        if input.dim() != wanted:
            raise RuntimeError(f"input must have {wanted} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        """As torch's: tensors or a PackedSequence in, the outputs and the last state out."""
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, order_back = input
            sizes = batch_sizes.tolist()
            state = self._first_state(data, sizes[0]) if hx is None else self.permute_hidden(hx, order)
            self.check_forward_args(data, state, batch_sizes)
            output, state = self._layers(data, self._parts(state), sizes)
            return PackedSequence(output, batch_sizes, order, order_back), self.permute_hidden(
                self._whole(state), order_back
            )
        name = type(self).replaces.__name__
        if input.dim() not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        if hx is None:
            hx = self._first_state(x, x.size(0 if self.batch_first else 1))
        elif any(part.dim() != input.dim() for part in self._parts(hx)):
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx should also be {input.dim()}-D but got "
                f"{' and '.join(f'{part.dim()}-D' for part in self._parts(hx))} tensors"
            )
        elif not batched:
            hx = self._whole(tuple(part.unsqueeze(1) for part in self._parts(hx)))
        self.check_forward_args(x, hx, None)
        steps, batch = (x.shape[1], x.shape[0]) if self.batch_first else x.shape[:2]
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        data = (x.transpose(0, 1) if self.batch_first else x).flatten(0, 1)
        output, state = self._layers(data, self._parts(hx), [batch] * steps)
        output = output.unflatten(0, (steps, batch))
        output = output.transpose(0, 1) if self.batch_first else output
        if not batched:
            output, state = output.squeeze(0 if self.batch_first else 1), tuple(part.squeeze(1) for part in state)
        return output, self._whole(state)

    def _layers(self, x: Tensor, state: State, sizes: list[int]) -> tuple[Tensor, State]:
        """All layers over the steps of x [sum of sizes, inputs], sizes[t] rows a step; state [layers, batch, size]."""
        directions = 2 if self.bidirectional else 1
        last: list[State] = []
        for index, suffix in enumerate(_suffixes(self)):
            if index % directions == 0:
                inputs, outputs = x, []
            input_layer: Any = self._modules[f"input_{suffix}"]
            gates = input_layer(inputs).split(sizes)
            start = tuple(part[index] for part in state)
            found, final = run_steps(self._step(suffix), gates, start, reverse=suffix.endswith("_reverse"))
            outputs.append(torch.cat(found))
            last.append(final)
            if len(outputs) == directions:
                x = outputs[0] if directions == 1 else torch.cat(outputs, 1)
                if self.dropout and self.training and index + 1 < self.num_layers * directions:
                    x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _step(self, suffix: str) -> Step:
        raise NotImplementedError

    def _first_state(self, x: Tensor, batch: int) -> Any:
        shape = (self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size)
        return x.new_zeros(shape)

    def _parts(self, hx: Any) -> State:
        return (hx,)

    def _whole(self, state: State) -> Any:
        return state[0]


class PreparedLSTM(PreparedRNNBase, nn.LSTM):
    """`nn.LSTM` on linear children.

    Example:
        >>> output, (h, c) = PreparedLSTM.prepare(nn.LSTM(4, 8)).eval()(torch.randn(5, 2, 4))
        >>> output.shape, h.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]), torch.Size([1, 2, 8]))
    """

    kind = "lstm"
    replaces = nn.LSTM
    parameters_of = ("weight_ih_l0", "weight_hh_l0")

    def _step(self, suffix: str) -> Step:
        return lstm_step(self._modules[f"hidden_{suffix}"], self._modules.get(f"projection_{suffix}"))  # type: ignore[arg-type]

    def _first_state(self, x: Tensor, batch: int) -> Any:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h = x.new_zeros(layers, batch, self.proj_size or self.hidden_size)
        return h, x.new_zeros(layers, batch, self.hidden_size)

    def _parts(self, hx: Any) -> State:
        return tuple(hx)

    def _whole(self, state: State) -> Any:
        return state


class PreparedGRU(PreparedRNNBase, nn.GRU):
    """`nn.GRU` on linear children."""

    kind = "gru"
    replaces = nn.GRU
    parameters_of = ("weight_ih_l0", "weight_hh_l0")

    def _step(self, suffix: str) -> Step:
        return gru_step(self._modules[f"hidden_{suffix}"], self.hidden_size)  # type: ignore[arg-type]


class PreparedRNN(PreparedRNNBase, nn.RNN):
    """`nn.RNN` on linear children."""

    kind = "rnn"
    replaces = nn.RNN
    parameters_of = ("weight_ih_l0", "weight_hh_l0")

    def _step(self, suffix: str) -> Step:
        return rnn_step(self._modules[f"hidden_{suffix}"], self.nonlinearity)  # type: ignore[arg-type]


def _suffixes(module: nn.RNNBase) -> Iterable[str]:
    """``l0``, ``l0_reverse``, ``l1``, ...: torch's names of layers and directions, in its order of states."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]
