// Every variant of the embedding lookup that this CPU runs, byte for byte against the formula.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "each_variant.h"
#include "embedding/embedding.h"

using namespace bantamweight;

namespace {

struct Table {
  EmbeddingShape shape;
  bool uniform_zero = false;
  int64_t groups = 0;
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero;
};

// 64-byte aligned memory of exactly the size asked for, so that a sanitizer sees a read past it.
struct Memory {
  explicit Memory(int64_t size) : bytes(size), data(std::malloc(static_cast<size_t>(size))) {}
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  int64_t bytes;
  void* data;
};

Table random_table(check::Random& random, int64_t rows, int64_t dim, int bits, int64_t group_size, bool uniform_zero) {
  Table t;
  t.shape = {rows, dim, bits, group_size};
  t.uniform_zero = uniform_zero;
  t.groups = dim == 0 ? 0 : (dim + group_size - 1) / group_size;
  for (int64_t i = 0; i < rows * dim; ++i) t.codes.push_back(static_cast<uint8_t>(random.below(1 << bits)));
  const float shared = random.uniform() * 10;
  for (int64_t i = 0; i < rows * t.groups; ++i) {
    t.scale.push_back(random.uniform());
    t.zero.push_back(uniform_zero ? shared : random.uniform() * 10);
  }
  return t;
}

float expected(const Table& t, int64_t row, int64_t column) {
  const int64_t group = row * t.groups + column / t.shape.group_size;
  const float difference =
      static_cast<float>(t.codes[static_cast<size_t>(row * t.shape.dim + column)]) - t.zero[static_cast<size_t>(group)];
  return difference * t.scale[static_cast<size_t>(group)];
}

void one_table(Isa isa, const Table& t, check::Random& random) {
  const int64_t bytes = embedding_layout_bytes(t.shape, t.uniform_zero);
  Memory layout(bytes);
  CHECK(embedding_pack(t.shape, isa, t.codes.data(), t.scale.data(), t.zero.data(), t.uniform_zero, layout.data,
                       bytes) == Status::ok);
  EmbeddingShape shape;
  Isa found = Isa::reference;
  CHECK(embedding_describe(layout.data, bytes, &shape, &found) == Status::ok && found == isa);
  std::vector<uint8_t> codes(t.codes.size());
  std::vector<float> scale(t.scale.size()), zero(t.zero.size());
  CHECK(embedding_unpack(layout.data, bytes, codes.data(), scale.data(), zero.data()) == Status::ok);
  CHECK(codes == t.codes && scale == t.scale && zero == t.zero);

  for (int64_t count : {0, 1, 2, 7, 300}) {
    const int64_t ldy = t.shape.dim + random.below(3);
    std::vector<int64_t> index;
    for (int64_t i = 0; i < count; ++i) index.push_back(random.below(static_cast<int>(t.shape.rows)));
    const std::vector<int32_t> narrow(index.begin(), index.end());
    for (int width : {4, 8}) {
      std::vector<float> y(static_cast<size_t>(count * ldy + 1), 77.0f);
      const void* from = width == 8 ? static_cast<const void*>(index.data()) : narrow.data();
      CHECK(embedding_forward(layout.data, bytes, from, width, count, y.data(), ldy) == Status::ok);
      bool same = y.back() == 77.0f;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < ldy; ++d) {
          const float value = d < t.shape.dim ? expected(t, index[static_cast<size_t>(i)], d) : 77.0f;
          same = same && std::memcmp(&value, &y[static_cast<size_t>(i * ldy + d)], sizeof value) == 0;
        }
      }
      CHECK_NOTE(same, "%s: %d bits, dim=%d group_size=%d uniform=%d count=%d", isa_name(isa), t.shape.bits,
                 static_cast<int>(t.shape.dim), static_cast<int>(t.shape.group_size), t.uniform_zero,
                 static_cast<int>(count));
    }
  }
}

void over_awkward_shapes(Isa isa) {
  check::Random random(5);
  for (int bits : {2, 3, 4, 8}) {
    for (int64_t dim : {1, 3, 15, 16, 17, 31, 32, 33, 64, 100, 768}) {
      for (int64_t group_size : {int64_t{5}, int64_t{16}, int64_t{24}, int64_t{64}, dim}) {
        if (group_size > dim) continue;
        for (bool uniform_zero : {true, false}) {
          one_table(isa, random_table(random, 1 + random.below(9), dim, bits, group_size, uniform_zero), random);
        }
      }
    }
  }
  one_table(isa, random_table(random, 4, 0, 4, 1, true), random);
}

void bad_arguments() {
  check::Random random(6);
  const Table t = random_table(random, 5, 20, 4, 20, false);
  CHECK(embedding_layout_bytes({5, 20, 5, 20}, true) == -1);
  CHECK(embedding_layout_bytes({5, 20, 4, 0}, true) == -1);
  CHECK(embedding_layout_bytes({5, 20, 4, 21}, true) == -1);
  CHECK(embedding_layout_bytes({-1, 20, 4, 20}, true) == -1);
  const int64_t bytes = embedding_layout_bytes(t.shape, false);
  Memory layout(bytes);
  const auto pack = [&](int64_t size) {
    return embedding_pack(t.shape, Isa::reference, t.codes.data(), t.scale.data(), t.zero.data(), false, layout.data,
                          size);
  };
  CHECK(pack(bytes - 1) == Status::invalid_argument);
  CHECK(pack(bytes) == Status::ok);
  float y[40];
  const auto look_up = [&](int64_t a, int64_t b, int64_t size = 0, int64_t ldy = 20) {
    const int64_t index[] = {a, b};
    return embedding_forward(layout.data, bytes - size, index, 8, 2, y, ldy);
  };
  CHECK(look_up(0, 4) == Status::ok);
  CHECK(look_up(0, 5) == Status::out_of_range);
  CHECK(look_up(-1, 0) == Status::out_of_range);
  CHECK(look_up(0, int64_t{1} << 40) == Status::out_of_range);
  CHECK(look_up(0, 4, 1) == Status::wrong_layout);
  CHECK(look_up(0, 4, 0, 19) == Status::invalid_argument);
  const int64_t none = 0;
  CHECK(embedding_forward(layout.data, bytes, &none, 2, 1, y, 20) == Status::invalid_argument);
  static_cast<uint8_t*>(layout.data)[0] ^= 1;
  CHECK(look_up(0, 4) == Status::wrong_layout);
}

}  // namespace

int main() {
  check::each_variant(embedding_variants, over_awkward_shapes);
  bad_arguments();
  return check::report("test_embedding");
}
