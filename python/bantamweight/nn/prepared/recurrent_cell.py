"""nn.LSTMCell, nn.GRUCell and nn.RNNCell on two plain linear layers each."""

from typing import Any, Self

from torch import Tensor, nn

from .base import PreparedModule, bare, linear
from .recurrent import State, Step, gru_step, lstm_step, rnn_step


class PreparedCell(PreparedModule, nn.modules.rnn.RNNCellBase):
    """What the three cells share: the children `input` and `hidden`."""

    parameters_of = ("weight_ih", "weight_hh")
    input: nn.Linear
    hidden: nn.Linear

    @classmethod
    def prepare(cls, module: Any) -> Self:
        new: Any = bare(cls, module)
        new.input = linear(module.weight_ih, module.bias_ih)
        new.hidden = linear(module.weight_hh, module.bias_hh)
        return new

    @property
    def weight_ih(self) -> Tensor:  # type: ignore[override]
        return self.input.weight

    @property
    def weight_hh(self) -> Tensor:  # type: ignore[override]
        return self.hidden.weight

    @property
    def bias_ih(self) -> Tensor | None:
        return self.input.bias

    @property
    def bias_hh(self) -> Tensor | None:
        return self.hidden.bias

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        name = type(self).replaces.__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        state: State = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        for part in state:
            if part.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected hidden to be 1D or 2D, got {part.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            state = (x.new_zeros(len(x), self.hidden_size),) * self._states
        elif not batched:
            state = tuple(part.unsqueeze(0) for part in state)
        for part in state:
            if part.shape != (len(x), self.hidden_size):
                raise RuntimeError(
                    f"Expected hidden size {(len(x), self.hidden_size)} for this input, got {tuple(part.shape)}"
                )
        state = self._step()(self.input(x), state)
        if not batched:
            state = tuple(part.squeeze(0) for part in state)
        return state if self._states == 2 else state[0]

    _states = 1

    def _step(self) -> Step:
        raise NotImplementedError


class PreparedLSTMCell(PreparedCell, nn.LSTMCell):
    """`nn.LSTMCell` on linear children.

    Example:
        >>> import torch
        >>> h, c = PreparedLSTMCell.prepare(nn.LSTMCell(4, 8))(torch.randn(2, 4))
        >>> h.shape, c.shape
        (torch.Size([2, 8]), torch.Size([2, 8]))
    """

    kind = "lstm_cell"
    replaces = nn.LSTMCell
    _states = 2

    def _step(self) -> Step:
        return lstm_step(self.hidden)


class PreparedGRUCell(PreparedCell, nn.GRUCell):
    """`nn.GRUCell` on linear children."""

    kind = "gru_cell"
    replaces = nn.GRUCell

    def _step(self) -> Step:
        return gru_step(self.hidden, self.hidden_size)


class PreparedRNNCell(PreparedCell, nn.RNNCell):
    """`nn.RNNCell` on linear children."""

    kind = "rnn_cell"
    replaces = nn.RNNCell

    def _step(self) -> Step:
        return rnn_step(self.hidden, self.nonlinearity)
