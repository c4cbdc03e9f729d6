// Packing, unpacking and reading back the weights of a convolution.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "lowbit_conv/conv_layout.h"

namespace bantamweight {
namespace {

constexpr uint64_t kMagic = 0x31766e6f63776231ull;
constexpr int64_t kAlign = 64;

struct ConvHeader {
  uint64_t magic;
  int64_t isa;
  int64_t bytes;
  int64_t merged;      // channel groups that run as one
  int64_t view_bytes;  // of each of the channel groups that are left
  ConvShape shape;
};
constexpr int64_t kHeaderBytes = (sizeof(ConvHeader) + kAlign - 1) / kAlign * kAlign;

int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

bool valid(const ConvShape& s) {
  // Sizes whose products would not fit an int64 are refused before any multiplication.
  constexpr int64_t kMaxChannels = int64_t{1} << 24, kMaxExtent = int64_t{1} << 16;
  const auto between = [](int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; };
  const bool sizes = between(s.in_channels, 1, kMaxChannels) && between(s.out_channels, 1, kMaxChannels) &&
                     between(s.kernel_h, 1, 1 << 12) && between(s.kernel_w, 1, 1 << 12) &&
                     between(s.stride_h, 1, kMaxExtent) && between(s.stride_w, 1, kMaxExtent) &&
                     between(s.dilation_h, 1, kMaxExtent) && between(s.dilation_w, 1, kMaxExtent) &&
                     between(s.pad_top, 0, kMaxExtent) && between(s.pad_bottom, 0, kMaxExtent) &&
                     between(s.pad_left, 0, kMaxExtent) && between(s.pad_right, 0, kMaxExtent);
  const bool bits = s.bits == 2 || s.bits == 3 || s.bits == 4 || s.bits == 8;
  if (!sizes || !bits || s.groups < 1 || s.in_channels % s.groups != 0 || s.out_channels % s.groups != 0) return false;
  if (s.k() >= int64_t{1} << 31) return false;
  return s.group_size >= 1 && (s.group_size <= kMaxGroupK || s.group_size >= s.k());
}

std::vector<KPiece> cut_at_groups(const ConvShape& s, const std::vector<KPiece>& runs) {
  const int64_t group = conv_summed_group(s);
  std::vector<KPiece> pieces;
  for (KPiece run : runs) {
    while (run.k_size > 0) {
      const int64_t size = std::min(run.k_size, (run.k_begin / group + 1) * group - run.k_begin);
      pieces.push_back({run.k_begin, size, run.row_offset, run.k_begin / group});
      run.k_begin += size;
      run.k_size -= size;
      run.row_offset += size;
    }
  }
  return pieces;
}

// Byte offsets behind the header of a depthwise layout.
struct DepthwiseParts {
  int64_t weight, codes, scale, zero, end;
};

DepthwiseParts depthwise_parts(const ConvShape& s) {
  const auto floats = [](int64_t count) { return align(count * static_cast<int64_t>(sizeof(float))); };
  DepthwiseParts at;
  at.weight = kHeaderBytes;
  at.codes = at.weight + floats(s.k() * depthwise_lanes(s.out_channels));
  at.scale = at.codes + align(s.out_channels * s.k());
  at.zero = at.scale + floats(s.out_channels * conv_summed_groups(s));
  at.end = at.zero + floats(s.out_channels * conv_summed_groups(s));
  return at;
}

// A convolution has many rows to a weight, for which 3-bit codes would be expanded every time.
int view_bits(const ConvShape& s, Isa isa) {
  return s.bits == 3 && linear_kernel(isa)->expand_block != nullptr ? 4 : static_cast<int>(s.bits);
}

int64_t view_bytes_of(const ConvShape& s, Isa isa) {
  const std::vector<KPiece> pieces = conv_pieces(s, isa, 0);
  return packed_view_bytes(*linear_kernel(isa), view_bits(s, isa), s.out_channels / s.groups, conv_summed_groups(s),
                           pieces.data(), static_cast<int64_t>(pieces.size()));
}

bool has_variant(const ConvShape& s, Isa isa) {
  return s.depthwise() ? depthwise_pick(isa)->isa == isa : linear_kernel(isa) != nullptr;
}

// How many channel groups to run as one. A group of few channels leaves most of a kernel's tile
// empty; neighbouring groups side by side, with the zero's code wherever a channel does not see an
// input, fill it. The integer sums do not change, as long as there is one zero and one scale a
// channel.
int64_t mergeable_groups(const ConvShape& s, Isa isa) {
  constexpr int64_t kTileChannels = 64;
  if (isa == Isa::reference || s.depthwise() || s.group_size < s.k()) return 1;
  const int64_t channels = std::max(s.in_channels, s.out_channels) / s.groups;
  int64_t merged = std::min(s.groups, std::max<int64_t>(1, kTileChannels / channels));
  while (s.groups % merged != 0) --merged;
  return merged * s.k() <= kMaxGroupK ? merged : 1;
}

ConvShape merged_shape(ConvShape s, int64_t merged) {
  s.groups /= merged;
  if (merged > 1) s.group_size = s.k();
  return s;
}

// Where the codes of channel o, tap t begin in the merged matrix.
int64_t merged_column(const ConvShape& s, int64_t merged, int64_t o, int64_t t) {
  const int64_t depth = s.in_channels / s.groups, group = o / (s.out_channels / s.groups);
  return (t * merged + group % merged) * depth;
}

std::vector<uint8_t> merge_codes(const ConvShape& s, int64_t merged, const uint8_t* codes, uint8_t zero) {
  const int64_t depth = s.in_channels / s.groups, k = s.k(), taps = k / depth;
  std::vector<uint8_t> wide(static_cast<size_t>(s.out_channels * k * merged), zero);
  for (int64_t o = 0; o < s.out_channels; ++o) {
    for (int64_t t = 0; t < taps; ++t) {
      std::memcpy(&wide[static_cast<size_t>(o * k * merged + merged_column(s, merged, o, t))],
                  codes + o * k + t * depth, static_cast<size_t>(depth));
    }
  }
  return wide;
}

void split_codes(const ConvShape& s, int64_t merged, const uint8_t* wide, uint8_t* codes) {
  const int64_t depth = s.in_channels / s.groups, k = s.k(), taps = k / depth;
  for (int64_t o = 0; o < s.out_channels; ++o) {
    for (int64_t t = 0; t < taps; ++t) {
      std::memcpy(codes + o * k + t * depth, wide + o * k * merged + merged_column(s, merged, o, t),
                  static_cast<size_t>(depth));
    }
  }
}

bool uniform_code_zero(const ConvShape& s, const float* zero) {
  const float first = zero[0];
  return first >= 0.0f && first < static_cast<float>(1 << s.bits) && first == std::floor(first) &&
         std::all_of(zero, zero + s.out_channels * conv_summed_groups(s), [=](float z) { return z == first; });
}

// Of the layout, with room for the merged form wherever the zeros may allow it.
int64_t layout_bytes_of(const ConvShape& s, Isa isa) {
  if (!s.depthwise()) {
    const ConvShape merged = merged_shape(s, mergeable_groups(s, isa));
    return kHeaderBytes + std::max(s.groups * view_bytes_of(s, isa), merged.groups * view_bytes_of(merged, isa));
  }
  return depthwise_parts(s).end;
}

void pack_depthwise(const ConvShape& s, const uint8_t* codes, const float* scale, const float* zero, uint8_t* base) {
  const DepthwiseParts at = depthwise_parts(s);
  const int64_t lanes = depthwise_lanes(s.out_channels), groups = conv_summed_groups(s), k = s.k();
  auto* weight = reinterpret_cast<float*>(base + at.weight);
  for (int64_t c = 0; c < s.out_channels; ++c) {
    for (int64_t tap = 0; tap < k; ++tap) {
      const int64_t g = c * groups + tap / conv_summed_group(s);
      weight[tap * lanes + c] = scale[g] * (static_cast<float>(codes[c * k + tap]) - zero[g]);
    }
  }
  const auto table = static_cast<size_t>(s.out_channels * groups) * sizeof(float);
  std::memcpy(base + at.codes, codes, static_cast<size_t>(s.out_channels * k));
  std::memcpy(base + at.scale, scale, table);
  std::memcpy(base + at.zero, zero, table);
}

void unpack_depthwise(const ConvLayout& layout, uint8_t* codes, float* scale, float* zero) {
  const ConvShape& s = layout.shape;
  const auto table = static_cast<size_t>(s.out_channels * conv_summed_groups(s)) * sizeof(float);
  std::memcpy(codes, layout.codes, static_cast<size_t>(s.out_channels * s.k()));
  std::memcpy(scale, layout.scale, table);
  std::memcpy(zero, layout.zero, table);
}

// A group longer than kMaxGroupK is summed in parts that carry the same scale.
std::vector<float> repeat_per_part(const float* per_channel, int64_t channels, int64_t parts) {
  std::vector<float> wide;
  for (int64_t c = 0; c < channels; ++c) wide.insert(wide.end(), static_cast<size_t>(parts), per_channel[c]);
  return wide;
}

bool splits_groups(const ConvShape& s) { return s.group_size > kMaxGroupK && s.k() > kMaxGroupK; }

}  // namespace

std::vector<KPiece> conv_runs(const ConvShape& s, int64_t row_bytes) {
  const int64_t depth = s.in_channels / s.groups;
  const bool whole_rows = s.dilation_w == 1 && s.groups == 1;
  const int64_t count = whole_rows ? 1 : s.kernel_w, size = whole_rows ? s.kernel_w * depth : depth;
  std::vector<KPiece> runs;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = ky * s.dilation_h * row_bytes + i * s.dilation_w * s.in_channels;
      runs.push_back({(ky * count + i) * size, size, offset, 0});
    }
  }
  return runs;
}

bool conv_copies_rows(const ConvShape& s, Isa isa) {
  if (isa == Isa::reference) return false;
  const auto chunks = [&](const std::vector<KPiece>& runs) {
    int64_t count = 0;
    for (const KPiece& piece : cut_at_groups(s, runs)) count += (piece.k_size + 63) / 64;
    return count;
  };
  return chunks(conv_runs(s, 0)) >= 2 * chunks({{0, s.k(), 0, 0}});
}

std::vector<KPiece> conv_pieces(const ConvShape& s, Isa isa, int64_t row_bytes) {
  if (conv_copies_rows(s, isa)) return cut_at_groups(s, {{0, s.k(), 0, 0}});
  return cut_at_groups(s, conv_runs(s, row_bytes));
}

int64_t conv_layout_bytes(const ConvShape& shape, Isa isa) try {
  return valid(shape) && has_variant(shape, isa) ? layout_bytes_of(shape, isa) : -1;
} catch (const std::bad_alloc&) {
  return -1;
}

Isa conv_select(const ConvShape& shape, Isa ceiling) {
  return shape.depthwise() ? depthwise_pick(ceiling)->isa : linear_select(ceiling);
}

Status conv_pack(const ConvShape& s, Isa isa, const uint8_t* codes, const float* scale, const float* zero, void* layout,
                 int64_t layout_bytes) try {
  if (!valid(s) || layout == nullptr) return Status::invalid_argument;
  if (!has_variant(s, isa)) return Status::unsupported;
  const int64_t bytes = layout_bytes_of(s, isa);
  if (layout_bytes < bytes) return Status::invalid_argument;
  auto* base = static_cast<uint8_t*>(layout);
  std::memset(base, 0, static_cast<size_t>(bytes));
  ConvHeader header = {};
  header.magic = kMagic;
  header.isa = static_cast<int64_t>(isa);
  header.bytes = bytes;
  header.shape = s;

  const int64_t groups = conv_summed_groups(s);
  std::vector<float> wide_scale, wide_zero;
  if (splits_groups(s)) {
    wide_scale = repeat_per_part(scale, s.out_channels, groups);
    wide_zero = repeat_per_part(zero, s.out_channels, groups);
    scale = wide_scale.data();
    zero = wide_zero.data();
  }
  if (s.depthwise()) {
    pack_depthwise(s, codes, scale, zero, base);
  } else {
    header.merged = uniform_code_zero(s, zero) ? mergeable_groups(s, isa) : 1;
    const ConvShape run = merged_shape(s, header.merged);
    std::vector<uint8_t> wide;
    if (header.merged > 1) {
      wide = merge_codes(s, header.merged, codes, static_cast<uint8_t>(zero[0]));
      codes = wide.data();
    }
    const std::vector<KPiece> pieces = conv_pieces(run, isa, 0);
    const int64_t n = run.out_channels / run.groups, k = run.k(), view_bytes = view_bytes_of(run, isa);
    header.view_bytes = view_bytes;
    for (int64_t g = 0; g < run.groups; ++g) {
      packed_view_write(*linear_kernel(isa), view_bits(s, isa), static_cast<int>(s.bits), n, groups, pieces.data(),
                        static_cast<int64_t>(pieces.size()), codes + g * n * k, k, scale + g * n * groups,
                        zero + g * n * groups, base + kHeaderBytes + g * view_bytes);
    }
  }
  std::memcpy(base, &header, sizeof header);
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status conv_layout_read(const void* layout, int64_t bytes, ConvLayout* out) {
  ConvHeader header;
  if (layout == nullptr || bytes < kHeaderBytes) return Status::wrong_layout;
  std::memcpy(&header, layout, sizeof header);
  if (header.magic != kMagic || !valid(header.shape) || header.bytes > bytes) return Status::wrong_layout;
  const ConvShape& s = header.shape;
  out->shape = out->run = s;
  out->isa = static_cast<Isa>(header.isa);
  if (isa_missing(out->isa) != nullptr || !has_variant(s, out->isa)) return Status::wrong_layout;
  const auto* base = static_cast<const uint8_t*>(layout);
  if (!s.depthwise()) {
    if (header.merged != 1 && header.merged != mergeable_groups(s, out->isa)) return Status::wrong_layout;
    out->run = merged_shape(s, header.merged);
    out->views = base + kHeaderBytes;
    out->view_bytes = header.view_bytes;
    const int64_t fit = (header.bytes - kHeaderBytes) / out->run.groups;
    const bool sound = header.view_bytes >= 0 && header.view_bytes <= fit && header.view_bytes % kAlign == 0;
    return sound ? Status::ok : Status::wrong_layout;
  }
  const DepthwiseParts at = depthwise_parts(s);
  if (at.end != header.bytes) return Status::wrong_layout;
  out->weight = reinterpret_cast<const float*>(base + at.weight);
  out->codes = base + at.codes;
  out->scale = reinterpret_cast<const float*>(base + at.scale);
  out->zero = reinterpret_cast<const float*>(base + at.zero);
  return Status::ok;
}

Status conv_view_read(const ConvLayout& layout, int64_t group, const std::vector<KPiece>& pieces, PackedView* view) {
  const ConvShape& s = layout.run;
  const Status status =
      packed_view_read(*linear_kernel(layout.isa), layout.views + group * layout.view_bytes, layout.view_bytes, view);
  if (status != Status::ok) return status;
  if (view->n != s.out_channels / s.groups || view->bits != view_bits(s, layout.isa) ||
      view->groups != conv_summed_groups(s) || view->piece_count != static_cast<int64_t>(pieces.size())) {
    return Status::wrong_layout;
  }
  const bool same_runs = std::equal(pieces.begin(), pieces.end(), view->pieces, [](const KPiece& a, const KPiece& b) {
    return a.k_begin == b.k_begin && a.k_size == b.k_size && a.group == b.group;
  });
  return same_runs ? Status::ok : Status::wrong_layout;
}

Status conv_describe(const void* layout, int64_t layout_bytes, ConvShape* shape, Isa* isa) try {
  ConvLayout read;
  const Status status = conv_layout_read(layout, layout_bytes, &read);
  if (status != Status::ok) return status;
  *shape = read.shape;
  *isa = read.isa;
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

Status conv_unpack(const void* layout, int64_t layout_bytes, uint8_t* codes, float* scale, float* zero) try {
  ConvLayout read;
  const Status status = conv_layout_read(layout, layout_bytes, &read);
  if (status != Status::ok) return status;
  const ConvShape& s = read.shape;
  const int64_t n = s.out_channels / s.groups, k = s.k(), groups = conv_summed_groups(s);
  std::vector<float> wide_scale, wide_zero;
  float *scale_out = scale, *zero_out = zero;
  if (splits_groups(s)) {
    wide_scale.resize(static_cast<size_t>(s.out_channels * groups));
    wide_zero.resize(wide_scale.size());
    scale_out = wide_scale.data();
    zero_out = wide_zero.data();
  }
  if (s.depthwise()) {
    unpack_depthwise(read, codes, scale_out, zero_out);
  } else {
    const std::vector<KPiece> pieces = conv_pieces(read.run, read.isa, 0);
    const int64_t merged = s.groups / read.run.groups;
    std::vector<uint8_t> wide(merged > 1 ? static_cast<size_t>(s.out_channels * k * merged) : 0);
    uint8_t* codes_out = merged > 1 ? wide.data() : codes;
    const int64_t run_n = n * merged, run_k = k * merged;
    for (int64_t g = 0; g < read.run.groups; ++g) {
      PackedView view;
      const Status viewed = conv_view_read(read, g, pieces, &view);
      if (viewed != Status::ok) return viewed;
      packed_view_unpack(view, run_k, codes_out + g * run_n * run_k, scale_out + g * run_n * groups,
                         zero_out + g * run_n * groups);
    }
    if (merged > 1) split_codes(s, merged, wide.data(), codes);
  }
  for (int64_t c = 0; splits_groups(s) && c < s.out_channels; ++c) {
    scale[c] = wide_scale[static_cast<size_t>(c * groups)];
    zero[c] = wide_zero[static_cast<size_t>(c * groups)];
  }
  return Status::ok;
} catch (const std::bad_alloc&) {
  return Status::out_of_memory;
}

}  // namespace bantamweight
