"""Modules of many kinds rewritten, where they stand, so that their weights live in plain layers.

Quantizers, kernels and files know nn.Linear, nn.Conv2d and nn.Embedding. A recurrent layer, an attention or a 1d
convolution computes with the same products, but keeps their weights in parameters of its own. `prepare` gives each
such module children of the plain kinds that hold its weights, and lets it compute with them.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import BantamweightError, FormatError
from .fast_paths import leave_fast_paths
from .prepared.attention import PreparedMultiheadAttention
from .prepared.bag import PreparedEmbeddingBag
from .prepared.base import PreparedModule, class_for, reason_to_leave
from .prepared.convolution import PreparedConv1d
from .prepared.hosted import HostedModule, observed, uses_of, watched
from .prepared.linear import PreparedBilinear, PreparedTransposedLinear
from .prepared.recurrent import PreparedGRU, PreparedLSTM, PreparedRNN
from .prepared.recurrent_cell import PreparedGRUCell, PreparedLSTMCell, PreparedRNNCell
from .prepared.stand_in import Use
from .prepared.transposed import PreparedConvTranspose1d, PreparedConvTranspose2d
from .surgery import become

_FORMS: tuple[type[PreparedModule], ...] = (
    PreparedConv1d,
    PreparedConvTranspose1d,
    PreparedConvTranspose2d,
    PreparedLSTM,
    PreparedGRU,
    PreparedRNN,
    PreparedLSTMCell,
    PreparedGRUCell,
    PreparedRNNCell,
    PreparedMultiheadAttention,
    PreparedEmbeddingBag,
    PreparedBilinear,
)


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)

SETTLED = "settled"  # the kind of a tensor, not a module, that `settle_weights` made plain


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` did.

    Attributes:
        records: by the first name of each module that was rewritten, what a file's header must say for `prepare_like`.
        left: by name, why a module of a kind that can be prepared was left as it is.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def prepare(
    model: nn.Module,
    *,
    skip: Callable[[str], bool] = lambda name: False,
    run: Callable[[nn.Module], Any] | None = None,
) -> Prepared:
    """Rewrites, in place, every module of a kind that has a prepared form; each stays the same object.

    Args:
        skip: True for the names of modules to leave alone.
        run: runs the model it is given once on real data; it gets a copy, on which what the model keeps of the data
            stays. While it does, modules with a forward of their own are observed: those that hand a parameter to a
            product (a subclass of nn.Linear with a scale, say, or 3d weights of experts) are rewritten so that a child
            computes it. Without it they are left as they are.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU())
        >>> prepare(net).records
        {'0': {'kind': 'conv1d'}}
        >>> [name for name, _ in net.named_parameters()]
        ['0.conv.weight', '0.conv.bias']
    """
    found = Prepared()
    for name, module in list(model.named_modules()):
        form = _form_of(module)
        hosted = isinstance(module, _LAYERS) and bool(watched(module))
        if form is None or hosted or skip(name):
            continue
        reason = reason_to_leave(form, module)
        if reason is not None:
            found.left[name] = reason
            continue
        new = form.prepare(module)
        found.records[name] = new.record()
        become(module, new)
    _host(model, skip, run, found)
    leave_fast_paths(model)
    return found


def prepare_like(model: nn.Module, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Brings a model from make_model(), maybe on the meta device, into the form of one that was prepared and saved.

    Raises:
        FormatError: a record of an unknown kind, or a module that is missing or does not fit its record. The model is
            then as before.

    Example:
        >>> net = nn.Sequential(nn.LSTM(4, 8), nn.Identity())
        >>> prepare_like(net, {"0": {"kind": "lstm"}})
        >>> [name for name, _ in net.named_children()], isinstance(net[0], nn.LSTM)
        (['0', '1'], True)
    """
    forms = {form.kind: form for form in (*_FORMS, PreparedTransposedLinear, HostedModule)}
    planned: list[tuple[nn.Module, PreparedModule]] = []
    for name, record in records.items():
        if record.get("kind") == SETTLED:  # done before BatchNorms were folded
            continue
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise FormatError(
                f"the file has a prepared module {name!r}, which {type(model).__name__} lacks; pass the make_model() "
                "it was saved from"
            ) from None
        kind = record.get("kind")
        form = forms.get(kind) if isinstance(kind, str) else None
        if form is PreparedTransposedLinear:
            form = _transposed_form() or form
        if form is None:
            raise FormatError(
                f"module {name!r} of the file is prepared as {kind!r}, which this version does not know; load it with "
                "the bantamweight that saved it, or a newer one"
            )
        try:
            planned.append((module, form.prepare_like(module, record)))
        except FormatError as error:
            raise FormatError(f"module {name!r}: {error}; pass the make_model() it was saved from") from None
    for module, new in planned:
        become(module, new)
    leave_fast_paths(model)


def _host(
    model: nn.Module, skip: Callable[[str], bool], run: Callable[[nn.Module], Any] | None, found: Prepared
) -> None:
    """Observes the modules with a forward of their own, and rewrites those that suit."""
    modules = {name: (module, watched(module)) for name, module in model.named_modules() if not skip(name)}
    modules = {name: (module, names) for name, (module, names) in modules.items() if names and name not in found.left}
    read = {} if run is None else _read_by_others(model, skip, run)
    modules |= read
    layers = [name for name, (module, _) in modules.items() if isinstance(module, _LAYERS)]
    if run is None or not modules:
        found.left.update({name: "how its own forward uses its weight was not observed; pass run" for name in layers})
        return
    seen = _seen(model, {name: names for name, (_, names) in modules.items()}, run)
    if isinstance(seen, Exception):  # one odd module must not cost the plain ones their child
        modules = {name: modules[name] for name in layers}
        seen = _seen(model, {name: names for name, (_, names) in modules.items()}, run)
    if isinstance(seen, Exception):
        reason = f"its own forward cannot be observed ({type(seen).__name__}: {seen})"
        found.left.update({name: reason for name in layers})
        return
    for name, (module, _) in modules.items():
        uses, left = uses_of(seen[name])
        reasons = {} if name in read else _reasons(module, seen[name], left)
        for key, reason in reasons.items():
            found.left[name if name in layers else f"{name}.{key}" if name else key] = reason
        if not uses:
            continue
        try:
            new = HostedModule.host(module, uses)
            record = new.record()
            become(module, new)
        except BantamweightError as error:
            found.left[name] = str(error)
        else:
            found.records[name] = record


def _read_by_others(
    model: nn.Module, skip: Callable[[str], bool], run: Callable[[nn.Module], Any]
) -> dict[str, tuple[nn.Module, list[str]]]:
    """Plain layers that one run does not call: another module's forward may hand their weights to a product."""
    scratch = copy.deepcopy(model)
    called: set[str] = set()
    plain = {name: module for name, module in scratch.named_modules() if type(module) in _LAYERS and not skip(name)}
    for name, module in plain.items():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    try:
        run(scratch)
    except Exception:  # what is wrong with the run, the caller's own says
        return {}
    return {
        name: (module, [key for key, value in module._parameters.items() if value is not None])
        for name, module in model.named_modules()
        if name in plain and name not in called
    }


def _seen(
    model: nn.Module, parameters: Mapping[str, list[str]], run: Callable[[nn.Module], Any]
) -> dict[str, dict[str, list[Use | None]]] | Exception:
    """What modules, by name, did with their parameters in one run of a copy, or what the run raised."""
    scratch = copy.deepcopy(model)
    try:
        with observed({name: (scratch.get_submodule(name), keys) for name, keys in parameters.items()}) as seen:
            run(scratch)
    except Exception as error:  # the user's code meets tensors of another class
        return error
    return seen


def _reasons(module: Any, seen: Mapping[str, list[Use | None]], left: Mapping[str, str]) -> dict[str, str]:
    """By parameter, why no child holds it; nothing of a parameter that nobody would take for a matrix."""
    reasons = dict(left)
    for key, uses in seen.items():
        value: Any = module._parameters[key]
        matrices = isinstance(module, _LAYERS) or (value.ndim == 3 and min(value.shape) > 1)
        if not matrices or key in reasons or any(use is not None for use in uses):
            continue
        reasons[key] = (
            "its own forward hands it to no product or lookup that a child computes"
            if uses
            else "the data never reaches it"
        )
    return reasons


def _form_of(module: nn.Module) -> type[PreparedModule] | None:
    """The prepared form for modules of this class, if there is one and it is not prepared yet."""
    if isinstance(module, PreparedModule):
        return None
    transposed = _transposed_form()
    forms = _FORMS if transposed is None else (*_FORMS, transposed)
    return next((form for form in forms if isinstance(module, form.replaces)), None)


def _transposed_form() -> type[PreparedModule] | None:
    """The form for transformers' Conv1D, where somebody has imported it."""
    base = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if base is None:
        return None
    form = class_for(PreparedTransposedLinear, base)
    form.replaces = base
    return form
