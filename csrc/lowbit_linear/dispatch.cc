// The linear layer: checks, variants, and the packed buffer.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "lowbit_linear/lowbit_linear.h"
#include "runtime/variants.h"

namespace bantamweight {
namespace {

const VariantList<LinearKernel>& variants() {
  static const VariantList<LinearKernel> list = {
      linear_kernel_amx(),  linear_kernel_avx512_vbmi(), linear_kernel_avx512_vnni(),  linear_kernel_avx_vnni(),
      linear_kernel_avx2(), linear_kernel_neon_i8mm(),   linear_kernel_neon_dotprod(), linear_kernel_reference()};
  return list;
}

constexpr uint64_t kMagic = 0x3172616e696c7762ull;

struct LinearHeader {
  uint64_t magic;
  int32_t isa;
  int32_t bits;
  int64_t n, k, group_size;
  int32_t activations;
  int32_t ternary;
  uint8_t unused[16];
};
static_assert(sizeof(LinearHeader) == 64, "the packed view behind it stays aligned");

LinearShape shape_of(const LinearHeader& header) {
  return {header.n,           header.k, header.bits, header.group_size, static_cast<Activations>(header.activations),
          header.ternary != 0};
}

bool valid(const LinearShape& s) {
  const bool bits = s.bits == 2 || (!s.ternary && (s.bits == 3 || s.bits == 4 || s.bits == 8));
  // Sizes whose bytes would not fit an int64 are refused before any multiplication.
  const bool sizes = s.n >= 0 && s.k >= 0 && s.n < (int64_t{1} << 31) && s.k < (int64_t{1} << 31);
  const bool group = s.k == 0 || (s.group_size > 0 && (s.group_size <= kMaxGroupK || s.group_size >= s.k));
  const bool mode = s.activations == Activations::int8 || s.activations == Activations::int8_block ||
                    s.activations == Activations::int16;
  const bool blocks = s.activations != Activations::int8_block || s.group_size >= s.k ||
                      s.group_size % kActivationBlock == 0 || kActivationBlock % s.group_size == 0;
  return bits && sizes && group && mode && (s.k == 0 || blocks);
}

// Groups of at most kMaxGroupK columns, in which the int32 sums are exact, and of one activation
// scale each.
int64_t summed_group_size(const LinearShape& s) {
  return std::min(s.group_size, s.activations == Activations::int8_block ? kActivationBlock : kMaxGroupK);
}

// Activations that are counted from an offset want the sums of the weights.
bool has_offsets(const LinearShape& s) { return s.activations == Activations::int8_block; }

int64_t ceil_div(int64_t a, int64_t b) { return b == 0 ? 0 : (a + b - 1) / b; }

std::vector<KPiece> pieces_of(const LinearShape& s) {
  const int64_t size = summed_group_size(s);
  std::vector<KPiece> pieces;
  for (int64_t begin = 0, g = 0; begin < s.k; begin += size, ++g) {
    pieces.push_back({begin, std::min(size, s.k - begin), begin, g});
  }
  return pieces;
}

// True if the view behind the header is the one that the header's shape asks for.
bool fits(const LinearShape& s, const PackedView& view) {
  // Not what stored_bits says, which asks for the threads of now.
  const bool bits = view.bits == s.bits || (s.bits == 3 && view.bits == 4) || (s.ternary && view.bits == kTrits);
  if (!valid(s) || view.n != s.n || !bits || view.groups != view.piece_count ||
      (view.weight_sum != nullptr) != has_offsets(s))
    return false;
  const int64_t size = summed_group_size(s);
  if (view.groups != ceil_div(s.k, size)) return false;
  for (int64_t g = 0; g < view.groups; ++g) {
    const KPiece& piece = view.pieces[g];
    if (piece.k_begin != g * size || piece.k_size != std::min(size, s.k - g * size)) return false;
    if (piece.row_offset != g * size || piece.group != g) return false;
  }
  return true;
}

Status read(const void* layout, int64_t bytes, LinearHeader* header, PackedView* view) {
  if (layout == nullptr || bytes < static_cast<int64_t>(sizeof *header)) return Status::wrong_layout;
  std::memcpy(header, layout, sizeof *header);
  if (header->magic != kMagic) return Status::wrong_layout;
  const LinearKernel* kernel = linear_kernel(static_cast<Isa>(header->isa));
  if (kernel == nullptr || isa_missing(kernel->isa) != nullptr) return Status::wrong_layout;
  const Status status = packed_view_read(*kernel, static_cast<const uint8_t*>(layout) + sizeof *header,
                                         bytes - static_cast<int64_t>(sizeof *header), view);
  if (status != Status::ok) return status;
  return fits(shape_of(*header), *view) ? Status::ok : Status::wrong_layout;
}

}  // namespace

Status linear_read(const void* layout, int64_t layout_bytes, LinearShape* shape, PackedView* view) {
  LinearHeader header;
  const Status status = read(layout, layout_bytes, &header, view);
  if (status == Status::ok) *shape = shape_of(header);
  return status;
}

const LinearKernel* linear_kernel(Isa isa) { return variants().find(isa); }

const Isa* linear_variants(std::size_t* count) { return variants().isas(count); }

Isa linear_select(Isa ceiling) { return variants().pick(ceiling)->isa; }

int64_t linear_layout_bytes(const LinearShape& shape, Isa isa) {
  const LinearKernel* kernel = linear_kernel(isa);
  if (!valid(shape) || kernel == nullptr) return -1;
  const std::vector<KPiece> pieces = pieces_of(shape);
  const auto groups = static_cast<int64_t>(pieces.size());
  return static_cast<int64_t>(sizeof(LinearHeader)) + packed_view_bytes(*kernel, stored_bits(*kernel, shape), shape.n,
                                                                        groups, pieces.data(), groups,
                                                                        has_offsets(shape));
}

Status linear_pack(const LinearShape& shape, Isa isa, const uint8_t* codes, const float* scale, const float* zero,
                   void* layout, int64_t layout_bytes) try {
  const LinearKernel* kernel = linear_kernel(isa);
  if (!valid(shape) || layout == nullptr) return Status::invalid_argument;
  if (kernel == nullptr) return Status::unsupported;
  if (layout_bytes < linear_layout_bytes(shape, isa)) return Status::invalid_argument;
  const std::vector<KPiece> pieces = pieces_of(shape);
  const auto summed_groups = static_cast<int64_t>(pieces.size());
  const int64_t groups = ceil_div(shape.k, shape.group_size);

  std::vector<float> wide_scale, wide_zero;
  if (groups != summed_groups) {  // groups cut into several: each part carries the scale
    for (int64_t n = 0; n < shape.n; ++n) {
      for (const KPiece& piece : pieces) {
        const auto from = static_cast<size_t>(n * groups + piece.k_begin / shape.group_size);
        wide_scale.push_back(scale[from]);
        wide_zero.push_back(zero[from]);
      }
    }
    scale = wide_scale.data();
    zero = wide_zero.data();
  }
  LinearHeader header = {};
  header.magic = kMagic;
  header.isa = static_cast<int32_t>(isa);
  header.bits = shape.bits;
  header.n = shape.n;
  header.k = shape.k;
  header.group_size = shape.group_size;
  header.activations = static_cast<int32_t>(shape.activations);
  header.ternary = shape.ternary ? 1 : 0;
  std::memcpy(layout, &header, sizeof header);
  packed_view_write(*kernel, stored_bits(*kernel, shape), shape.bits, shape.n, summed_groups, pieces.data(),
                    summed_groups, codes, shape.k, scale, zero, static_cast<uint8_t*>(layout) + sizeof header,
                    has_offsets(shape));
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status linear_describe(const void* layout, int64_t layout_bytes, LinearShape* shape, Isa* isa, double* stored) {
  LinearHeader header;
  PackedView view;
  const Status status = read(layout, layout_bytes, &header, &view);
  if (status != Status::ok) return status;
  *shape = shape_of(header);
  *isa = static_cast<Isa>(header.isa);
  if (stored != nullptr) *stored = view.bits == kTrits ? 5.0 / 3.0 : view.bits;
  return Status::ok;
}

Status linear_unpack(const void* layout, int64_t layout_bytes, uint8_t* codes, float* scale, float* zero) try {
  LinearHeader header;
  PackedView view;
  const Status status = read(layout, layout_bytes, &header, &view);
  if (status != Status::ok) return status;
  const int64_t groups = ceil_div(header.k, header.group_size);
  if (groups == view.groups) {
    packed_view_unpack(view, header.k, codes, scale, zero);
    return Status::ok;
  }
  std::vector<float> wide_scale(static_cast<size_t>(view.n * view.groups)), wide_zero(wide_scale.size());
  packed_view_unpack(view, header.k, codes, wide_scale.data(), wide_zero.data());
  const int64_t size = view.pieces[0].k_size;
  for (int64_t n = 0; n < view.n; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const auto from = static_cast<size_t>(n * view.groups + g * (header.group_size / size));
      scale[n * groups + g] = wide_scale[from];
      zero[n * groups + g] = wide_zero[from];
    }
  }
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace bantamweight
