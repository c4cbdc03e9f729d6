// One output at a time: the oracle of every other variant.
#include <algorithm>
#include <cmath>

#include "resident_conv/resident_conv.h"

namespace bantamweight {
namespace {

// Where the k of a chunk for a channel begin, 64 bytes a four of them.
const int8_t* weight_of(const ResidentWeight& weight, int64_t channel, int64_t chunk) {
  int64_t first = 0, tiles = resident_tiles(weight.channels, weight.most_tiles);
  while (channel >= first + tiles * kResidentChannels) {
    first += tiles * kResidentChannels;
    tiles = resident_tiles(weight.channels - first, weight.most_tiles);
  }
  const int64_t before = first / kResidentChannels * weight.chunks.count + chunk * tiles;
  const int64_t tile = before + (channel - first) / kResidentChannels;
  return weight.tiles + tile * weight.chunks.size * kResidentChannels + channel % kResidentChannels * 4;
}

int8_t code_of(const ResidentTask& task, const int8_t* q, const int8_t* added, int64_t n) {
  int32_t sum = 0;
  for (int64_t c = 0; c < task.weight.chunks.count; ++c) {
    const int8_t *a = q + task.weight.offsets[c], *w = weight_of(task.weight, n, c);
    for (int64_t i = 0; i < task.weight.chunks.size; ++i) sum += a[i] * w[i / 4 * 64 + i % 4];
  }
  float y = std::fma(static_cast<float>(sum) * task.weight.scale[n], task.factor, task.weight.bias[n]);
  if (added != nullptr) y = std::fma(static_cast<float>(added[n]), task.added_factor, y);
  y = y < 127.0f ? y : 127.0f;  // not a number gives 127
  return static_cast<int8_t>(std::nearbyint(std::max(y, -127.0f)));
}

void run(const ResidentTask& task) {
  const int64_t rows = task.images * task.height;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t image = row / task.height, y = row % task.height;
    const int8_t* q = task.q + image * task.image_bytes + y * task.row_bytes;
    int8_t* codes = task.codes + image * task.codes_image_bytes + y * task.codes_row_bytes;
    for (int64_t x = 0; x < task.width; ++x) {
      const int64_t at = x * task.codes_pixel_bytes;
      const int8_t* added = nullptr;
      if (task.added != nullptr) added = task.added + image * task.added_image_bytes + y * task.added_row_bytes + at;
      for (int64_t n = 0; n < task.weight.channels; ++n) {
        codes[at + n] = code_of(task, q + x * task.pixel_bytes, added, n);
      }
    }
  }
}

constexpr ResidentConvKernel kernel = {Isa::reference, run};

}  // namespace

const ResidentConvKernel* resident_conv_reference() { return &kernel; }

}  // namespace bantamweight
