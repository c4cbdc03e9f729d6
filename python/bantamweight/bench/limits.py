"""What this machine can do at most: bytes read a second and int8 operations a second, by loops of our own."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import _C

_SECONDS = 0.02  # for each limit
_SLICE = 2e-3  # seconds of one run


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of `threads` threads; `measure` makes it.

    Attributes:
        threads: that took part.
        int8_gops: the most 1e9 additions and multiplications a second, of the best instruction set.
        int8_kernel: that instruction set.
    """

    threads: int
    int8_gops: float
    int8_kernel: str
    _read: dict[int, float] = field(default_factory=dict, repr=False)

    def gigabytes_per_second(self, size: int) -> float:
        """Reading a buffer of `size` bytes again and again, from whatever cache holds it; measured once a size."""
        if size not in self._read:
            self._read[size] = _read_rate(size)
        return self._read[size]

    def microseconds(self, size: int, operations: float) -> float:
        """The least time for reading `size` bytes and doing `operations` int8 operations meanwhile."""
        return max(size / self.gigabytes_per_second(size), operations / self.int8_gops) / 1e3


def measure() -> Limits:
    """Measures the int8 peak of every instruction set of this CPU on torch's number of threads and keeps the best.

    Example:
        >>> limits = measure()
        >>> limits.int8_gops > 0 and limits.gigabytes_per_second(1 << 16) > 0
        True
    """
    rates = {name: _int8_rate(name) for name, missing in _C.multiply_int8_variants() if not missing}
    best = max(rates, key=lambda name: rates[name])
    return Limits(threads=torch.get_num_threads(), int8_gops=rates[best], int8_kernel=best)


def _int8_rate(isa: str) -> float:
    def multiply(steps: int) -> float:
        _, products = _C.multiply_int8(steps, isa)
        return 2e-9 * products

    return _best_rate(multiply)


def _read_rate(size: int) -> float:
    words = torch.ones(max(1, size // 8), dtype=torch.int64)  # written, or every page would be the one page of zeros

    def read(repeats: int) -> float:
        _C.read_memory(words.data_ptr(), words.numel(), repeats)
        return 8e-9 * words.numel() * repeats

    return _best_rate(read)


def _best_rate(run: Callable[[int], float]) -> float:
    """The most work a second: `run` does as many rounds as it is told and returns the work done."""
    rounds, best = 1, 0.0
    end = None
    while end is None or time.perf_counter() < end:
        start = time.perf_counter()
        work = run(rounds)
        took = time.perf_counter() - start
        if took < _SLICE and end is None:
            rounds *= 2
            continue
        end = end or start + _SECONDS
        best = max(best, work / took)
    return best
