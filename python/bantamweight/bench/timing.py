"""Taking turns: everything that computes the same thing is timed in slices, one after the other, again and again.

So a busy or throttling machine slows all of it alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Seconds that a candidate runs before the next one's turn: long enough that a weight that fits some cache is there.
_SLICE = 4e-3
_MIN_SLICES, _MIN_SLICES_OF_ONE_CALL = 5, 3
# Worker threads spin for a while after a parallel region before they sleep (measured: libgomp 5.5 ms, TBB 1.2 ms).
# Where the threads of two libraries outnumber the cores, the next library would be timed against them: it waits.
_SPIN = 7e-3


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds a call, over the slices."""

    median: float
    fastest: float
    spread: float  # (90th - 10th percentile) / median


@dataclass(frozen=True, kw_only=True)
class Turn:
    call: Callable[[], Any]
    pool: str  # whose worker threads run it


def take_turns(turns: Sequence[Turn], seconds: float, *, threads: int) -> list[Times]:
    """Times every call for about `seconds` each, a few milliseconds at a time.

    A call that takes longer than `seconds` itself is timed twice, one that takes ten times longer once.

    Args:
        turns: what to call, each called before; those that share a pool should stand together.
        seconds: of timed calls, each.
        threads: that a call may use; with more than one, worker threads get time to fall asleep when the pool changes.
    """
    pool = ""

    def let_others_sleep(turn: Turn) -> None:
        nonlocal pool
        if turn.pool != pool and threads > 1:
            time.sleep(_SPIN)
        pool = turn.pool

    repeats, slices, least = [], [], []
    for turn in turns:
        let_others_sleep(turn)
        once = _time(turn.call, 1)
        repeats.append(max(1, min(1000, int(_SLICE / max(once, 1e-7)))))
        slices.append([once] if once > seconds else [])
        slow = 1 if once > 10 * seconds else 2
        least.append(slow if once > seconds else _MIN_SLICES_OF_ONE_CALL if repeats[-1] == 1 else _MIN_SLICES)

    def unfinished(index: int) -> bool:
        found = slices[index]
        return len(found) < least[index] or sum(found) * repeats[index] < seconds

    left = list(range(len(turns)))
    while left := [index for index in left if unfinished(index)]:
        for index in left:
            turn, repeat = turns[index], repeats[index]
            let_others_sleep(turn)
            if least[index] > 2:
                turn.call()  # untimed: it finds the caches and the heap as the candidate before left them
            slices[index].append(_time(turn.call, repeat))
    return [_summary(found) for found in slices]


def _time(call: Callable[[], Any], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def _summary(found: Sequence[float]) -> Times:
    ordered = sorted(found)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return Times(median=median, fastest=ordered[0], spread=(high - low) / median)
