// Which images run together, and where the values of a network lie meanwhile.
#include <algorithm>

#include "conv_network/prepared.h"

namespace bantamweight {
namespace {

using Kind = NetworkStep::Kind;

constexpr int64_t kAlign = 64;

// What of the maps of some images may be alive at once.
constexpr int64_t kAliveBytes = 2 << 20;

int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Bytes of memory that intervals of time share: lowest free place first.
class Arena {
 public:
  int64_t place(int64_t bytes, size_t from, size_t to) {
    int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Taken& t : taken_) {
        if (t.from <= to && from <= t.to && at < t.begin + t.bytes && t.begin < at + bytes) {
          at = t.begin + t.bytes;
          moved = true;
        }
      }
    }
    taken_.push_back({at, bytes, from, to});
    size_ = std::max(size_, at + bytes);
    return at;
  }
  int64_t size() const { return size_; }

 private:
  struct Taken {
    int64_t begin, bytes;
    size_t from, to;
  };
  std::vector<Taken> taken_;
  int64_t size_ = 0;
};

}  // namespace

// Each map with a border for every convolution that reads it.
Status ConvNetwork::Prepared::add_borders(const std::vector<NetworkStep>& steps) {
  for (const ImageSize& s : size) map.push_back({s.channels, s.height, s.width, 0, 0, 0, 0});
  if (!codes) return Status::ok;
  for (const NetworkStep& step : steps) {
    if (step.kind != Kind::conv || step.input == 0) continue;
    ConvShape s;
    Isa read;
    const Status status = conv_describe(step.layout, step.layout_bytes, &s, &read);
    if (status != Status::ok) return status;
    if (s.depthwise()) continue;
    CodeMap& from = map[static_cast<size_t>(step.input)];
    from.top = std::max(from.top, s.pad_top);
    from.bottom = std::max(from.bottom, s.pad_bottom);
    from.left = std::max(from.left, s.pad_left);
    from.right = std::max(from.right, s.pad_right);
  }
  return Status::ok;
}

// Kernels read 64 bytes past the codes.
int64_t ConvNetwork::Prepared::value_bytes(size_t v, int64_t images) const {
  const bool floats = !codes || v + 1 == size.size();
  return align(floats ? images * size[v].floats() * static_cast<int64_t>(sizeof(float))
                      : images * map[v].image_bytes() + 64);
}

int64_t ConvNetwork::Prepared::scratch_bytes(const std::vector<NetworkStep>& steps, size_t i, int64_t images) const {
  if (steps[i].kind != Kind::conv) return codes ? align(code_step_bytes(steps[i], map[i + 1], images)) : 0;
  const bool from_codes = codes && steps[i].input != 0;
  return from_codes ? conv_prepared_codes_bytes(plan[i], images)
                    : conv_prepared_bytes(plan[i], images, steps[i].input != 0);
}

void ConvNetwork::Prepared::place(const std::vector<NetworkStep>& steps, Segment* segment, int64_t together) {
  Arena arena;
  for (size_t i = segment->begin; i < segment->end; ++i) {
    scratch_at[i] = arena.place(scratch_bytes(steps, i, together), i, i);
    if (i + 1 == segment->end) break;
    const auto value = static_cast<int64_t>(i + 1);
    size_t last = i;
    for (size_t j = i + 1; j < segment->end; ++j) {
      if (steps[j].input == value || steps[j].residual == value) last = j;
    }
    value_at[i + 1] = arena.place(value_bytes(i + 1, together), i, last);
  }
  segment->images = together;
  segment->arena_bytes = arena.size();
}

// Segments end where a single value leads on. Small feature maps run several images at a time: as many
// as leave all that is alive near L2.
void ConvNetwork::Prepared::cut(const std::vector<NetworkStep>& steps) {
  value_at.assign(size.size(), 0);
  scratch_at.assign(steps.size(), 0);
  for (size_t begin = 0, i = 0; i < steps.size(); ++i) {
    const bool ends = std::all_of(steps.begin() + static_cast<std::ptrdiff_t>(i) + 1, steps.end(), [&](const auto& s) {
      const auto value = static_cast<int64_t>(i + 1);
      return s.input >= value && (s.residual == -1 || s.residual >= value);
    });
    if (!ends) continue;
    Segment segment = {begin, i + 1};
    place(steps, &segment, 1);
    const int64_t alive = segment.arena_bytes + value_bytes(begin, 1) + value_bytes(i + 1, 1);
    int64_t together = 1;
    while (2 * together <= kMaxImages && 2 * together * alive <= kAliveBytes) together *= 2;
    // Steps without a weight gain nothing from more images: they go with what is before them.
    const bool weights = std::any_of(steps.begin() + static_cast<std::ptrdiff_t>(begin),
                                     steps.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                                     [](const auto& s) { return s.kind == Kind::conv; });
    if (!segments.empty() && (segments.back().images == together || !weights)) {
      segments.back().end = i + 1;
    } else {
      segment.images = together;
      segments.push_back(segment);
    }
    begin = i + 1;
  }
  for (Segment& segment : segments) place(steps, &segment, segment.images);
}

int64_t ConvNetwork::Prepared::arena_bytes() const {
  int64_t bytes = 0;
  for (const Segment& segment : segments) bytes = std::max(bytes, segment.arena_bytes);
  return bytes;
}

int64_t ConvNetwork::Prepared::crossing_bytes(int64_t images) const {
  int64_t bytes = 0;
  for (const Segment& segment : segments) {
    if (segment.end + 1 < size.size()) bytes = std::max(bytes, value_bytes(segment.end, images));
  }
  return bytes;
}

}  // namespace bantamweight
