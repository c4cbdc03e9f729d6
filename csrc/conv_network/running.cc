// The steps of a network one after the other, segment by segment.
#include <utility>

#include "conv_network/prepared.h"

namespace bantamweight {

using Kind = NetworkStep::Kind;

Maps ConvNetwork::Prepared::maps(const std::vector<NetworkStep>& steps, int64_t v, uint8_t* memory) const {
  Maps made;
  if (v <= 0) return made;
  const NetworkStep& step = steps[static_cast<size_t>(v) - 1];
  made.size = map[static_cast<size_t>(v)];
  made.scale = step.scale;
  made.zero = step.zero;
  if (step.scale == 0.0f) {
    made.floats = reinterpret_cast<float*>(memory);
  } else {
    made.codes = reinterpret_cast<int8_t*>(memory);
  }
  return made;
}

Status ConvNetwork::Prepared::run_step(const std::vector<NetworkStep>& steps,
                                       const std::vector<std::vector<float>>& biases, size_t i, const ConvInput& images,
                                       uint8_t* scratch, uint8_t* from, uint8_t* residual, uint8_t* to) const {
  const NetworkStep& step = steps[i];
  const ImageSize &in = size[static_cast<size_t>(step.input)], &out = size[i + 1];
  const auto* floats = reinterpret_cast<const float*>(from);
  if (!codes && step.kind != Kind::conv) {
    run_float_step(
        {step, in, out, images.images, floats, reinterpret_cast<const float*>(residual), reinterpret_cast<float*>(to)});
    return Status::ok;
  }
  ConvActivations activations;
  if (!codes) {
    ConvInput input = images;
    if (step.input != 0) {
      input = {floats, images.images, in.height, in.width, in.floats(), 1, in.width * in.channels, in.channels};
    }
    const Status status = conv_prepare(plan[i], input, scratch, &activations);
    if (status != Status::ok) return status;
    ConvEpilogue epilogue;
    epilogue.residual = reinterpret_cast<const float*>(residual);
    epilogue.relu = step.relu;
    return conv_multiply(plan[i], activations, step.bias, epilogue, reinterpret_cast<float*>(to));
  }

  const Maps x = maps(steps, step.input, from), added = maps(steps, step.residual, residual),
             y = maps(steps, static_cast<int64_t>(i) + 1, to);
  if (y.codes != nullptr) fill_border(y, images.images);
  if (step.kind != Kind::conv) {
    return run_code_step({step, isa, images.images, x, added, y, scratch});
  }
  const bool depthwise = plan[i].layout.run.depthwise();
  const float to_output = y.codes == nullptr ? 1.0f : 1.0f / y.scale;
  Status status = Status::ok;
  if (step.input == 0) {
    status = conv_prepare(plan[i], images, scratch, &activations, to_output);
  } else {
    const float factor = depthwise ? x.scale : x.scale * to_output;
    status = conv_prepare_codes(plan[i], x.size, x.codes, images.images, factor, x.zero, scratch, &activations);
  }
  if (status != Status::ok) return status;
  ConvEpilogue epilogue;
  epilogue.added_map = &added.size;
  epilogue.added = added.codes;
  epilogue.added_factor = added.scale * to_output;
  epilogue.codes_map = &y.size;
  epilogue.codes = y.codes;
  epilogue.relu = y.codes == nullptr && step.relu;
  epilogue.factor = to_output;
  epilogue.shift = added.shift() * to_output + static_cast<float>(y.zero);
  return conv_multiply(plan[i], activations, depthwise ? step.bias : biases[i].data(), epilogue, y.floats);
}

Status ConvNetwork::Prepared::run(const std::vector<NetworkStep>& steps, const std::vector<std::vector<float>>& biases,
                                  const ConvInput& input, uint8_t* memory, float* y) const {
  uint8_t* crossing[2] = {memory + arena_bytes(), memory + arena_bytes() + crossing_bytes(input.images)};
  for (const Segment& segment : segments) {
    const bool last = segment.end == steps.size();
    uint8_t* leaving = last ? reinterpret_cast<uint8_t*>(y) : crossing[1];
    const int64_t rounds = (input.images + segment.images - 1) / segment.images;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t first = input.images * round / rounds;
      ConvInput part = input;
      part.x += first * input.stride_n;
      part.images = input.images * (round + 1) / rounds - first;
      const auto at = [&](int64_t v) -> uint8_t* {
        if (v <= 0) return nullptr;
        const auto value = static_cast<size_t>(v);
        if (value > segment.begin && value < segment.end) return memory + value_at[value];
        const bool floats = !codes || value == steps.size();
        const int64_t bytes =
            floats ? size[value].floats() * static_cast<int64_t>(sizeof(float)) : map[value].image_bytes();
        return (value == segment.begin ? crossing[0] : leaving) + first * bytes;
      };
      for (size_t i = segment.begin; i < segment.end; ++i) {
        const Status status = run_step(steps, biases, i, part, memory + scratch_at[i], at(steps[i].input),
                                       at(steps[i].residual), at(static_cast<int64_t>(i) + 1));
        if (status != Status::ok) return status;
      }
    }
    std::swap(crossing[0], crossing[1]);
  }
  return Status::ok;
}

}  // namespace bantamweight
