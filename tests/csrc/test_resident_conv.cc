// Convolutions by resident weights: the reference against sums over codes in integers and doubles, and
// every variant against the reference, to the last bit and to the last byte around the outputs.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "resident_conv/resident_conv.h"

using namespace bantamweight;

namespace {

struct Shape {
  int64_t in, out, kernel_h, kernel_w, stride, height, width;  // pixels of the output
  int64_t images = 1, from_l2 = 0, border = 1;                 // around the outputs
};

template <class T>
std::unique_ptr<T, void (*)(void*)> aligned(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return {static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(bytes))), std::free};
}

// Padded images, a weight and what is added, with borders around the outputs, one of them beside a row.
struct Problem {
  Shape shape;
  int64_t k, row_bytes, codes_row_bytes, codes_image_bytes, zero = 8;
  std::vector<int8_t> q, added;
  std::vector<uint8_t> codes;
  std::unique_ptr<int8_t, void (*)(void*)> tiles{nullptr, std::free}, copies{nullptr, std::free};
  std::unique_ptr<float, void (*)(void*)> scale{nullptr, std::free}, bias{nullptr, std::free};
  std::vector<int64_t> offsets;
  ResidentTask task = {};

  Problem(const Shape& s, bool adds, check::Random& random) : shape(s), k(s.kernel_h * s.kernel_w * s.in) {
    row_bytes = ((s.width - 1) * s.stride + s.kernel_w) * s.in;
    codes_row_bytes = (s.width + s.border) * s.out;
    codes_image_bytes = (s.height + s.border) * codes_row_bytes;
    const int64_t rows = (s.height - 1) * s.stride + s.kernel_h;
    q.resize(static_cast<size_t>(s.images * rows * row_bytes + 64));
    for (int8_t& value : q) value = static_cast<int8_t>(random.below(255) - 127);
    codes.resize(static_cast<size_t>(s.out * k));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(16));
    added.resize(static_cast<size_t>(s.images * codes_image_bytes + 2 * s.out));
    for (int8_t& value : added) value = static_cast<int8_t>(random.below(255) - 127);

    std::vector<KPiece> pieces;  // a kernel row each
    for (int64_t y = 0; y < s.kernel_h; ++y) {
      pieces.push_back({y * s.kernel_w * s.in, s.kernel_w * s.in, y * row_bytes, 0});
    }
    const auto count = static_cast<int64_t>(pieces.size());
    ResidentChunks chunks = resident_chunks(pieces.data(), count);
    CHECK(chunks.size % 4 == 0 && chunks.size <= 64 && chunks.count * chunks.size >= k);
    const int64_t most_tiles = s.from_l2 != 0 ? 2 : 4;
    if (s.from_l2 != 0) chunks = {64, s.kernel_h * ((s.kernel_w * s.in + 63) / 64)};
    tiles = aligned<int8_t>(chunks.count * chunks.size * s.out);
    offsets.resize(static_cast<size_t>(chunks.count));
    resident_pack(codes.data(), s.out, k, static_cast<int32_t>(zero), pieces.data(), count, chunks, most_tiles,
                  tiles.get(), offsets.data());
    if (s.from_l2 != 0) copies = aligned<int8_t>(2 * 1024 * chunks.count);
    scale = aligned<float>(s.out);
    bias = aligned<float>(s.out);
    for (int64_t n = 0; n < s.out; ++n) {
      scale.get()[n] = 0.002f * (1.5f + random.uniform());
      bias.get()[n] = 60.0f * random.uniform();
    }
    task.weight = {tiles.get(), offsets.data(), scale.get(), bias.get(), chunks, s.out, most_tiles};
    task.copies = copies.get();
    task.factor = 40.0f / std::sqrt(static_cast<float>(k));
    task.images = s.images;
    task.height = s.height;
    task.width = s.width;
    task.q = q.data();
    task.pixel_bytes = s.stride * s.in;
    task.row_bytes = s.stride * row_bytes;
    task.image_bytes = rows * row_bytes;
    task.codes_pixel_bytes = s.out;
    task.codes_row_bytes = task.added_row_bytes = codes_row_bytes;
    task.codes_image_bytes = task.added_image_bytes = codes_image_bytes;
    if (adds) task.added = added.data() + first();
    task.added_factor = 0.3f;
  }

  std::vector<int8_t> run(const ResidentConvKernel& kernel) {
    std::vector<int8_t> out(added.size(), 77);
    task.codes = out.data() + first();
    kernel.run(task);
    return out;
  }

  int64_t first() const { return shape.border == 0 ? 0 : codes_row_bytes + shape.out; }

  int64_t at(int64_t image, int64_t y, int64_t x, int64_t n) const {
    return first() + image * codes_image_bytes + y * codes_row_bytes + x * shape.out + n;
  }

  double value(int64_t image, int64_t y, int64_t x, int64_t n) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const int64_t in_row = shape.kernel_w * shape.in;
      const int64_t row = y * shape.stride + i / in_row;
      const int64_t from = image * task.image_bytes + row * row_bytes + x * shape.stride * shape.in + i % in_row;
      sum += (codes[static_cast<size_t>(n * k + i)] - zero) * q[static_cast<size_t>(from)];
    }
    const double out =
        static_cast<double>(sum) * static_cast<double>(scale.get()[n]) * static_cast<double>(task.factor) +
        static_cast<double>(bias.get()[n]);
    if (task.added == nullptr) return out;
    return out + 0.3f * static_cast<double>(added[static_cast<size_t>(at(image, y, x, n))]);
  }
};

// One channel to many, tiles of four, two and one side by side; rows that hold whole tiles, parts of one,
// or less; kernel rows of one chunk, of several, and of few bytes. Then weights from L2: pixels in a run over
// all images, in runs through a border narrow enough and through one that is not, and too few for a run.
const Shape kShapes[] = {{1, 16, 1, 1, 1, 1, 1},           {3, 16, 3, 3, 1, 9, 35},
                         {3, 64, 7, 7, 2, 5, 21},          {16, 16, 3, 3, 1, 4, 32},
                         {16, 16, 3, 3, 1, 7, 7},          {16, 32, 3, 3, 2, 5, 16},
                         {32, 32, 3, 3, 1, 3, 17},         {24, 48, 1, 1, 1, 6, 11},
                         {64, 64, 3, 3, 1, 8, 8},          {64, 256, 1, 1, 1, 14, 14},
                         {20, 112, 1, 2, 3, 2, 40},        {5, 80, 2, 5, 1, 3, 66},
                         {64, 32, 1, 1, 1, 7, 7, 3, 0, 0}, {16, 64, 3, 3, 1, 6, 30, 2},
                         {64, 64, 1, 1, 1, 7, 7, 3, 1},    {128, 96, 1, 1, 1, 5, 16, 2, 1, 0},
                         {64, 64, 3, 3, 1, 14, 14, 2, 1},  {40, 32, 3, 3, 1, 7, 7, 3, 1},
                         {64, 64, 3, 3, 2, 7, 7, 3, 1, 0}, {24, 32, 1, 1, 2, 3, 33, 2, 1},
                         {64, 32, 3, 3, 1, 2, 3, 4, 1},    {64, 64, 1, 1, 1, 1, 1, 1, 1}};

void against_sums() {
  check::Random random(1);
  for (const Shape& shape : kShapes) {
    for (bool adds : {false, true}) {
      Problem problem(shape, adds, random);
      const std::vector<int8_t> out = problem.run(*resident_conv_reference());
      int64_t off = 0, at_bounds = 0, count = 0;
      for (int64_t row = 0; row < shape.images * shape.height; ++row) {
        const int64_t image = row / shape.height, y = row % shape.height;
        for (int64_t x = 0; x < shape.width; ++x) {
          for (int64_t n = 0; n < shape.out; ++n, ++count) {
            const double wanted = std::max(-127.0, std::min(127.0, problem.value(image, y, x, n)));
            const double code = out[static_cast<size_t>(problem.at(image, y, x, n))];
            off += std::fabs(code - wanted) > 0.501;
            at_bounds += std::fabs(code) == 127.0;
          }
        }
      }
      CHECK_NOTE(off == 0, "%d of %d codes are off", static_cast<int>(off), static_cast<int>(count));
      CHECK(at_bounds < count / 2 + 8);  // most codes say something
    }
  }
}

void over_awkward_shapes(const ResidentConvKernel& kernel) {
  check::Random random(2);
  for (const Shape& shape : kShapes) {
    for (bool adds : {false, true}) {
      Problem problem(shape, adds, random);
      CHECK_NOTE(problem.run(kernel) == problem.run(*resident_conv_reference()), "%s: %d>%d, %d x %d pixels, added %d",
                 isa_name(kernel.isa), static_cast<int>(shape.in), static_cast<int>(shape.out),
                 static_cast<int>(shape.height), static_cast<int>(shape.width), adds);
      problem.task.height = 0;
      CHECK(problem.run(kernel) == std::vector<int8_t>(problem.added.size(), 77));
      problem.task.height = shape.height;
      // Beyond the range of int32, and not a number.
      for (float factor : {3e38f, -3e38f, std::nanf("")}) {
        problem.task.factor = factor;
        CHECK(problem.run(kernel) == problem.run(*resident_conv_reference()));
      }
    }
  }
}

}  // namespace

int main() {
  against_sums();
  check::each_kernel(resident_conv_variants, {resident_conv_amx(), resident_conv_reference()}, over_awkward_shapes);
  return check::report("test_resident_conv");
}
