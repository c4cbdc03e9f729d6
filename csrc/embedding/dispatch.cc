// The table: checks, packing, variants, and the lookups shared out over OpenMP's threads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "embedding/embedding.h"
#include "runtime/fresh_pages.h"
#include "runtime/threads.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<EmbeddingKernel>& variants() {
  static const VariantList<EmbeddingKernel> list = {embedding_kernel_avx512(), embedding_kernel_avx2(),
                                                    embedding_kernel_neon(), embedding_kernel_reference()};
  return list;
}

constexpr uint64_t kMagic = 0x31306d6562646577ull;

// Below this many floats of output a second thread costs more than it saves.
constexpr int64_t kFloatsPerThread = 32768;

struct EmbeddingHeader {
  uint64_t magic;
  int32_t isa;
  int32_t bits;
  int64_t rows, dim, group_size;
  int32_t uniform_zero;
  float zero;
  uint8_t unused[16];
};
static_assert(sizeof(EmbeddingHeader) == 64, "the records behind it stay aligned");

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool valid(const EmbeddingShape& s) {
  const bool bits = s.bits == 2 || s.bits == 3 || s.bits == 4 || s.bits == 8;
  // Sizes whose bytes would not fit an int64 are refused before any multiplication.
  const bool sizes = s.rows >= 0 && s.dim >= 0 && s.rows < (int64_t{1} << 31) && s.dim < (int64_t{1} << 24);
  return bits && sizes && (s.dim == 0 || (s.group_size > 0 && s.group_size <= s.dim));
}

int64_t groups_of(const EmbeddingShape& s) { return s.dim == 0 ? 0 : ceil_div(s.dim, s.group_size); }

int64_t group_bytes(const EmbeddingShape& s, int64_t size) { return ceil_div(size, kUnitCodes) * 2 * s.bits; }

int64_t record_bytes(const EmbeddingShape& s, bool uniform_zero) {
  const int64_t groups = groups_of(s);
  if (groups == 0) return 0;
  const int64_t last = s.dim - (groups - 1) * s.group_size;
  const int64_t codes = (groups - 1) * group_bytes(s, s.group_size) + group_bytes(s, last);
  return ceil_div(4 * groups * (uniform_zero ? 1 : 2) + codes, 4) * 4;
}

EmbeddingShape shape_of(const EmbeddingHeader& header) {
  return {header.rows, header.dim, header.bits, header.group_size};
}

Status read(const void* layout, int64_t bytes, EmbeddingHeader* header) {
  if (layout == nullptr || bytes < static_cast<int64_t>(sizeof *header)) return Status::wrong_layout;
  std::memcpy(header, layout, sizeof *header);
  if (header->magic != kMagic) return Status::wrong_layout;
  const int64_t needed = embedding_layout_bytes(shape_of(*header), header->uniform_zero != 0);
  if (needed < 0 || bytes < needed) return Status::wrong_layout;
  const EmbeddingKernel* kernel = variants().find(static_cast<Isa>(header->isa));
  return kernel != nullptr && isa_missing(kernel->isa) == nullptr ? Status::ok : Status::wrong_layout;
}

// Where code i of a unit has its bits: `low` in one byte, and at 3 bits one more in another.
struct Place {
  int64_t byte;
  int shift;
};

Place place_of(int bits, int64_t i) {
  switch (bits) {
    case 2:
    case 3:
      return {i / 4, static_cast<int>(i % 4 * 2)};
    case 4:
      return {i % 2 * 4 + i / 4, static_cast<int>(i / 2 % 2 * 4)};
    default:
      return {i, 0};
  }
}

// Calls visit(column, unit, code's number in the unit) for every column of a row.
template <class Unit, class Visit>
void for_codes(const EmbeddingShape& s, Unit* unit, Visit visit) {
  for (int64_t begin = 0; begin < s.dim; begin += s.group_size) {
    const int64_t size = std::min(s.group_size, s.dim - begin);
    for (int64_t d = 0; d < size; ++d) visit(begin + d, unit + d / kUnitCodes * 2 * s.bits, d % kUnitCodes);
    unit += group_bytes(s, size);
  }
}

}  // namespace

const Isa* embedding_variants(std::size_t* count) { return variants().isas(count); }

Isa embedding_select(Isa ceiling) { return variants().pick(ceiling)->isa; }

int64_t embedding_layout_bytes(const EmbeddingShape& shape, bool uniform_zero) {
  if (!valid(shape)) return -1;
  return static_cast<int64_t>(sizeof(EmbeddingHeader)) + shape.rows * record_bytes(shape, uniform_zero);
}

Status embedding_pack(const EmbeddingShape& shape, Isa isa, const uint8_t* codes, const float* scale, const float* zero,
                      bool uniform_zero, void* layout, int64_t layout_bytes) {
  if (!valid(shape) || layout == nullptr) return Status::invalid_argument;
  if (variants().find(isa) == nullptr) return Status::unsupported;
  if (layout_bytes < embedding_layout_bytes(shape, uniform_zero)) return Status::invalid_argument;
  const int64_t groups = groups_of(shape), stride = record_bytes(shape, uniform_zero);
  EmbeddingHeader header = {};
  header.magic = kMagic;
  header.isa = static_cast<int32_t>(isa);
  header.bits = shape.bits;
  header.rows = shape.rows;
  header.dim = shape.dim;
  header.group_size = shape.group_size;
  header.uniform_zero = uniform_zero ? 1 : 0;
  header.zero = uniform_zero && shape.rows * groups > 0 ? zero[0] : 0.0f;
  std::memcpy(layout, &header, sizeof header);

  uint8_t* records = static_cast<uint8_t*>(layout) + sizeof header;
  const auto head = static_cast<size_t>(4 * groups);
  for_each_shared(shape.rows, shape.rows * shape.dim > kFloatsPerThread, [&](int64_t r) {
    uint8_t* record = records + r * stride;
    std::memset(record, 0, static_cast<size_t>(stride));
    if (groups == 0) return;
    std::memcpy(record, scale + r * groups, head);
    if (!uniform_zero) std::memcpy(record + head, zero + r * groups, head);
    const uint8_t* own = codes + r * shape.dim;
    for_codes(shape, record + (uniform_zero ? 1 : 2) * head, [&](int64_t column, uint8_t* unit, int64_t i) {
      const Place place = place_of(shape.bits, i);
      const int code = shape.bits == 3 ? own[column] & 3 : own[column];
      unit[place.byte] = static_cast<uint8_t>(unit[place.byte] | code << place.shift);
      if (shape.bits == 3) unit[4 + i / 8] = static_cast<uint8_t>(unit[4 + i / 8] | (own[column] >> 2) << (i % 8));
    });
  });
  return Status::ok;
}

Status embedding_describe(const void* layout, int64_t layout_bytes, EmbeddingShape* shape, Isa* isa) {
  EmbeddingHeader header;
  const Status status = read(layout, layout_bytes, &header);
  if (status != Status::ok) return status;
  *shape = shape_of(header);
  *isa = static_cast<Isa>(header.isa);
  return Status::ok;
}

Status embedding_unpack(const void* layout, int64_t layout_bytes, uint8_t* codes, float* scale, float* zero) {
  EmbeddingHeader header;
  const Status status = read(layout, layout_bytes, &header);
  if (status != Status::ok) return status;
  const EmbeddingShape shape = shape_of(header);
  const bool uniform = header.uniform_zero != 0;
  const int64_t groups = groups_of(shape), stride = record_bytes(shape, uniform);
  const uint8_t* records = static_cast<const uint8_t*>(layout) + sizeof header;
  const auto head = static_cast<size_t>(4 * groups);
  const int mask = shape.bits == 3 ? 3 : (1 << shape.bits) - 1;
  for_each_shared(shape.rows, shape.rows * shape.dim > kFloatsPerThread, [&](int64_t r) {
    const uint8_t* record = records + r * stride;
    if (groups == 0) return;
    std::memcpy(scale + r * groups, record, head);
    if (uniform) {
      for (int64_t g = 0; g < groups; ++g) zero[r * groups + g] = header.zero;
    } else {
      std::memcpy(zero + r * groups, record + head, head);
    }
    for_codes(shape, record + (uniform ? 1 : 2) * head, [&](int64_t column, const uint8_t* unit, int64_t i) {
      const Place place = place_of(shape.bits, i);
      int code = unit[place.byte] >> place.shift & mask;
      if (shape.bits == 3) code |= (unit[4 + i / 8] >> (i % 8) & 1) << 2;
      codes[r * shape.dim + column] = static_cast<uint8_t>(code);
    });
  });
  return Status::ok;
}

Status embedding_forward(const void* layout, int64_t layout_bytes, const void* index, int index_bytes, int64_t count,
                         float* y, int64_t ldy) {
  EmbeddingHeader header;
  const Status status = read(layout, layout_bytes, &header);
  if (status != Status::ok) return status;
  if (count < 0 || ldy < header.dim || (index_bytes != 4 && index_bytes != 8)) return Status::invalid_argument;
  const EmbeddingKernel* kernel = variants().find(static_cast<Isa>(header.isa));
  const EmbeddingShape shape = shape_of(header);
  EmbeddingTask whole;
  whole.records = static_cast<const uint8_t*>(layout) + sizeof header;
  whole.record_bytes = record_bytes(shape, header.uniform_zero != 0);
  whole.dim = shape.dim;
  whole.group_size = shape.group_size;
  whole.groups = groups_of(shape);
  whole.uniform_zero = header.uniform_zero != 0;
  whole.zero = header.zero;
  whole.ldy = ldy;

  map_fresh_rows(y, count, shape.dim, ldy);
  std::atomic<bool> outside{false};
  // A block's indices are checked and widened on the stack just before their rows are read.
  constexpr int64_t kBlock = 256;
  const int64_t chunk = std::max<int64_t>(1, kFloatsPerThread / std::max<int64_t>(1, shape.dim));
  for_each_shared(ceil_div(count, chunk), count * shape.dim > 2 * kFloatsPerThread, [&](int64_t c) {
    const int64_t chunk_end = std::min(count, (c + 1) * chunk);
    for (int64_t begin = c * chunk; begin < chunk_end; begin += kBlock) {
      int64_t wide[kBlock];
      bool bad = false;
      EmbeddingTask task = whole;
      task.index = wide;
      task.count = std::min(kBlock, chunk_end - begin);
      task.y = y + begin * ldy;
      for (int64_t i = 0; i < task.count; ++i) {
        if (index_bytes == 8) {
          std::memcpy(wide + i, static_cast<const uint8_t*>(index) + 8 * (begin + i), 8);
        } else {
          int32_t narrow;
          std::memcpy(&narrow, static_cast<const uint8_t*>(index) + 4 * (begin + i), 4);
          wide[i] = narrow;
        }
        bad |= wide[i] < 0 || wide[i] >= shape.rows;
      }
      if (bad) {
        outside.store(true);
        return;
      }
      kernel->run(shape.bits, task);
    }
  });
  return outside.load() ? Status::out_of_range : Status::ok;
}

}  // namespace bantamweight
