"""Patterns that name layers, as `quantize` and `pack` take them."""

import re

from .errors import BantamweightError


def fits(argument: str, pattern: str, name: str) -> bool:
    """True if `pattern` is the layer's name, the name of a module that contains it, or a regular expression for it.

    Raises:
        BantamweightError: the pattern is none of these; `argument` says where it came from.
    """
    if name == pattern or name.startswith(pattern + "."):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise BantamweightError(
            f"{argument} holds '{pattern}', which is neither a layer's name nor a regular expression ({error})"
        ) from None
