"""`bantamweight info`: versions, CPU features, the kernel picked for each operation and why not the others."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

from .. import _C
from ..report.results import cpu_name

FORCE = "BANTAMWEIGHT_FORCE_KERNEL"


def run(args: argparse.Namespace) -> None:
    info = collect()
    print(json.dumps(info, indent=2) if args.json else describe(info))


def collect() -> dict[str, Any]:
    """Everything `info` tells, as plain values."""
    return {
        "versions": {
            "bantamweight": _version("bantamweight"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
        },
        "machine": {
            "cpu": cpu_name(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "instruction_sets": {name: missing or "available" for name, missing in _C.isa_table()},
        "forced_kernel": os.environ.get(FORCE) or None,
        "kernels": {
            name.removesuffix("_variants"): _pick(getattr(_C, name)()) for name in dir(_C) if name.endswith("_variants")
        },
        "cuda": "off: this version of bantamweight has CPU kernels only"
        + (" (torch sees a GPU, which is left alone)" if torch.cuda.is_available() else ""),
        "extras": {name: _installed(name) for name in ("sklearn", "matplotlib", "transformers", "onnxruntime")},
    }


def describe(info: dict[str, Any]) -> str:
    lines = [" \u00b7 ".join(f"{name} {version}" for name, version in info["versions"].items())]
    machine = info["machine"]
    lines.append(
        f"{machine['cpu']} ({machine['architecture']}), {machine['cores']} cores, {machine['torch_threads']} threads"
    )
    lines += ["", "instruction sets"]
    lines += [f"  {name:<14} {state}" for name, state in info["instruction_sets"].items()]
    if info["forced_kernel"]:
        lines += ["", f"{FORCE}={info['forced_kernel']} is a ceiling for every operation"]
    lines += ["", "kernels"]
    for operation, variants in info["kernels"].items():
        lines.append(f"  {operation}")
        lines += [f"    {name:<14} {state}" for name, state in variants.items()]
    lines += ["", f"cuda  {info['cuda']}"]
    lines.append("extras  " + ", ".join(f"{n} {'yes' if there else 'no'}" for n, there in info["extras"].items()))
    return "\n".join(lines)


def _pick(variants: list[tuple[str, str]]) -> dict[str, str]:
    """State of every variant of an operation, best first; the first that may run is the one picked."""
    ranks = {name: rank for rank, (name, _) in enumerate(_C.isa_table())}
    ceiling = _C.isa_ceiling()
    states: dict[str, str] = {}
    for name, missing in variants:
        if missing:
            states[name] = f"off: {missing}"
        elif ranks[name] < ranks[ceiling]:
            states[name] = f"off: above {FORCE}={ceiling}"
        else:
            states[name] = "off: a better one is picked" if "picked" in states.values() else "picked"
    return states


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
