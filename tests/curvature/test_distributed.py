"""Two processes with half the data each find what one process finds with all of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bantamweight.curvature import Hessian, spectral_density, top_eigenvalues, trace
from small_networks import network
from torch.nn import functional


def measure(data, group=None):
    """Everything that needs products, as plain numbers."""
    model, _ = network("conv")
    common = {"process_group": group}
    hessian = Hessian(model, functional.cross_entropy, data, **common)
    probe = torch.linspace(-1, 1, hessian.size, dtype=torch.float64)
    top = top_eigenvalues(model, functional.cross_entropy, data, k=3, which="both_ends", tol=1e-12, **common)
    return {
        "loss": [hessian.loss],
        "product": (hessian @ probe).tolist(),
        "gradient": hessian.gradient().tolist(),
        "values": top.values.tolist(),
        "trace": trace(model, functional.cross_entropy, data, products=30, **common).samples.tolist(),
        "density": spectral_density(model, functional.cross_entropy, data, steps=6, **common).nodes.tolist(),
        "samples": [hessian.conditions.samples],
    }


def worker():
    """One of two processes; the first holds three samples in two batches, the second five in one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _, (inputs, targets) = network("conv")
    shard = (
        [(inputs[:2], targets[:2]), (inputs[2:3], targets[2:3])] if dist.get_rank() == 0 else (inputs[3:], targets[3:])
    )
    print("RESULT " + json.dumps(measure(shard, dist.group.WORLD)), flush=True)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_give_the_results_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        answers.append(json.loads(out.partition("RESULT ")[2].splitlines()[0]))
    assert answers[0] == answers[1]  # both processes decide alike, to the last bit
    expected = measure(network("conv")[1])
    for name, values in expected.items():
        np.testing.assert_allclose(answers[0][name], values, rtol=1e-7, atol=1e-9, err_msg=name)


if __name__ == "__main__":
    worker()
