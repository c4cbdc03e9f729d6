"""Random networks of what users write: quantized right, or refused in a sentence.

A draw that fails prints its seed, what it consists of, and the smallest part of it that fails. To run one again:
``pytest tests/quantize/test_any_network.py -k seed-17``; the long run is ``-m slow``, its first seed and its number
of draws ``BANTAMWEIGHT_FIRST_DRAW`` and ``BANTAMWEIGHT_DRAWS``.
"""

import functools
import os
import time
import warnings

import pytest
import torch
from network_blocks import BLOCKS
from random_networks import Network, check, draw, kind_of_failure, smallest

SEEDS = range(400)
SECONDS = 240  # of the long run at most

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def network_of(seed: int) -> Network:
    return draw(seed)


def story(network: Network) -> str:
    """What failed, and the smallest part of it that does."""
    small = smallest(network)
    return "\n  ".join(
        [
            f"seed {network.seed}: {kind_of_failure(network)}",
            *network.description,
            f"the smallest part that fails, by {kind_of_failure(small)}:",
            *small.description,
        ]
    )


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed-{seed}")
def test_a_random_network(seed: int):
    network = network_of(seed)
    try:
        with torch.no_grad():
            check(network)
    except Exception as error:
        raise AssertionError(story(network)) from error


def test_every_block_is_drawn():
    drawn = {line.partition("(")[0] for seed in SEEDS for line in network_of(seed).description[1:]}
    assert drawn == {name for blocks in BLOCKS.values() for name in blocks}


def test_networks_are_seldom_refused():
    refused = []
    for seed in range(60):
        with torch.no_grad(), warnings.catch_warnings():
            try:
                if check(network_of(seed)) == "refused":
                    refused.append(seed)
            except Exception:  # test_a_random_network's to say
                continue
    assert len(refused) <= 3, refused


@pytest.mark.slow
def test_many_random_networks():
    first, draws = int(os.environ.get("BANTAMWEIGHT_FIRST_DRAW", 1000)), int(os.environ.get("BANTAMWEIGHT_DRAWS", 4000))
    end = time.perf_counter() + SECONDS
    failed: list[str] = []
    for seed in range(first, first + draws):
        network = draw(seed)
        if kind_of_failure(network) is not None:
            failed.append(story(network))
        if time.perf_counter() > end or len(failed) == 20:
            break
    assert not failed, "\n".join(failed)
