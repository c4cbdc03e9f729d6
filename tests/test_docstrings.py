"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import bantamweight
import pytest
import torch

MODULES = [
    found.name
    for found in pkgutil.walk_packages(bantamweight.__path__, "bantamweight.")
    if not found.name.endswith(("_C", "__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))  # an example may write a file
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_the_walk_finds_the_package() -> None:
    assert {"bantamweight.weights", "bantamweight.nn.packed", "bantamweight.io.model_file"} <= set(MODULES)
