"""Small random networks of the blocks that users write, drawn from a seed, and what has to hold for each."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bantamweight as bw
import held_blocks  # noqa: F401  (registers its blocks)
import layer_blocks  # noqa: F401
import sequence_blocks  # noqa: F401
import torch
from bantamweight.errors import BantamweightError
from bantamweight.nn.layer import QuantizedLayer
from image_blocks import conv
from network_blocks import BLOCKS, Draw, Shape, evenly_table, linear, shaken
from torch import Tensor, nn

INPUTS: dict[str, Shape] = {"rows": (16,), "tokens": (5, 16), "images": (8, 9, 7)}
JOINS = {"rows": ("none",), "tokens": ("none", "mean of tokens"), "images": ("mean", "view")}  # before the head
FORMS = ("tensor", "tensor", "labelled", "words", "two", "star", "pair", "keywords", "optional", "function")
WRAPPERS = (
    "none",
    "none",
    "none",
    "none",
    "DataParallel",
    "Sequential",
    "forward replaced",
    "training",
    "called before",
)
TOLERANCE = 0.06

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Body(nn.Module):
    """The drawn blocks and a head."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module, join: str, answer: str) -> None:
        super().__init__()
        self.blocks, self.head, self.join, self.answer = nn.ModuleList(blocks), head, join, answer

    def body(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        if self.join == "view":
            x = x.contiguous().view(x.size(0), -1)
        elif self.join != "none":
            x = x.mean(1 if self.join == "mean of tokens" else (2, 3))
        y = self.head(x)
        return {"tensor": y, "dict": {"logits": y, "hidden": (x, None)}, "tuple": (y, [x.abs().mean()])}[self.answer]


class Single(Body):
    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Two(Body):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(x + 0.5 * y)


class Star(Body):
    def forward(self, *inputs: Tensor) -> Any:
        return self.body(torch.stack(inputs).sum(0))


class Words(Body):
    """Tokens from a table."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.embedding = evenly_table(24, 16)

    def forward(self, ids: Tensor) -> Any:
        return self.body(4 * self.embedding(ids))


class Pair(Body):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        x, y = pair
        return self.body(x * 0.7 - y)


class Optional(Body):
    """What comes out of the first layer goes to its BatchNorm alone only where `y` is given."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        images = self.join in JOINS["images"]
        self.stem = conv(8, 8, 1) if images else linear(16, 16)
        self.norm = shaken(nn.BatchNorm2d(8)) if images else nn.LayerNorm(16)
        if self.join == "none":
            self.norm = nn.Sequential(nn.Flatten(0, -2), shaken(nn.BatchNorm1d(16)))

    def forward(self, x: Tensor, y: Tensor | None = None, *, scale: float = 1.0) -> Any:
        h = self.stem(x)
        if y is None:
            y = h
        return self.body(scale * self.norm(h).reshape(h.shape) - y)


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A drawn network; `make` builds it anew, the same every time."""

    seed: int
    description: list[str]
    make: Callable[[], nn.Module]
    prepare: Callable[[nn.Module], nn.Module]  # what the user did to it before it is quantized
    call: Callable[[int, int], Call]  # of samples and a seed: the arguments of one call
    calibration: Any
    n_blocks: int


def draw(seed: int, drop: frozenset[int] = frozenset(), plain: bool = False) -> Network:
    """The network of a seed, without some of its blocks, or without its wrapper and form of inputs."""
    choices = Draw(f"{seed}")
    family = choices.pick("family", *INPUTS)
    kinds = [choices.random.choice(sorted(BLOCKS[family])) for _ in range(choices.random.choice((1, 2, 2, 3)))]
    form, wrapper = choices.pick("form", *FORMS), choices.pick("wrapper", *WRAPPERS)
    answer, join = choices.pick("answer", "tensor", "tensor", "dict", "tuple"), choices.pick("join", *JOINS[family])
    if form == "words" and family != "tokens":
        form = "tensor"
    if wrapper == "Sequential" and form in ("two", "star", "keywords", "optional"):
        wrapper = "none"  # nn.Sequential takes one argument
    if plain:
        form, wrapper, answer = "tensor", "none", "tensor"
    kept = [(index, kind) for index, kind in enumerate(kinds) if index not in drop]

    def build() -> tuple[nn.Module, list[str]]:
        blocks, description, shape = [], [], INPUTS[family]
        for index, kind in kept:
            block_choices = Draw(f"{seed}/{index}")
            block = BLOCKS[family][kind](block_choices, shape).eval()
            with torch.no_grad():
                try:
                    next_shape = tuple(block(torch.zeros(2, *shape)).shape[1:])
                except RuntimeError:  # a kernel larger than what strides left of an image
                    continue
            block_choices = Draw(f"{seed}/{index}")  # a block that was called may hold something of the call
            blocks.append(BLOCKS[family][kind](block_choices, shape).eval())
            description.append(f"{kind}({block_choices})")
            shape = next_shape
        torch.manual_seed(seed)
        width = shape[-1] if family != "images" else shape[0] * (shape[1] * shape[2] if join == "view" else 1)
        body = {"two": Two, "star": Star, "pair": Pair, "keywords": Optional, "optional": Optional, "words": Words}
        return body.get(form, Single)(blocks, linear(width, 6), join, answer), description

    def inputs(n: int, at: int) -> Tensor:
        generator = torch.Generator().manual_seed(at)
        return torch.randn(n, *INPUTS[family], generator=generator) + 0.2

    def call(n: int, at: int) -> Call:
        if form == "words":
            return (torch.randint(24, (n, INPUTS["tokens"][0]), generator=torch.Generator().manual_seed(at)),), {}
        x, y = inputs(n, at), inputs(n, at + 500)
        if form in ("two", "star"):
            return (x, y), {}
        if form == "pair":
            return ((x, y),), {}
        if form == "keywords":
            return (), {"x": x, "y": y, "scale": 0.5}
        if form == "optional":
            return (x,), ({"y": y} if at % 2 else {})
        return (x,), {}

    def calibration() -> Any:
        calls = [call(8, 1000), call(8, 1002)]
        if form == "function":
            return lambda model: [model(*args, **kwargs) for args, kwargs in calls]
        if form == "keywords":
            return [kwargs for _, kwargs in calls]
        if form == "labelled":
            return [(*args, torch.arange(8)) for args, _ in calls]
        if form in ("tensor", "words"):
            return [args[0] for args, _ in calls]
        return [args for args, _ in calls]

    def make() -> nn.Module:
        network = build()[0].eval()
        return {"DataParallel": nn.DataParallel, "Sequential": nn.Sequential}.get(wrapper, lambda model: model)(network)

    def prepare(model: nn.Module) -> nn.Module:
        if wrapper == "forward replaced":
            model.forward = functools.partial(type(model).forward, model)
        if wrapper == "called before":
            args, kwargs = call(4, 7)
            model(*args, **kwargs)
        return model.train(wrapper == "training")

    head = f"{family}, inputs: {form}, wrapper: {wrapper}, answer: {answer}, join: {join}"
    return Network(
        seed=seed,
        description=[head, *build()[1]],
        make=make,
        prepare=prepare,
        call=call,
        calibration=calibration(),
        n_blocks=len(kinds),
    )


# ---- what has to hold ----------------------------------------------------------------------------


def check(network: Network) -> str:
    """Holds a network against its quantized, packed and fused forms.

    Returns:
        "quantized", or "refused" where a BantamweightError says in a sentence what cannot be done.

    Raises:
        AssertionError: a wrong answer, a report that is not true, or a model that was changed.
        Exception: whatever else the package raises; it should not.
    """
    reference, model = network.make(), network.prepare(network.make())
    state, training = {key: value.clone() for key, value in model.state_dict().items()}, model.training
    try:
        quantized = bw.quantize(
            model,
            bw.RoundToNearest(bits=8),
            calibration=network.calibration,
            embeddings=bw.RoundToNearest(bits=8) if network.seed % 2 else None,
            progress=False,
        )
        packed = bw.pack(quantized)
    except BantamweightError as error:
        _assert_says_what(error)
        _assert_unchanged(model, state, training, reference, network)
        return "refused"
    forms: dict[str, nn.Module] = {"simulated": quantized, "packed": packed}
    try:
        forms["fused"] = bw.nn.fuse(packed)
    except BantamweightError as error:
        _assert_says_what(error)
    _assert_reported(quantized)
    for form, candidate in forms.items():
        for n, at in ((3, 2001), (11, 2002)):
            expected, answer = _answer(reference, network, n, at), _answer(candidate, network, n, at)
            error = float((answer - expected).norm() / expected.norm())
            assert error < TOLERANCE, f"{form}: relative error {error:.3f} on {n} samples"
        with _called(model) as calls_of_original, _called(candidate) as calls, _called(reference) as expected_calls:
            _answer(candidate, network, 11, 2002)
            _answer(reference, network, 11, 2002)
        assert not calls_of_original, f"{form}: runs {sorted(calls_of_original)} of the model that was passed in"
        if form != "fused":
            silent = {layer.name for layer in quantized.quantization.layers} & expected_calls - calls
            assert not silent, f"{form}: {sorted(silent)} are reported as quantized, but never called"
    _assert_unchanged(model, state, training, reference, network)
    return "quantized"


def _assert_says_what(error: BantamweightError) -> None:
    sentence = str(error)
    named = "'" in sentence or any(word in sentence for word in ("calibration", "model", "config", "batch", "layer"))
    assert named and "\n" not in sentence, f"{type(error).__name__} says neither layer nor argument: {sentence}"


def _assert_reported(quantized: nn.Module) -> None:
    """Every quantized layer is in the report, every reported one is quantized, and every other has a reason."""
    report = quantized.quantization
    modules = dict(quantized.named_modules(remove_duplicate=False))
    for layer in report.layers:
        assert isinstance(modules[layer.name], QuantizedLayer), f"reported as quantized, but is not: {layer.name}"
    reported = {id(modules[layer.name]) for layer in report.layers}
    unknown = [n for n, m in modules.items() if isinstance(m, QuantizedLayer) and id(m) not in reported]
    assert not unknown, f"quantized, but not in the report: {unknown}"
    explained = {id(modules[layer.name]) for layer in report.skipped if layer.name in modules}
    silent = [n for n, m in modules.items() if type(m) in (nn.Linear, nn.Conv2d) and id(m) not in explained]
    assert not silent, f"left in float without a word: {silent}"


def _assert_unchanged(
    model: nn.Module, state: dict[str, Tensor], training: bool, reference: nn.Module, network: Network
) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys(), f"the model's state dict changed: {sorted(now.keys() ^ state.keys())}"
    changed = [key for key in state if not torch.equal(now[key], state[key])]
    assert not changed, f"the model's state changed: {changed}"
    assert model.training == training, "the model's mode changed"
    mine, expected = _answer(model.eval(), network, 5, 2003), _answer(reference, network, 5, 2003)
    assert torch.equal(mine, expected), "the model that was passed in answers differently"


def _answer(model: nn.Module, network: Network, n: int, at: int) -> Tensor:
    args, kwargs = network.call(n, at)
    return _flat(model(*args, **kwargs))


@contextmanager
def _called(model: nn.Module) -> Iterator[set[str]]:
    """The names of the modules of a model that are called."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    calls: set[str] = set()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: calls.update(names.get(id(module), ()))
    )
    try:
        yield calls
    finally:
        handle.remove()


def _flat(answer: Any) -> Tensor:
    """Every tensor of an answer, in one row."""
    if isinstance(answer, Tensor):
        return answer.detach().double().flatten()
    parts = answer.values() if isinstance(answer, dict) else () if answer is None else answer
    return torch.cat([_flat(part) for part in parts] or [torch.zeros(0, dtype=torch.float64)])


# ---- where it does not hold ----------------------------------------------------------------------


def kind_of_failure(network: Network) -> str | None:
    """What goes wrong with a network, without its numbers, or None."""
    try:
        with torch.no_grad():
            check(network)
    except Exception as error:  # a draw fails by whatever is raised
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def smallest(network: Network) -> Network:
    """The network with as few blocks, and as plain a form, as still fail."""
    drop: frozenset[int] = frozenset()
    plain = False
    for index in range(network.n_blocks):
        if kind_of_failure(draw(network.seed, drop | {index})):
            drop |= {index}
    if kind_of_failure(draw(network.seed, drop, plain=True)):
        plain = True
    return draw(network.seed, drop, plain)
