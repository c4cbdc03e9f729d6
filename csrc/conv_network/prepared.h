// A network for one size of input: where its values lie, and which images run together.
#pragma once

#include <cstdint>
#include <vector>

#include "conv_network/conv_network.h"
#include "conv_network/steps.h"
#include "lowbit_conv/conv_plan.h"

namespace bantamweight {

// Images that go through the whole network at a time.
constexpr int64_t kMaxImages = 16;

// Steps that some images run through before the next ones do. One value enters and one leaves, which
// all images of a call have side by side.
struct Segment {
  size_t begin, end;        // steps; value `begin` enters
  int64_t images = 1;       // that run together
  int64_t arena_bytes = 0;  // for so many
};

struct ConvNetwork::Prepared {
  ImageSize input;
  bool codes = false;
  Isa isa = Isa::reference;     // of the last convolution, and the steps between
  std::vector<ImageSize> size;  // of each value
  std::vector<CodeMap> map;     // the same with borders
  std::vector<ConvPlan> plan;   // of each step; empty where it is no convolution
  std::vector<Segment> segments;
  std::vector<int64_t> value_at, scratch_at;  // bytes into the arena, of each value and of a step's activations

  Status add_borders(const std::vector<NetworkStep>& steps);
  int64_t value_bytes(size_t v, int64_t images) const;
  int64_t scratch_bytes(const std::vector<NetworkStep>& steps, size_t i, int64_t images) const;
  void place(const std::vector<NetworkStep>& steps, Segment* segment, int64_t together);
  void cut(const std::vector<NetworkStep>& steps);

  // Of the arena and of two values between segments.
  int64_t memory_bytes(int64_t images) const { return arena_bytes() + 2 * crossing_bytes(images); }
  int64_t arena_bytes() const;
  int64_t crossing_bytes(int64_t images) const;
  Status run(const std::vector<NetworkStep>& steps, const std::vector<std::vector<float>>& biases,
             const ConvInput& input, uint8_t* memory, float* y) const;
  Status run_step(const std::vector<NetworkStep>& steps, const std::vector<std::vector<float>>& biases, size_t i,
                  const ConvInput& images, uint8_t* scratch, uint8_t* from, uint8_t* residual, uint8_t* to) const;
  Maps maps(const std::vector<NetworkStep>& steps, int64_t v, uint8_t* memory) const;
};

}  // namespace bantamweight
