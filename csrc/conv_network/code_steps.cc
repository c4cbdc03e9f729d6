// Pooling, averages, shortcuts and sums on maps of codes.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "code_maps/code_maps.h"
#include "conv_network/steps.h"
#include "runtime/scratch.h"
#include "runtime/threads.h"

namespace bantamweight {
namespace {

using Kind = NetworkStep::Kind;

constexpr int64_t kBytesPerThread = 1 << 17;

// The largest of rows of `count` codes that come one by one, to `most`.
class Largest {
 public:
  Largest(Isa isa, int64_t count, int8_t* most) : kernel_(*code_maps_kernel(isa)), count_(count), most_(most) {}

  void add(const int8_t* row) {
    if (held_ == kRows) {
      finish();
      rows_[held_++] = most_;
    }
    rows_[held_++] = row;
  }

  void finish() {
    kernel_.largest(rows_, held_, count_, most_);
    held_ = 0;
  }

 private:
  static constexpr int64_t kRows = 16;
  const CodeMapsKernel& kernel_;
  int64_t count_, held_ = 0;
  int8_t* most_;
  const int8_t* rows_[kRows];
};

// Codes of the scale and zero of `in`. First along the columns of all windows of a row, then along the
// rows, which reads every code once a window row and not once a window.
Status max_pool(const CodeStep& call, const Maps& out) {
  const NetworkStep& step = call.step;
  const CodeMap &in = call.in.size, &to = out.size;
  std::atomic<int> worst{static_cast<int>(Status::ok)};
  for_each_shared(call.images * to.height, call.images * in.image_bytes() > 2 * kBytesPerThread, [&](int64_t row) {
    const int64_t image = row / to.height, oy = row % to.height;
    thread_local Scratch scratch;
    auto* columns = reinterpret_cast<int8_t*>(scratch.get(in.width * in.channels));
    if (columns == nullptr) {
      worst.store(static_cast<int>(Status::out_of_memory));
      return;
    }
    Largest of_columns(call.isa, in.width * in.channels, columns);
    const Window rows(step, in.height, in.width, oy, 0);
    for (int64_t iy = rows.y_begin; iy < rows.y_end; ++iy) of_columns.add(call.in.codes + in.at(image, iy, 0));
    of_columns.finish();
    for (int64_t ox = 0; ox < to.width; ++ox) {
      const Window window(step, in.height, in.width, oy, ox);
      Largest of_window(call.isa, in.channels, out.codes + to.at(image, oy, ox));
      for (int64_t ix = window.x_begin; ix < window.x_end; ++ix) of_window.add(columns + ix * in.channels);
      of_window.finish();
    }
  });
  return static_cast<Status>(worst.load());
}

// The same for every stride-th pixel and its channels between zeros.
void subsample(const CodeStep& call, const Maps& out) {
  const NetworkStep& step = call.step;
  const CodeMap &in = call.in.size, &to = out.size;
  const auto zero = static_cast<int>(call.in.zero);
  for (int64_t row = 0; row < call.images * to.height; ++row) {
    for (int64_t ox = 0; ox < to.width; ++ox) {
      const int8_t* from = call.in.codes + in.at(row / to.height, row % to.height * step.stride_h, ox * step.stride_w);
      int8_t* pixel = out.codes + to.at(row / to.height, row % to.height, ox);
      std::memset(pixel, zero, static_cast<size_t>(step.channels_before));
      std::memcpy(pixel + step.channels_before, from, static_cast<size_t>(in.channels));
      std::memset(pixel + step.channels_before + in.channels, zero, static_cast<size_t>(step.channels_after));
    }
  }
}

// One row of pixels of `out` from a sum whose members are in units of values.
void write_row(const CodeStep& call, WeightedSum sum, int64_t image, int64_t y) {
  const Maps& out = call.out;
  const CodeMapsKernel& kernel = *code_maps_kernel(call.isa);
  if (out.scale == 0.0f) {
    kernel.to_floats(sum, call.step.relu, out.floats + (image * out.size.height + y) * sum.count);
    return;
  }
  sum.factor /= out.scale;
  sum.factor_a /= out.scale;
  sum.factor_b /= out.scale;
  sum.shift = sum.shift / out.scale + static_cast<float>(out.zero);
  kernel.to_codes(sum, out.codes + out.size.at(image, y, 0));
}

void add(const CodeStep& call) {
  const CodeMap& size = call.out.size;
  for_each_shared(call.images * size.height, call.images * size.image_bytes() > kBytesPerThread, [&](int64_t row) {
    const int64_t image = row / size.height, y = row % size.height;
    WeightedSum sum;
    sum.a = call.in.codes + call.in.size.at(image, y, 0);
    sum.factor_a = call.in.scale;
    sum.b = call.residual.codes + call.residual.size.at(image, y, 0);
    sum.factor_b = call.residual.scale;
    sum.shift = call.in.shift() + call.residual.shift();
    sum.count = size.width * size.channels;
    write_row(call, sum, image, y);
  });
}

// Codes are added up as floats, exactly up to 2^17 pixels.
void average(const CodeStep& call) {
  const CodeMap& in = call.in.size;
  const auto to_floats = code_maps_kernel(call.isa)->to_floats;
  auto* total = reinterpret_cast<float*>(call.memory);
  for (int64_t image = 0; image < call.images; ++image) {
    std::fill(total, total + in.channels, 0.0f);
    WeightedSum sum;
    sum.floats = total;
    sum.factor_a = 1.0f;
    sum.count = in.channels;
    for (int64_t pixel = 0; pixel < in.height * in.width; ++pixel) {
      sum.a = call.in.codes + in.at(image, pixel / in.width, pixel % in.width);
      to_floats(sum, false, total);
    }
    sum.a = nullptr;
    sum.factor = call.in.scale / static_cast<float>(in.height * in.width);
    sum.shift = call.in.shift();
    write_row(call, sum, image, 0);
  }
}

// Where the last step keeps the codes of its input, they become floats behind it.
Status run_kept(const CodeStep& call) {
  Maps codes = call.out;
  if (call.out.scale == 0.0f) codes.codes = reinterpret_cast<int8_t*>(call.memory);
  if (call.step.kind == Kind::max_pool) {
    const Status status = max_pool(call, codes);
    if (status != Status::ok) return status;
  } else {
    subsample(call, codes);
  }
  if (call.out.scale != 0.0f) return Status::ok;
  const CodeMap& size = call.out.size;
  for (int64_t row = 0; row < call.images * size.height; ++row) {
    WeightedSum sum;
    sum.a = codes.codes + size.at(row / size.height, row % size.height, 0);
    sum.factor_a = call.in.scale;
    sum.shift = call.in.shift();
    sum.count = size.width * size.channels;
    write_row(call, sum, row / size.height, row % size.height);
  }
  return Status::ok;
}

}  // namespace

int64_t code_step_bytes(const NetworkStep& step, const CodeMap& out, int64_t images) {
  if (step.kind == Kind::conv || step.kind == Kind::add) return 0;
  if (step.kind == Kind::average) return out.channels * static_cast<int64_t>(sizeof(float));
  return step.scale == 0.0f ? images * out.image_bytes() : 0;
}

Status run_code_step(const CodeStep& call) {
  if (call.step.kind == Kind::max_pool || call.step.kind == Kind::subsample) return run_kept(call);
  if (call.step.kind == Kind::add) {
    add(call);
  } else {
    average(call);
  }
  return Status::ok;
}

void fill_border(const Maps& maps, int64_t images) {
  const CodeMap& size = maps.size;
  const int64_t above = size.top * size.row_bytes() + size.left * size.channels;
  const int64_t between = (size.left + size.right) * size.channels;
  const int64_t below = size.bottom * size.row_bytes() + size.right * size.channels;
  if (above + between + below == 0) return;
  const auto fill = [&](int8_t* at, int64_t count) {
    std::memset(at, static_cast<int>(maps.zero), static_cast<size_t>(count));
  };
  for (int64_t image = 0; image < images; ++image) {
    fill(maps.codes + image * size.image_bytes(), above);
    for (int64_t y = 0; y + 1 < size.height; ++y) fill(maps.codes + size.at(image, y, size.width), between);
    fill(maps.codes + size.at(image, size.height - 1, size.width), below);
  }
}

}  // namespace bantamweight
