// How rows are dealt out to kernels that are compiled for a number of rows. Static: each file that
// includes it keeps a copy with its own flags.
#pragma once

#include <cstdint>

namespace bantamweight {

template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};

template <int kRows, class Run>
static inline void run_tile(int64_t count, int64_t row, const Run& run) {
  if (count == kRows) return run(RowCount<kRows>(), row);
  if constexpr (kRows > 1) run_tile<kRows - 1>(count, row, run);
}

// Calls run(RowCount<n>, first row) for tiles of nearly equal height, at most kMaxRows: 8 rows as 4 + 4
// rather than 6 + 2.
template <int kMaxRows, class Run>
static inline void for_each_tile(int64_t row_count, const Run& run) {
  const int64_t tiles = (row_count + kMaxRows - 1) / kMaxRows;
  if (tiles == 0) return;
  const int64_t least = row_count / tiles, taller = row_count % tiles;
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t count = least + (t < taller ? 1 : 0);
    run_tile<kMaxRows>(count, row, run);
    row += count;
  }
}

}  // namespace bantamweight
