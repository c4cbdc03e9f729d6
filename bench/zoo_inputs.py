"""Inputs of several kinds with some structure, and random weights that compute something, for zoo.py."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Inputs = Tensor | dict[str, Tensor]

VOCABULARY = 512
IMAGE = 96
TOKENS = 32
_BATCH_NORMS = nn.BatchNorm1d | nn.BatchNorm2d


def images(n: int, seed: int, size: int = IMAGE) -> Tensor:
    """Smooth blobs of colour under a little noise: [n, 3, size, size], about mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 6, 6, generator=generator)
    fine = torch.randn(n, 3, 24, 24, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic")
    edges = F.interpolate(fine, size=(size, size), mode="nearest")
    return smooth + 0.3 * edges + 0.1 * torch.randn(n, 3, size, size, generator=generator)


def tokens(n: int, seed: int, length: int = TOKENS) -> Tensor:
    """A walk in which every word has four likely successors, and now and then a frequent word: int64 [n, length]."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.empty(n, length, dtype=torch.int64)
    walk[:, 0] = torch.randint(VOCABULARY, (n,), generator=generator)
    for at in range(1, length):
        follow = (walk[:, at - 1] * 5 + 7 + torch.randint(4, (n,), generator=generator) * 31) % VOCABULARY
        frequent = (torch.rand(n, generator=generator) ** 4 * VOCABULARY).long()
        walk[:, at] = torch.where(torch.rand(n, generator=generator) < 0.3, frequent, follow)
    return walk


def audio(n: int, seed: int, samples: int, rate: int = 16_000) -> Tensor:
    """Tones of 80 to 600 Hz with overtones, some silence and some noise: [n, samples]."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 80 + 520 * torch.rand(n, 1, 1, generator=generator)
    overtone = torch.arange(1.0, 9.0)[:, None]
    phase = 6.2832 * torch.rand(n, 8, 1, generator=generator)
    waves = torch.sin(6.2832 * pitch * overtone * torch.arange(samples) / rate + phase) / overtone
    loudness = torch.rand(n, 1, generator=generator) * (torch.rand(n, 1, generator=generator) > 0.2)
    return 0.4 * loudness * waves.sum(1) + 0.02 * torch.randn(n, samples, generator=generator)


def padded_tokens(n: int, seed: int) -> dict[str, Tensor]:
    """Token ids of sentences of several lengths and their attention mask."""
    mask = torch.ones(n, TOKENS, dtype=torch.int64)
    mask[::3, TOKENS // 2 :] = 0
    return {"input_ids": tokens(n, seed), "attention_mask": mask}


def normalized_audio(n: int, seed: int) -> Tensor:
    frames = audio(n, seed, 1024)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True).clamp_min(1e-3)


def lively(network: nn.Module, batch: Inputs) -> nn.Module:
    """Statistics for the BatchNorms from a batch, and values for weights that start at (almost) zero.

    A network whose branches are multiplied by 1e-6, or whose head is zero, would hide every error. One whose rectifiers
    cut every second value would drown all in noise: each layer then doubles what differs between two inputs, as no
    trained network does. So BatchNorms shift most of their outputs above zero.
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BATCH_NORMS):
                module.weight.uniform_(0.4, 0.8)
                module.bias.uniform_(0.3, 1.0)
        for parameter in network.parameters():
            if parameter.ndim == 2 and not bool(parameter.any()):
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                if abs(float(parameter.flatten()[0])) < 1e-3:  # biases, and the scales of branches
                    parameter.uniform_(-0.1, 0.1) if parameter.ndim == 1 else parameter.uniform_(0.3, 0.7)
                else:  # the scales of normalizations
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.6, 1.4))
        norms = [module for module in network.eval().modules() if isinstance(module, _BATCH_NORMS)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        if norms:
            call(network, batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
    return network


def call(network: nn.Module, batch: Inputs) -> Any:
    """The network's answer to what `inputs` drew."""
    return network(**batch) if isinstance(batch, dict) else network(batch)
