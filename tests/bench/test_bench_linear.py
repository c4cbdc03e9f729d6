import os
import time

import pytest
import torch
from bantamweight.bench import linear
from bantamweight.bench.timing import Turn, take_turns


def test_rows_of_every_kernel_and_of_torch() -> None:
    kernels = linear.available_kernels() or ["reference"]
    threads = torch.get_num_threads()
    seen: list[linear.Row] = []
    rows = linear.run(
        shapes=[(128, 80)],
        rows=[1, 3],
        weights=["ternary", "W4-g32"],
        kernels=kernels,
        threads=[1],
        peers="torch",
        seconds=0.001,
        progress=seen.append,
    )
    assert seen == rows
    assert torch.get_num_threads() == threads
    ours = [row for row in rows if not row.peer]
    assert [row.name for row in ours if row.rows == 1] == [
        f"{scheme} {kernel}" for scheme in ("ternary", "W4-g32") for kernel in kernels
    ]
    for row in rows:
        assert row.fastest <= row.microseconds
        # int8 activations: a wrong result would be off by 1, a right one by about 0.01
        assert row.error < 0.05
        assert row.gops == pytest.approx(2e-3 * row.rows * 128 * 80 / row.microseconds)
        assert row.name.startswith("torch") == row.peer
        assert 0.0 < row.limit < 1.5  # the limit is measured too: a fast kernel may come out a little above
    for row in ours:
        peers = [peer for peer in rows if peer.peer and peer.rows == row.rows]
        assert row.ratio_any == pytest.approx(min(peer.microseconds for peer in peers) / row.microseconds)
        as_small = [peer.microseconds for peer in peers if peer.bits <= row.bits]
        if row.bits == 2:  # torch has nothing of two bits
            assert row.ratio is None and not as_small
        else:
            assert row.ratio == pytest.approx(min(as_small) / row.microseconds)


def test_kernel_ceiling_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", "reference")
    rows = linear.run(shapes=[(8, 8)], rows=[1], weights=["W2"], threads=[1], seconds=0.001)
    assert [row.name for row in rows] == ["W2 reference"]
    assert rows[0].ratio is None and rows[0].ratio_any is None
    assert os.environ["BANTAMWEIGHT_FORCE_KERNEL"] == "reference"


def test_table_is_aligned() -> None:
    rows = linear.run(shapes=[(8, 16)], rows=[1], weights=["W4"], threads=[1], peers="torch", seconds=0.001)
    heading, *lines = linear.format_table(rows).splitlines()
    assert len(lines) == len(rows)
    column = heading.index("layer")
    assert [line[column:].startswith(row.name) for line, row in zip(lines, rows, strict=True)] == [True] * len(rows)


def test_unknown_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"'W5'.*ternary, W2"):
        linear.random_weight("W5", 4, 4)


def test_every_turn_gets_its_seconds_and_slow_ones_two_calls() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    fast_times, slow_times = take_turns(
        [Turn(call=lambda: calls.append("fast"), pool="a"), Turn(call=slow, pool="b")], 0.004, threads=1
    )
    assert calls.count("slow") == 2
    assert calls.count("fast") >= 5000  # five slices of a thousand calls
    assert fast_times.fastest <= fast_times.median < slow_times.median
    assert slow_times.median >= 0.02
