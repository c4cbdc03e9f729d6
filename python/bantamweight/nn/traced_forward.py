"""A module's forward as torch.fx records it, changed, and put in the forward's place where both do the same.

The module stays what it is: its class, methods, attributes and hooks. It gets a forward of its own, which runs the
recorded calls where they hold and the class's forward otherwise: in another mode, with an optional argument that is
not at its default, or with an argument that is no tensor.
"""

import copy
import inspect
import types
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import BantamweightError
from .chain_finder import has_hooks
from .fold import LayerTracer
from .packed import PackedConv2d

_BOOKKEEPING = set(vars(nn.Module())) - {"_buffers", "training"}  # of nn.Module itself, which a forward leaves alone


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedForward:
    """The calls of one module's forward with every optional argument at its default.

    `graph` speaks of submodules, parameters and buffers by their names in the module. `constants` are the tensors that
    the forward makes from nothing; a graph names them too.
    """

    graph: fx.Graph
    required: tuple[str, ...]
    constants: Mapping[str, Tensor]


def trace(module: nn.Module) -> TracedForward:
    """Records the forward of a copy, so that nothing of the tracing stays on the module.

    Raises:
        BantamweightError: torch.fx cannot follow it, or it leaves something behind that a recorded forward would not;
            a clause that says why.
    """
    if "forward" in vars(module):
        raise BantamweightError("its forward was replaced on the object")
    try:
        return _trace(module, _Tracer())
    except BantamweightError:
        raise
    except Exception:  # whatever the model's own forward raises when it meets a proxy
        pass
    try:
        return _trace(module, _Tracer(whole_without_convolutions=True))
    except BantamweightError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
        raise BantamweightError(f"torch.fx cannot trace its forward ({said})") from None


def install(module: nn.Module, traced: TracedForward) -> None:
    """Gives the module a forward that runs the graph where it holds, and the class's own forward elsewhere."""
    vars(module).update(traced.constants)
    code = traced.graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<recorded forward>", "exec"), names)
    own = type(module).forward
    guarded = _guarded(own, names["forward"], traced.required, module.training)
    vars(module)["forward"] = types.MethodType(guarded, module)


def uninstall(module: nn.Module) -> None:
    del vars(module)["forward"]


class _Tracer(LayerTracer):
    """Records buffers by name, as they may change, and keeps whole what has nothing to fuse."""

    proxy_buffer_attributes = True

    def __init__(self, *, whole_without_convolutions: bool = False) -> None:
        super().__init__()
        self._whole = whole_without_convolutions
        self.required: tuple[str, ...] = ()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_hooks(m):  # which must run at every call, and not once on proxies
            return True
        if not any(isinstance(part, PackedConv2d) for part in m.modules()):
            held = next(m.parameters(), None) is not None or next(m.buffers(), None) is not None
            if held or self._whole:
                return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Proxies for the required arguments alone: the others are then Python's own defaults, branches included."""
        positional: list[str] = []
        keywords: list[str] = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.default is not parameter.empty or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                continue
            (keywords if parameter.kind is parameter.KEYWORD_ONLY else positional).append(parameter.name)
        self.required = (*positional, *keywords)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.required]

        def call(root: nn.Module, *args: Any) -> Any:
            return root_fn(root, *args[: len(positional)], **dict(zip(keywords, args[len(positional) :], strict=True)))

        return call, [self.root, *proxies]


def _trace(module: nn.Module, tracer: _Tracer) -> TracedForward:
    probe = copy.deepcopy(module)
    before = _state(probe)
    graph = tracer.trace(probe)
    graph.lint()  # the module may hold a proxy of another tracing, whose value no call of this one makes
    _check_nothing_is_left(before, _state(probe), graph)
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and not _has(module, str(node.target)):
            value = getattr(probe, str(node.target), None)
            if not isinstance(value, Tensor):
                raise BantamweightError(f"its forward makes {node.target}, a {type(value).__name__} that is no tensor")
            constants[str(node.target)] = value
    return TracedForward(graph=graph, required=tracer.required, constants=constants)


def _has(module: nn.Module, path: str) -> bool:
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


# ---- what a forward leaves behind ---------------------------------------------------------------


def _state(module: nn.Module) -> dict[str, Any]:
    """Everything that the module and its parts hold beside parameters and submodules, containers taken apart."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if key not in _BOOKKEEPING:
                _take_apart(f"{name}.{key}".removeprefix("."), value, found, set())
    return found


def _take_apart(path: str, value: Any, found: dict[str, Any], above: set[int]) -> None:
    if id(value) in above:
        return
    parts: Mapping[Any, Any] | None = None
    if isinstance(value, Mapping):
        parts = value
    elif isinstance(value, list | tuple | deque):
        parts = dict(enumerate(value))
    elif isinstance(value, set | frozenset):
        parts = {item: item for item in value}
    elif (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | Tensor | fx.Proxy | type)
        and not callable(value)
    ):
        parts = vars(value)
    if parts is None:
        found[path] = (value, value._version) if isinstance(value, Tensor) and not value.is_inference() else value
        return
    found[path] = (type(value), len(parts))
    for key, part in list(parts.items()):
        _take_apart(f"{path}[{key!r}]", part, found, above | {id(value)})


def _check_nothing_is_left(before: Mapping[str, Any], after: Mapping[str, Any], graph: fx.Graph) -> None:
    """A cache of something made from weights or from nothing does no harm: it is made again. Else somebody reads it."""
    inputs = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in inputs for source in node.all_input_nodes):
            inputs.add(node)
    containers = {path.rpartition("[")[0] for path in after if path.endswith("]")}
    for path in {**before, **after}:
        if path in before and path in after and _same(before[path], after[path]):
            continue
        if path in after and path in containers:
            continue  # what is new in it has a path of its own
        value = after.get(path)
        new = before.get(path) is None
        cached = isinstance(value, fx.Proxy) and value.node not in inputs
        cached |= isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)
        if not (new and cached):
            raise BantamweightError(f"its forward writes to its {path}, which a recorded forward would not")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):  # a tensor and its version, or a container
        return len(a) == len(b) and all(x is y or (type(x) is int and x == y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is type(b) and isinstance(a, int | float | complex | str | bytes) and a == b)


# ---- the forward that chooses -------------------------------------------------------------------


def _guarded(
    own: Callable[..., Any], recorded: Callable[..., Any], required: tuple[str, ...], training: bool
) -> Callable[..., Any]:
    """A function with the signature of `own`, which Python itself binds: a wrapper would cost every call its time."""
    parameters = list(inspect.signature(own).parameters.values())
    self_name = parameters[0].name
    names: dict[str, Any] = {"own_": own, "recorded_": recorded, "same_": _is_default, "Tensor_": torch.Tensor}
    conditions = [f"{self_name}.training is {training}"]
    declared, handed_on = [self_name], [self_name]
    slash = parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY
    star = False
    for parameter in parameters[1:]:
        name, kind = parameter.name, parameter.kind
        if slash and kind is not parameter.POSITIONAL_ONLY:
            declared.append("/")
            slash = False
        slash |= kind is parameter.POSITIONAL_ONLY
        if kind is parameter.KEYWORD_ONLY and not star:
            declared.append("*")
            star = True
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = star or kind is parameter.VAR_POSITIONAL
            stars = "*" if kind is parameter.VAR_POSITIONAL else "**"
            declared.append(stars + name)
            handed_on.append(stars + name)
            conditions.append(f"not {name}")
            continue
        handed_on.append(f"{name}={name}" if kind is parameter.KEYWORD_ONLY else name)
        if parameter.default is parameter.empty:
            declared.append(name)
            conditions.append(f"isinstance({name}, Tensor_)")
        else:
            names[f"default_{name}_"] = parameter.default
            declared.append(f"{name}=default_{name}_")
            conditions.append(f"({name} is default_{name}_ or same_({name}, default_{name}_))")
    if slash:
        declared.append("/")
    source = "\n".join(
        [
            f"def forward({', '.join(declared)}):",
            f"    if {' and '.join(conditions)}:",
            f"        return recorded_({', '.join([self_name, *required])})",
            f"    return own_({', '.join(handed_on)})",
        ]
    )
    exec(compile(source, "<forward>", "exec"), names)
    return names["forward"]


def _is_default(value: Any, default: Any) -> bool:
    return type(value) is type(default) and isinstance(value, int | float | str) and value == default
