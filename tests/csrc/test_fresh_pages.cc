// Fresh pages are mapped in one piece, and what memory holds stays as it is.
#include <cstring>
#include <vector>

#include "check.h"
#include "runtime/fresh_pages.h"

using namespace bantamweight;

namespace {

constexpr int64_t kBytes = 1 << 20;

#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
int64_t mapped_pages(const unsigned char* memory, int64_t page) {
  std::vector<unsigned char> mapped(static_cast<size_t>(kBytes / page));
  CHECK(mincore(const_cast<unsigned char*>(memory), kBytes, mapped.data()) == 0);
  int64_t count = 0;
  for (unsigned char flags : mapped) count += flags & 1;
  return count;
}

void maps_fresh_pages() {
  const int64_t page = sysconf(_SC_PAGESIZE);
  void* mapping = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(mapping != MAP_FAILED);
  auto* memory = static_cast<unsigned char*>(mapping);
  // A kernel without the call, or an emulator that ignores it, leaves the pages to their faults.
  madvise(memory, static_cast<size_t>(page), MADV_POPULATE_WRITE);
  const bool can = mapped_pages(memory, page) == 1;
  map_fresh_pages(memory, page);
  CHECK(mapped_pages(memory, page) <= 1);  // not worth a call
  map_fresh_pages(memory + page + 100, kBytes - 2 * page);
  if (can)
    CHECK_NOTE(mapped_pages(memory, page) == kBytes / page, "%d pages mapped",
               static_cast<int>(mapped_pages(memory, page)));
  if (!can) std::printf("  MADV_POPULATE_WRITE not run: this system lacks it\n");
  for (int64_t i = 0; i < kBytes; i += page) CHECK(memory[i] == 0);
  munmap(mapping, kBytes);
}
#endif

void keeps_contents() {
  std::vector<unsigned char> memory(kBytes);
  for (int64_t i = 0; i < kBytes; ++i) memory[static_cast<size_t>(i)] = static_cast<unsigned char>(i % 251);
  map_fresh_pages(memory.data() + 3, kBytes - 3);
  map_fresh_pages(nullptr, 0);
  for (int64_t i = 0; i < kBytes; ++i) CHECK(memory[static_cast<size_t>(i)] == i % 251);
}

}  // namespace

int main() {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  maps_fresh_pages();
#endif
  keeps_contents();
  return check::report("test_fresh_pages");
}
