// Every variant reads every word and counts every product.
#include <cstdlib>
#include <vector>

#include "check.h"
#include "machine_limits/machine_limits.h"

using namespace bantamweight;

namespace {

uint64_t plain_sum(const std::vector<uint64_t>& words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += words[static_cast<size_t>(i)];
  return sum;
}

std::vector<uint64_t> noise(int64_t count) {
  std::vector<uint64_t> words(static_cast<size_t>(count));
  uint64_t state = 88172645463325252u;
  for (uint64_t& word : words) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    word = state;
  }
  return words;
}

void every_reader_reads_every_word() {
  const std::vector<uint64_t> words = noise(1000);
  std::size_t variants = 0;
  const Isa* isas = read_memory_variants(&variants);
  for (std::size_t v = 0; v < variants; ++v) {
    if (const char* missing = isa_missing(isas[v])) {
      std::printf("  read_memory %s not run: %s\n", isa_name(isas[v]), missing);
      continue;
    }
    const ReadMemoryKernel* kernel = read_memory_kernel(isas[v]);
    CHECK(kernel != nullptr && kernel->isa == isas[v]);
    for (int64_t count : {0, 1, 7, 8, 31, 32, 63, 64, 65, 128, 999, 1000}) {
      CHECK_NOTE(kernel->run(words.data(), count) == plain_sum(words, count), "%s, %d words", isa_name(isas[v]),
                 static_cast<int>(count));
    }
    for (int64_t count : {0, 1, 2, 3, 999}) {  // shared out: fewer words than threads too
      uint64_t sum = 1;
      CHECK(read_memory(words.data(), count, 3, isas[v], &sum) == Status::ok);
      CHECK_NOTE(sum == plain_sum(words, count), "%s, %d words", isa_name(isas[v]), static_cast<int>(count));
    }
    std::printf("  read_memory %s ran, equal to the plain sum\n", isa_name(isas[v]));
  }
}

void every_multiplier_counts_every_product() {
  std::size_t variants = 0;
  const Isa* isas = multiply_int8_variants(&variants);
  for (std::size_t v = 0; v < variants; ++v) {
    if (const char* missing = isa_missing(isas[v])) {
      std::printf("  multiply_int8 %s not run: %s\n", isa_name(isas[v]), missing);
      continue;
    }
    const MultiplyInt8Kernel* kernel = multiply_int8_kernel(isas[v]);
    CHECK(kernel != nullptr && kernel->isa == isas[v]);
    for (int64_t steps : {0, 1, 2, 1000, 8191, 8192, 8193, 20000}) {  // about where int16 sums are emptied
      CHECK_NOTE(kernel->run(steps) == steps * kernel->products_per_step, "%s, %d steps", isa_name(isas[v]),
                 static_cast<int>(steps));
    }
    int64_t products = 0;
    CHECK(multiply_int8(100, isas[v], &products) == Status::ok);
    // Every thread did all of it.
    CHECK(products > 0 && products % (100 * kernel->products_per_step) == 0);
    std::printf("  multiply_int8 %s ran, equal to the number of its products\n", isa_name(isas[v]));
  }
}

void bad_arguments_are_refused() {
  uint64_t sum = 0;
  int64_t products = 0;
  const uint64_t word = 5;
  CHECK(read_memory(nullptr, 1, 1, Isa::reference, &sum) == Status::invalid_argument);
  CHECK(read_memory(&word, -1, 1, Isa::reference, &sum) == Status::invalid_argument);
  CHECK(read_memory(&word, 1, 0, Isa::reference, &sum) == Status::invalid_argument);
  CHECK(read_memory(&word, 1, 1, Isa::reference, nullptr) == Status::invalid_argument);
  CHECK(multiply_int8(-1, Isa::reference, &products) == Status::invalid_argument);
  CHECK(multiply_int8(1, Isa::reference, nullptr) == Status::invalid_argument);
}

}  // namespace

int main() {
  every_reader_reads_every_word();
  every_multiplier_counts_every_product();
  bad_arguments_are_refused();
  return check::report("test_machine_limits");
}
