// Memory that the allocator has only just mapped, which large outputs often are.
//
// The first store to each of its pages is a fault: one by one, and between a kernel's streamed stores,
// they cost several times what the kernel does (6 MB in a virtual machine: 4.2 ms beside 1.1). Asked
// for in one piece before, the pages come in a fraction of that.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bantamweight {

// Maps the pages under `bytes` bytes that are going to be overwritten, if the one in the middle is not
// mapped. What the memory holds does not change. Does nothing where the system (Linux before 5.14)
// cannot do it.
inline void map_fresh_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  constexpr int64_t kWorthwhile = 512 << 10;  // less comes from the allocator's heap, which keeps its pages
  if (bytes < kWorthwhile) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes);
  const uintptr_t middle = (first + (end - first) / 2) / page * page;
  unsigned char mapped = 1;
  if (mincore(reinterpret_cast<void*>(middle), page, &mapped) != 0 || (mapped & 1) != 0) return;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_POPULATE_WRITE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

// The same of rows of n floats, ldy apart.
inline void map_fresh_rows(float* y, int64_t rows, int64_t n, int64_t ldy) {
  if (rows > 0) map_fresh_pages(y, ((rows - 1) * ldy + n) * static_cast<int64_t>(sizeof(float)));
}

}  // namespace bantamweight
