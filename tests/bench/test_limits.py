import pytest
import torch
from bantamweight import _C
from bantamweight.bench import limits
from bantamweight.errors import KernelError


def test_every_int8_loop_counts_its_products() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, missing in _C.multiply_int8_variants():
            if missing:
                continue
            _, one = _C.multiply_int8(1, name)
            status, products = _C.multiply_int8(1000, name)
            assert status == 0 and products == 1000 * one, name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", [name for name, missing in _C.isa_table() if not missing])
def test_memory_is_read_to_the_last_word(isa: str) -> None:
    words = torch.arange(1001, dtype=torch.int64)
    assert _C.read_memory(words.data_ptr(), 1001, 2, isa) == (0, 1000 * 1001 // 2)


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    absent = next(name for name, missing in _C.isa_table() if missing)
    with pytest.raises(KernelError, match=absent):
        _C.multiply_int8(1, absent)


def test_the_least_time_is_the_slower_of_reading_and_multiplying() -> None:
    found = limits.measure()
    assert found.threads == torch.get_num_threads()
    assert found.int8_kernel in [name for name, missing in _C.multiply_int8_variants() if not missing]
    size = 1 << 16
    reading = size / found.gigabytes_per_second(size) / 1e3
    assert found.microseconds(size, 0.0) == pytest.approx(reading)
    assert found.microseconds(size, 1e12) == pytest.approx(1e9 / found.int8_gops)
    assert found.gigabytes_per_second(size) == found.gigabytes_per_second(size)  # measured once
