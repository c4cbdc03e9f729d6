"""HERO among its neighbours: GradScaler, autocast, torch.compile, attention, DistributedDataParallel."""

import copy
import os
import socket

import pytest
import torch
from bantamweight import HERO
from bantamweight.errors import BantamweightError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 16),
        nn.SiLU(),
        nn.Linear(16, 5),
    )


def batch(n=16):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def closure_for(model, x, y, dtype=None):
    def closure():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return F.cross_entropy(model(x), y)

    return closure


# ---- GradScaler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_backward", [True, False])
@pytest.mark.parametrize(("mode", "lam"), [("exact", 5.0), ("fd", 5.0), ("fd", 0.0)])
def test_a_scaled_step_is_the_unscaled_step(mode, lam, own_backward):
    if own_backward and mode == "exact":
        pytest.skip("exact mode takes no closure that calls backward")
    x, y = batch()
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network()
        optimizer = HERO(model.parameters(), lr=0.1, mode=mode, lam=lam, reduction="sum")

        def closure(model=model, scaler=scaler):
            loss = F.cross_entropy(model(x), y)
            if own_backward:
                (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        for _ in range(2):
            loss = optimizer.step(closure, scaler=scaler)
            if scaler is not None:
                scaler.update()
        results.append((model, loss))
    # Powers of two scale without rounding; what remains is the sum of g* and H v.
    torch.testing.assert_close(flat_gradient(results[0][0]), flat_gradient(results[1][0]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("failing_call", [1, 2, 3])
@pytest.mark.parametrize("mode", ["exact", "fd"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(mode, failing_call):
    if mode == "exact" and failing_call == 3:
        pytest.skip("exact mode calls the closure twice")
    model, (x, y) = network(), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = HERO(model.parameters(), lr=0.1, momentum=0.9, mode=mode)
    optimizer.step(closure_for(model, x, y), scaler=scaler)
    scaler.update()
    before = copy.deepcopy((dict(model.named_parameters()), list(optimizer.state.values())))
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(x), y) * (float("inf") if calls == failing_call else 1.0)

    optimizer.step(closure, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 512.0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[0][name]), name
    for slots, old in zip(optimizer.state.values(), before[1], strict=True):
        assert torch.equal(slots["momentum_buffer"], old["momentum_buffer"])
    optimizer.step(closure_for(model, x, y), scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 512.0 and not torch.equal(model[0].weight, before[0]["0.weight"])


def test_a_disabled_scaler_is_none():
    model, (x, y) = network(), batch()
    optimizer = HERO(model.parameters(), lr=0.1)
    optimizer.step(closure_for(model, x, y), scaler=torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(BantamweightError, match="not finite"):
        optimizer.step(lambda: model(x).sum() * float("nan"), scaler=torch.amp.GradScaler("cpu", enabled=False))


# ---- autocast -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False], ids=["around the step", "in the closure"])
@pytest.mark.parametrize("mode", ["exact", "fd"])
def test_bf16_autocast_stays_close_to_float32(mode, outside):
    x, y = batch()
    gradients = []
    for dtype in (None, torch.bfloat16):
        model = network()
        optimizer = HERO(model.parameters(), lr=0.1, mode=mode, reduction="sum", lam=0.5, fd_step=0.03)
        if outside:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
                optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
        else:
            optimizer.step(closure_for(model, x, y, dtype))
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        gradients.append(flat_gradient(model))
    assert F.cosine_similarity(*gradients, dim=0) > 0.97


def test_autocast_does_not_reuse_the_weights_before_the_perturbation():
    model, (x, y) = nn.Linear(8, 3), (torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    losses = []

    def closure():
        loss = F.cross_entropy(model(x), y)
        losses.append(float(loss.detach()))
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        HERO(model.parameters(), lr=0.1, lam=0.0, h=2.0).step(closure)
    assert losses[1] > losses[0] + 0.05  # the ascent step was seen


# ---- models that cannot be differentiated twice ---------------------------------------------------------------


def test_a_compiled_model_trains_in_fd_mode_and_is_refused_in_exact_mode():
    x, y = batch()
    plain, model = network(), network()
    compiled = torch.compile(model, backend="aot_eager")
    for net, parameters in ((plain, plain.parameters()), (compiled, model.parameters())):
        optimizer = HERO(parameters, lr=0.1, mode="fd", model=net)
        for _ in range(2):
            optimizer.step(closure_for(net, x, y))
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BantamweightError, match='use mode="fd"'):
        HERO(model.parameters(), lr=0.1, mode="exact", model=compiled).step(closure_for(compiled, x, y))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_flash_attention_trains_in_fd_mode_and_is_refused_in_exact_mode():
    torch.manual_seed(0)
    project, x = nn.Linear(16, 48), torch.randn(2, 10, 16)

    def closure():
        q, k, v = project(x).view(2, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v).square().mean()

    first = float(HERO(project.parameters(), lr=0.1, mode="fd").step(closure))
    assert float(closure().detach()) < first
    with pytest.raises(BantamweightError, match='use mode="fd"'):
        HERO(project.parameters(), lr=0.1, mode="exact").step(closure)


@pytest.mark.parametrize("mode", ["exact", "fd"])
def test_checkpointed_activations_change_nothing(mode):
    x, y = batch()
    gradients = []
    for checkpointed in (False, True):
        model = network()
        optimizer = HERO(model.parameters(), lr=0.1, mode=mode, reduction="sum", model=model)

        def closure(model=model, checkpointed=checkpointed):
            body, head = model[:4], model[4:]
            features = checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)
            return F.cross_entropy(head(features), y)

        optimizer.step(closure)
        gradients.append(flat_gradient(model))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


# ---- DistributedDataParallel ----------------------------------------------------------------------------------


# mode, gradient_as_bucket_view, micro-batches a step
CASES = [("exact", False, 1), ("fd", False, 1), ("fd", True, 1), ("exact", False, 2), ("fd", True, 2)]


def micro_batches(model, x, y, number):
    """Closures whose losses add up to that of the batch."""

    def part(x, y):
        return lambda: F.cross_entropy(model(x), y) / number

    return [part(a, b) for a, b in zip(x.chunk(number), y.chunk(number), strict=True)]


def _train_distributed(rank, port, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for mode, bucket_view, number in CASES:
        model = network()
        model[1] = nn.Identity()  # BatchNorm over half a batch is not BatchNorm over the whole
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        optimizer = HERO(model.parameters(), lr=0.1, momentum=0.9, mode=mode, reduction="sum", lam=1.0, model=parallel)
        x, y = (t.chunk(2)[rank] for t in batch())
        for _ in range(3):
            optimizer.step(micro_batches(parallel, x, y, number))
        # One process's bad batch stops all of them, together.
        with pytest.raises(BantamweightError, match="not finite"):
            optimizer.step(closure_for(parallel, x * (float("nan") if rank else 1.0), y))
        if mode == "exact":
            with pytest.raises(BantamweightError, match="model=the wrapped model"):
                HERO(model.parameters(), lr=0.1, mode=mode).step(closure_for(parallel, x, y))
        save_file(model.state_dict(), out / f"{mode}-{bucket_view}-{number}-{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # what is still on its way between the processes' threads must not abort one that leaves first


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_train_distributed, (port, tmp_path), nprocs=2)
    for mode, bucket_view, number in CASES:
        files = (tmp_path / f"{mode}-{bucket_view}-{number}-{rank}.safetensors" for rank in (0, 1))
        first, second = (load_file(file) for file in files)
        model, (x, y) = network(), batch()
        model[1] = nn.Identity()
        optimizer = HERO(model.parameters(), lr=0.1, momentum=0.9, mode=mode, reduction="sum", lam=1.0)
        for _ in range(3):
            optimizer.step(closure_for(model, x, y))
        for name, value in model.state_dict().items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4, msg=name)
