# ruff: noqa: N999  (the name of the compiled module)
from typing import Any

def __getattr__(name: str) -> Any: ...
