"""HERO: Hessian-Enhanced Robust Optimization (Yang, Yang, Gong and Chen, 2022, DAC, arXiv 2111.11986)."""
# torch._foreach_* have no public names.
# pyright: reportPrivateImportUsage=false

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import BantamweightError
from .passes import Closure, NotFinite, Passes
from .perturbation import PERTURBATIONS, norms
from .second_derivative import keep_freed_memory
from .snapshot import Snapshot, deferred_interrupt

_GROUP_OPTIONS = ("h", "lam", "perturb", "regularize")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Member:
    """One trainable parameter and the part it plays."""

    parameter: Tensor
    radius: float  # h where the parameter is perturbed, else 0
    pull: float  # 2 lambda / n_l (or 2 lambda) where it is regularised, else 0


class HERO(Optimizer):
    """Descends a loss whose gradient is also pulled towards being the same nearby: flat minima.

    A step at weights w, with gradient g = grad L(w)::

        e   = h w^2 g / || |w| g ||                    perturbation="adaptive" (the authors' code; ASAM's step)
        e_l = h ||W_l|| g_l / ||g_l||                  perturbation="layerwise" (the paper's text)
        e   = h g / ||g||                              perturbation="plain" (SAM's step)
        g*  = grad L(w + e)
        d   = g* + H(w + e) v,   v_l = (2 lam / n_l) (g*_l - g_l)  in the regularised layers, 0 elsewhere

    and `base_optimizer` updates w with d. With ``lam=0`` this is SAM ("plain", h is rho) or ASAM ("adaptive").

    Parameters
    ----------
    params: parameters or groups of them. A group may set ``h``, ``lam``, ``perturb`` (default True) and
        ``regularize`` (True, False, or None: tensors of two dimensions or more, that is, no biases and no
        BatchNorm). All of them may be changed between steps, as may ``lr``.
    base_optimizer: class of the optimizer that applies d, one whose step needs no closure (not LBFGS); it gets the
        remaining keywords (``lr``, ``momentum``, ...). The instance is ``.base_optimizer``: clip gradients in its
        ``register_step_pre_hook``.
    h, lam: radius of the perturbation and strength of the regulariser.
    mode: "exact" differentiates the gradient (one closure that returns the loss with its graph). "fd" takes
        H v from a difference of gradients over a step of `fd_step` times the norm of the regularised weights:
        no double backward, less memory, one more pass; equal for smooth networks, another regulariser for ReLU.
        Use "fd" where torch cannot differentiate twice: torch.compile'd models, flash attention. Under bf16
        autocast rounding hides small steps: raise `fd_step` to about 0.03.
    reduction: "mean" divides by n_l, the size of the layer; "sum" does not, so that one lam suits all sizes.
    model: the network, whose normalisation statistics are counted once a step. Without it the layers are noticed
        as they run (global module hooks, of which torch.compile warns). Needed in "exact" mode for
        DistributedDataParallel.

    Differs from the authors' code: every epoch trains, the weights return from copies, BatchNorm counts once.

    Example
    -------
    >>> import torch, bantamweight as bw
    >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    >>> optimizer = bw.HERO(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, h=0.5, lam=5.0)
    >>> loss = optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        *,
        h: float = 0.5,
        lam: float = 5.0,
        mode: str = "exact",
        perturbation: str = "adaptive",
        reduction: str = "mean",
        fd_step: float = 1e-3,
        model: nn.Module | None = None,
        **base_options: Any,
    ) -> None:
        _check_choice("mode", mode, ("exact", "fd"))
        _check_choice("perturbation", perturbation, tuple(PERTURBATIONS))
        _check_choice("reduction", reduction, ("mean", "sum"))
        step = inspect.signature(base_optimizer.step).parameters.get("closure")
        if step is not None and step.default is step.empty:
            raise BantamweightError(
                f"base_optimizer is {base_optimizer.__name__}, whose step evaluates a closure itself, but HERO gives "
                "it one direction; pass an optimizer that steps on gradients alone, such as torch.optim.SGD"
            )
        if not 0 < fd_step < 1:
            raise BantamweightError(f"fd_step is {fd_step}, but must lie between 0 and 1; 1e-3 suits float32")
        self.mode, self.perturbation, self.reduction = mode, perturbation, reduction
        self.fd_step, self.model = fd_step, model
        if mode == "exact" and lam:
            keep_freed_memory()
        super().__init__(params, {"h": h, "lam": lam, "perturb": True, "regularize": None})
        self.base_optimizer = base_optimizer(self.param_groups, **base_options)
        # Groups and state are the base optimizer's own, so that schedulers, state_dict and repr show what is used.
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}
        self._share_state()

    def _share_state(self) -> None:
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in ("h", "lam"):
            value = param_group.get(name, self.defaults[name])
            if not 0 <= value < float("inf"):
                raise BantamweightError(f"{name} is {value}, but must be a finite number that is not negative")
        base = getattr(self, "base_optimizer", None)
        if base is None:  # from Optimizer.__init__, before there is a base optimizer
            super().add_param_group(param_group)
        else:
            base.add_param_group({**{name: self.defaults[name] for name in _GROUP_OPTIONS}, **param_group})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self._share_state()

    def __getstate__(self) -> dict[str, Any]:  # Optimizer's own keeps groups and state alone
        own = ("mode", "perturbation", "reduction", "fd_step", "model", "base_optimizer")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    # ---- one step ---------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Closure] | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> Any:
        """Evaluates `closure` two to three times, updates the weights, and returns its first value, detached.

        `closure` returns the loss of one batch, without calling backward; where several are given, as micro-batches,
        the gradients of all are added (divide each loss by their number). In "fd" mode, and in either mode with
        lam = 0, it may call backward itself, as Lightning's does. With a `scaler` the loss is scaled here
        (or, scaled, in the closure that calls backward), steps whose gradients overflow are skipped, and the caller
        calls ``scaler.update()``. All passes see the same random numbers of torch.

        Whatever is raised, by the closure, Ctrl-C or here (`BantamweightError` where the loss or a gradient is not
        finite): weights, gradients, optimizer state, random state and BatchNorm statistics are as before the call.
        """
        closures = _as_closures(closure)
        members = self._members()
        parameters = [m.parameter for m in members]
        moved = [m.parameter for m in members if m.radius or m.pull]
        snapshot = Snapshot(parameters, moved, self.model)
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        passes = Passes(closures, parameters, self.model, scaler, snapshot)
        try:
            try:
                direction = self._direction(passes, members, snapshot)
            except NotFinite as stop:
                if scaler is None:
                    raise BantamweightError(
                        f"{stop} is not finite, so the step was not taken and the weights are as before: "
                        "lower lr or h, or look at this batch"
                    ) from None
                direction = stop.gradients  # the scaler sees them, skips the update and lowers its scale
            with deferred_interrupt():
                snapshot.restore_weights()
                self._update(parameters, direction, scaler)
                snapshot.commit()
        except BaseException:
            with deferred_interrupt():
                snapshot.rollback()
            raise
        return passes.loss

    def _direction(self, passes: Passes, members: Sequence[_Member], snapshot: Snapshot) -> list[Tensor | None]:
        """d, with the weights left where the last pass put them."""
        regularised = any(m.pull for m in members)
        exact = regularised and self.mode == "exact"
        gradient = passes.gradient(exact)
        if exact and self.model is None and snapshot.saw_distributed:
            raise BantamweightError(
                'mode="exact" must know of DistributedDataParallel, which does not see torch.autograd.grad: '
                'give HERO model=the wrapped model, or use mode="fd"'
            )
        snapshot.keep_statistics()
        snapshot.keep_weights()
        self._perturb(members, gradient)
        if not regularised:
            return passes.gradient()
        if exact:
            return passes.gradient_and_product(lambda ascended: _pull(members, gradient, ascended))
        ascended = passes.gradient()
        return self._difference(passes, members, ascended, _pull(members, gradient, ascended))

    def _perturb(self, members: Sequence[_Member], gradient: Sequence[Tensor | None]) -> None:
        """w* = w + e."""
        moved = [(m, g) for m, g in zip(members, gradient, strict=True) if m.radius and g is not None]
        if moved:
            weights = [m.parameter.detach() for m, _ in moved]
            steps = PERTURBATIONS[self.perturbation](weights, [g for _, g in moved], [m.radius for m, _ in moved])
            torch._foreach_add_(weights, steps)

    def _difference(
        self, passes: Passes, members: Sequence[_Member], ascended: list[Tensor | None], v: list[Tensor | None]
    ) -> list[Tensor | None]:
        """d = g* + [grad L(w* + s v) - g*] / s, where s v has `fd_step` times the norm of the regularised weights."""
        towards = [(m.parameter.detach(), u) for m, u in zip(members, v, strict=True) if u is not None]
        weights, along = [w for w, _ in towards], [u for _, u in towards]
        if not towards or (length := float(norms(along).norm())) == 0.0:
            return ascended
        s = self.fd_step * (float(norms(weights).norm()) or 1.0) / length
        torch._foreach_add_(weights, along, alpha=s)
        beyond = passes.gradient()
        pairs = [(a, b) for a, b in zip(ascended, beyond, strict=True) if a is not None and b is not None]
        stars, ends = [a for a, _ in pairs], [b for _, b in pairs]
        torch._foreach_sub_(ends, stars)
        torch._foreach_add_(stars, ends, alpha=1.0 / s)
        passes.check_finite(ascended)
        return ascended

    def _update(
        self, parameters: Sequence[Tensor], direction: list[Tensor | None], scaler: torch.amp.GradScaler | None
    ) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # of a parameter frozen since the last step, too
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.grad = d
        if scaler is None:
            self.base_optimizer.step()
            return
        # The scaler divides by its scale itself, and looks for overflow as it does.
        torch._foreach_mul_([d for d in direction if d is not None], scaler.get_scale())
        scaler.step(self.base_optimizer)

    def _members(self) -> list[_Member]:
        members = []
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                chosen = p.ndim >= 2 if group["regularize"] is None else group["regularize"]
                pull = (
                    2.0 * group["lam"] / (p.numel() if self.reduction == "mean" else 1) if chosen and p.numel() else 0.0
                )
                if pull and self.mode == "fd" and p.dtype in (torch.float16, torch.bfloat16):
                    raise BantamweightError(
                        f'mode="fd" with lam > 0 got a parameter in {p.dtype}, too coarse for a difference of '
                        'gradients: keep the parameters in float32 under autocast, or use mode="exact"'
                    )
                members.append(_Member(parameter=p, radius=group["h"] if group["perturb"] else 0.0, pull=pull))
        return members


def _pull(
    members: Sequence[_Member], gradient: Sequence[Tensor | None], ascended: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """v_l = (2 lambda / n_l)(g*_l - g_l), made in the memory of g, which is not needed again."""
    v: list[Tensor | None] = [None] * len(members)
    for index, (member, g, star) in enumerate(zip(members, gradient, ascended, strict=True)):
        if member.pull and g is not None and star is not None:
            v[index] = g.sub_(star).mul_(-member.pull)
    return v


def _as_closures(closure: Closure | Sequence[Closure] | None) -> list[Closure]:
    closures = list(closure) if isinstance(closure, Sequence) else [closure]
    if not closures or not all(callable(c) for c in closures):
        raise BantamweightError(
            "HERO.step needs a closure, as it evaluates the loss several times: "
            "optimizer.step(lambda: loss_function(model(x), y)), or a list of them, one a micro-batch"
        )
    return closures  # type: ignore[return-value]


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BantamweightError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")
