"""HERO against an independent reference, and everything a step must leave alone."""

import copy
import os
import signal

import pytest
import torch
from bantamweight import HERO
from bantamweight.errors import BantamweightError
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812


def network(activation=nn.SiLU, dtype=torch.float64, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        activation(),
        nn.Conv2d(4, 6, 3),
        activation(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(6 * 4 * 4, 5),
    ).to(dtype)


def batch(dtype=torch.float64, n=12):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(5, (n,), generator=generator)


def loss_of(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def state(model, optimizer):
    """Everything a step may touch, copied."""
    tensors = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    for index, slots in enumerate(optimizer.state.values()):
        tensors |= {f"state.{index}.{k}": v.clone() for k, v in slots.items() if isinstance(v, torch.Tensor)}
    tensors |= {f"grad.{k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return tensors | {"rng": torch.get_rng_state()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def reference_direction(model, x, y, h, lam, perturbation, reduction):
    """d by writing R down and differentiating it, with none of HERO's code."""
    w = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}

    def gradients(at, create_graph):
        loss = F.cross_entropy(functional_call(model, (at, dict(copy.deepcopy(model).named_buffers())), (x,)), y)
        return dict(zip(at, torch.autograd.grad(loss, list(at.values()), create_graph=create_graph), strict=True))

    g = gradients(w, False)
    if perturbation == "adaptive":
        norm = torch.sqrt(sum(((w[k].abs() * g[k]) ** 2).sum() for k in w))
        e = {k: h * w[k] ** 2 * g[k] / norm for k in w}
    elif perturbation == "plain":
        norm = torch.sqrt(sum((g[k] ** 2).sum() for k in w))
        e = {k: h * g[k] / norm for k in w}
    else:
        e = {k: h * w[k].norm() * g[k] / g[k].norm() for k in w}
    star = {k: (w[k] + e[k]).detach().requires_grad_() for k in w}
    g_star = gradients(star, True)
    r = sum(
        lam * ((g_star[k] - g[k]) ** 2).sum() / (w[k].numel() if reduction == "mean" else 1)
        for k in w
        if w[k].ndim >= 2
    )
    pulled = torch.autograd.grad(r, list(star.values()))
    return {k: g_star[k].detach() + p for k, p in zip(w, pulled, strict=True)}


def direction(model, optimizer, closure):
    optimizer.step(closure)
    return {k: p.grad.clone() for k, p in model.named_parameters()}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("perturbation", ["adaptive", "layerwise", "plain"])
def test_exact_equals_the_reference(perturbation, reduction):
    model, (x, y) = network(), batch()
    expected = reference_direction(model, x, y, 0.5, 5.0, perturbation, reduction)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = HERO(model.parameters(), lr=0.1, h=0.5, lam=5.0, perturbation=perturbation, reduction=reduction)
    got = direction(model, optimizer, loss_of(model, x, y))
    assert (flat(got) - flat(expected)).norm() <= 1e-6 * flat(expected).norm()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * expected[name], rtol=1e-9, atol=1e-12)


def test_the_regulariser_is_not_lost_in_the_tolerance():
    model, (x, y) = network(), batch()
    d = reference_direction(model, x, y, 0.5, 5.0, "adaptive", "sum")
    sam = reference_direction(model, x, y, 0.5, 0.0, "adaptive", "sum")
    assert (flat(d) - flat(sam)).norm() > 1e-2 * flat(sam).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finite_differences_match_on_a_smooth_network(dtype):
    x, y = batch(dtype)
    steps = {}
    for mode, lam in [("exact", 5.0), ("fd", 5.0), ("exact", 0.0)]:
        model = network(dtype=dtype)
        optimizer = HERO(model.parameters(), lr=0.1, h=0.5, lam=lam, mode=mode, reduction="sum")
        steps[mode, lam] = flat(direction(model, optimizer, loss_of(model, x, y)))
    pull = {mode: steps[mode, 5.0] - steps["exact", 0.0] for mode in ("exact", "fd")}  # H v alone
    assert F.cosine_similarity(pull["exact"], pull["fd"], dim=0) >= 0.999
    assert F.cosine_similarity(steps["exact", 5.0], steps["fd", 5.0], dim=0) >= 0.999


@pytest.mark.parametrize(("perturbation", "h"), [("plain", 0.05), ("adaptive", 0.5)])
def test_lam_zero_is_sam_and_asam(perturbation, h):
    model, (x, y) = network(), batch()
    expected = reference_direction(model, x, y, h, 0.0, perturbation, "mean")
    got = direction(
        model, HERO(model.parameters(), lr=0.1, h=h, lam=0.0, perturbation=perturbation), loss_of(model, x, y)
    )
    torch.testing.assert_close(flat(got), flat(expected), rtol=1e-10, atol=1e-12)


class _StopError(RuntimeError):
    pass


@pytest.mark.parametrize("failing_call", [1, 2, 3])
@pytest.mark.parametrize("failure", [_StopError, KeyboardInterrupt, "nan"])
@pytest.mark.parametrize("mode", ["exact", "fd"])
def test_an_aborted_step_changes_nothing(mode, failure, failing_call):
    if mode == "exact" and failing_call == 3:
        pytest.skip("exact mode calls the closure twice")
    model, (x, y) = network(dropout=0.3), batch()
    optimizer = HERO(model.parameters(), lr=0.1, momentum=0.9, h=0.5, lam=5.0, mode=mode, reduction="sum")
    optimizer.step(loss_of(model, x, y))
    before = state(model, optimizer)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(model(x), y)
        if calls < failing_call:
            return loss
        if failure == "nan":
            return loss * float("nan")
        raise failure

    with pytest.raises(BantamweightError if failure == "nan" else failure):
        optimizer.step(closure)
    assert calls == failing_call
    assert_same(state(model, optimizer), before)
    optimizer.step(loss_of(model, x, y))  # and training goes on
    assert not torch.equal(before["model.0.weight"], model[0].weight)


def test_a_nan_loss_with_finite_gradients_aborts_too():
    model, (x, y) = network(), batch()
    optimizer = HERO(model.parameters(), lr=0.1)
    before = state(model, optimizer)
    with pytest.raises(BantamweightError, match="the loss is not finite"):
        optimizer.step(lambda: F.cross_entropy(model(x), y) + float("nan"))
    assert_same(state(model, optimizer), before)


@pytest.fixture
def interrupts():
    """Ctrl-C as at a terminal: a process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_waits_for_the_update_to_end():
    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            os.kill(os.getpid(), signal.SIGINT)
            return super().step(closure)

    model, (x, y) = network(), batch()
    twin = copy.deepcopy(model)
    HERO(twin.parameters(), lr=0.1).step(loss_of(twin, x, y))
    optimizer = HERO(model.parameters(), Interrupted, lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss_of(model, x, y))
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("known", [True, False], ids=["model given", "model noticed"])
@pytest.mark.parametrize(("mode", "lam"), [("exact", 5.0), ("fd", 5.0), ("fd", 0.0)])
def test_statistics_are_updated_once(mode, lam, known):
    model, (x, y) = network(), batch()
    twin = copy.deepcopy(model)
    twin(x)
    optimizer = HERO(model.parameters(), lr=0.1, mode=mode, lam=lam, model=model if known else None)
    optimizer.step(loss_of(model, x, y))
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_all_passes_see_the_same_dropout_and_the_generator_moves_once():
    model, (x, y) = network(dropout=0.5), batch()
    masks = []
    model[6].register_forward_hook(lambda _, i, o: masks.append((o == 0) & (i[0] != 0)))
    optimizer = HERO(model.parameters(), lr=0.1, mode="fd")
    torch.manual_seed(3)
    model(x)
    once = torch.get_rng_state()
    torch.manual_seed(3)
    optimizer.step(loss_of(model, x, y))
    assert torch.equal(torch.get_rng_state(), once)
    assert len(masks) == 4 and all(torch.equal(m, masks[0]) for m in masks) and masks[0].any()


@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_closures_may_call_backward_in_fd_mode(lam):
    x, y = batch()
    results = []
    for own in (True, False):
        model = network()
        optimizer = HERO(model.parameters(), lr=0.1, momentum=0.9, mode="fd", lam=lam)

        def closure(model=model, optimizer=optimizer, own=own):
            loss = F.cross_entropy(model(x), y)
            if own:
                optimizer.zero_grad()
                loss.backward()
                return loss.detach()
            return loss

        losses = [float(optimizer.step(closure)) for _ in range(3)]
        results.append((losses, model.state_dict()))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_closures_that_call_backward_get_a_sentence_in_exact_mode():
    model, (x, y) = network(), batch()
    optimizer = HERO(model.parameters(), lr=0.1)
    before = state(model, optimizer)

    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(BantamweightError, match='use mode="fd"'):
        optimizer.step(closure)
    assert_same(state(model, optimizer), before)
    optimizer = HERO(model.parameters(), lr=0.1, lam=0.0)  # SAM has no double backward: any mode
    optimizer.step(closure)


@pytest.mark.parametrize("mode", ["exact", "fd"])
def test_micro_batches_add_up_to_the_batch(mode):
    x, y = batch(n=12)
    results = []
    for parts in (1, 3):
        model = network()
        model[1] = nn.Identity()  # statistics of a batch are not those of its parts
        optimizer = HERO(model.parameters(), lr=0.1, mode=mode, reduction="sum")
        closures = [
            lambda a=a, b=b, model=model: F.cross_entropy(model(a), b) / parts  # noqa: B023
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)
        ]
        results.append((optimizer.step(closures), {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(flat(results[0][1]), flat(results[1][1]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["exact", "fd"])
def test_resumes_bit_exact(mode, tmp_path):
    def make():
        model = network(dtype=torch.float32)
        optimizer = HERO(model.parameters(), torch.optim.AdamW, lr=0.01, mode=mode)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.step(loss_of(model, *batch(torch.float32)))
            schedule.step()

    straight = make()
    train(*straight, 6)
    first = make()
    train(*first, 3)
    saved = [copy.deepcopy(part.state_dict()) for part in first]
    second = make()
    for part, value in zip(second, saved, strict=True):
        part.load_state_dict(value)
    train(*second, 3)
    assert_same(state(*straight[:2]), state(*second[:2]))
    assert second[1].param_groups[0]["lr"] == straight[1].param_groups[0]["lr"] < 0.01
    assert second[1].base_optimizer.param_groups is second[1].param_groups


def test_a_copied_optimizer_goes_on_alike():
    model, (x, y) = network(), batch()
    optimizer = HERO(model.parameters(), lr=0.1, momentum=0.9, mode="fd", model=model)
    optimizer.step(loss_of(model, x, y))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert twin_optimizer.model is twin
    optimizer.step(loss_of(model, x, y))
    twin_optimizer.step(loss_of(twin, x, y))
    assert_same(state(model, optimizer), state(twin, twin_optimizer))


def test_groups_choose_who_is_perturbed_and_regularised():
    x, y = batch()
    model = network()
    seen = []
    model.register_forward_hook(lambda *_: seen.append([p.detach().clone() for p in model.parameters()]))
    head = list(model[7].parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer = HERO([{"params": body, "perturb": False, "lam": 0.0}, {"params": head, "h": 0.2, "lr": 0.01}], lr=0.1)
    optimizer.step(loss_of(model, x, y))
    moved = [not torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert moved == [any(p is q for q in head) for p in model.parameters()]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert optimizer.param_groups[2]["lr"] == 0.1 and optimizer.param_groups[2]["regularize"] is None
    for p in body:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in body]
    optimizer.step(loss_of(model, x, y))
    assert all(torch.equal(a, b) for a, b in zip(body, before, strict=True))


def test_clipping_goes_into_a_hook_of_the_base_optimizer():
    model, (x, y) = network(), batch()
    optimizer = HERO(model.parameters(), lr=0.1)

    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    optimizer.base_optimizer.register_step_pre_hook(clip)
    got = direction(model, optimizer, loss_of(model, x, y))
    assert float(flat(got).norm()) <= 1.001e-3


def test_zero_gradients_give_no_nan():
    layer = nn.Linear(3, 2)
    for perturbation in ("adaptive", "layerwise", "plain"):
        for mode in ("exact", "fd"):
            optimizer = HERO(layer.parameters(), lr=0.1, perturbation=perturbation, mode=mode)
            optimizer.step(lambda: (layer(torch.zeros(4, 3)) * 0.0).sum())
    assert all(torch.isfinite(p).all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "approx"}, "'exact', 'fd'"),
        ({"perturbation": "sam"}, "'adaptive', 'layerwise', 'plain'"),
        ({"reduction": "none"}, "'mean', 'sum'"),
        ({"h": -1.0}, "h is -1.0"),
        ({"lam": float("nan")}, "lam is nan"),
        ({"fd_step": 0.0}, "fd_step is 0.0"),
    ],
)
def test_bad_options_get_a_sentence(options, words):
    with pytest.raises(BantamweightError, match=words):
        HERO([nn.Parameter(torch.zeros(2))], lr=0.1, **options)


class OwnClosure(torch.optim.SGD):
    def step(self, closure):  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("base", [torch.optim.LBFGS, OwnClosure])
def test_a_base_optimizer_that_wants_a_closure_is_refused(base):
    with pytest.raises(BantamweightError, match=f"base_optimizer is {base.__name__}, whose step evaluates a closure"):
        HERO([torch.nn.Parameter(torch.ones(2))], base, lr=0.1)


def test_bad_closures_get_a_sentence():
    model, (x, y) = network(), batch()
    optimizer = HERO(model.parameters(), lr=0.1)
    for closure, words in [
        (None, "needs a closure"),
        ([], "needs a closure"),
        (lambda: None, "returned NoneType"),
        (lambda: F.cross_entropy(model(x), y).detach(), r"do not detach"),
        (lambda: F.cross_entropy(model(x), y, reduction="none"), r"shape \(12,\)"),
    ]:
        with pytest.raises(BantamweightError, match=words):
            optimizer.step(closure)


def test_coarse_parameters_are_refused_in_fd_mode():
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = HERO(layer.parameters(), lr=0.1, mode="fd")
    with pytest.raises(BantamweightError, match="float32 under autocast"):
        optimizer.step(lambda: layer(torch.ones(4, 3, dtype=torch.bfloat16)).sum())


def test_sparse_gradients_are_refused_and_nothing_moves():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = HERO(table.parameters(), lr=0.1, mode="fd")
    before = state(table, optimizer)
    with pytest.raises(BantamweightError, match="sparse=False"):
        optimizer.step(lambda: (table(torch.tensor([1, 2])) ** 2).sum())
    assert_same(state(table, optimizer), before)
