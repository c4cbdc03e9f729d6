// The packed buffer of a convolution, as conv_pack writes it and conv_forward reads it.
#pragma once

#include <cstdint>
#include <vector>

#include "depthwise_conv/depthwise_conv.h"
#include "lowbit_conv/lowbit_conv.h"
#include "lowbit_linear/lowbit_linear.h"

namespace bantamweight {

struct ConvLayout {
  ConvShape shape;
  ConvShape run;  // what the kernels are given: the same with fewer, wider channel groups
  Isa isa = Isa::reference;
  // A view a channel group of `run`, unless the convolution is depthwise.
  const uint8_t* views = nullptr;
  int64_t view_bytes = 0;
  // Depthwise: dequantized [taps][lanes], and the canonical parts as they came.
  const float* weight = nullptr;
  const uint8_t* codes = nullptr;
  const float* scale = nullptr;
  const float* zero = nullptr;
};

Status conv_layout_read(const void* layout, int64_t bytes, ConvLayout* out);

// The packed view of a channel group; wrong_layout unless it is the one that the shape asks for.
// pieces: conv_pieces() of the shape, at any row_bytes.
Status conv_view_read(const ConvLayout& layout, int64_t group, const std::vector<KPiece>& pieces, PackedView* view);

// k per int32 sum: a scale group, or kMaxGroupK of one that is longer.
inline int64_t conv_summed_group(const ConvShape& s) { return s.group_size < kMaxGroupK ? s.group_size : kMaxGroupK; }
inline int64_t conv_summed_groups(const ConvShape& s) {
  return (s.k() + conv_summed_group(s) - 1) / conv_summed_group(s);
}

// The runs of K that are contiguous in a padded image whose rows are row_bytes apart: kernel rows, or
// taps where dilation or channel groups part them. Only row_offset depends on row_bytes.
std::vector<KPiece> conv_runs(const ConvShape& shape, int64_t row_bytes);

// Short runs leave most of a kernel's 64 bytes of K empty (a colour image's 3x3 kernel has three of
// nine bytes). Then each task copies its rows together first, a few KB that stay in L1.
bool conv_copies_rows(const ConvShape& shape, Isa isa);

// What the kernel `isa` is given: those runs, or the copied row, cut where a scale group ends.
std::vector<KPiece> conv_pieces(const ConvShape& shape, Isa isa, int64_t row_bytes);

}  // namespace bantamweight
