// Every variant of batch normalisation's second derivative that this CPU runs, bit for bit against the reference;
// the reference against the definition in doubles.
#include <cmath>
#include <cstring>
#include <vector>

#include "batch_norm/batch_norm.h"
#include "check.h"

using namespace bantamweight;

namespace {

constexpr float kUntouched = -12345.5f;

struct Input {
  int64_t n, channels, length;
  std::vector<float> u, dy, x, mean, r, weight, dweight, dbias, p, q;
};

struct Output {
  std::vector<float> to_dy, to_x, to_weight;
};

// mean, r, dweight and dbias are those of x and dy, as a forward and a backward pass leave them.
Input make_input(int64_t n, int64_t channels, int64_t length, check::Random& random) {
  Input in = {n, channels, length, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const auto size = static_cast<size_t>(n * channels * length);
  for (size_t i = 0; i < size; ++i) {
    in.u.push_back(random.uniform());
    in.dy.push_back(random.uniform());
    in.x.push_back(3.0f * random.uniform() + 1.0f);
  }
  const double count = static_cast<double>(n) * static_cast<double>(length);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0, squares = 0.0, dbias = 0.0, dweight = 0.0;
    const auto each = [&](auto&& what) {
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t i = 0; i < length; ++i) what(static_cast<size_t>((row * channels + c) * length + i));
      }
    };
    each([&](size_t at) { sum += in.x[at]; });
    const double mean = count > 0 ? sum / count : 0.0;
    each([&](size_t at) { squares += (in.x[at] - mean) * (in.x[at] - mean); });
    const double r = count > 0 ? 1.0 / std::sqrt(squares / count + 1e-3) : 1.0;
    each([&](size_t at) {
      dbias += in.dy[at];
      dweight += in.dy[at] * (in.x[at] - mean) * r;
    });
    in.mean.push_back(static_cast<float>(mean));
    in.r.push_back(static_cast<float>(r));
    in.weight.push_back(random.uniform());
    in.dweight.push_back(static_cast<float>(dweight));
    in.dbias.push_back(static_cast<float>(dbias));
    in.p.push_back(random.uniform());
    in.q.push_back(random.uniform());
  }
  return in;
}

struct Present {
  bool u, weight, p, q;
};

BatchNormSecondArgs args_of(const Input& in, const Present& has, Output* out) {
  out->to_dy.assign(in.x.size() + 1, kUntouched);
  out->to_x.assign(in.x.size() + 1, kUntouched);
  out->to_weight.assign(in.r.size() + 1, kUntouched);
  BatchNormSecondArgs args;
  args.u = has.u ? in.u.data() : nullptr;
  args.dy = in.dy.data();
  args.x = in.x.data();
  args.n = in.n;
  args.channels = in.channels;
  args.length = in.length;
  args.mean = in.mean.data();
  args.r = in.r.data();
  args.weight = has.weight ? in.weight.data() : nullptr;
  args.dweight = in.dweight.data();
  args.dbias = in.dbias.data();
  args.p = has.p ? in.p.data() : nullptr;
  args.q = has.q ? in.q.data() : nullptr;
  args.to_dy = out->to_dy.data();
  args.to_x = out->to_x.data();
  args.to_weight = out->to_weight.data();
  return args;
}

// The projection P of batch_norm.h, applied as it is written there.
std::vector<double> project(const std::vector<double>& t, const std::vector<double>& xhat) {
  double sum = 0.0, along = 0.0;
  for (size_t i = 0; i < t.size(); ++i) {
    sum += t[i];
    along += t[i] * xhat[i];
  }
  const auto count = static_cast<double>(t.size());
  std::vector<double> result;
  for (size_t i = 0; i < t.size(); ++i) result.push_back(t[i] - sum / count - xhat[i] * along / count);
  return result;
}

void check_doubles(const Input& in, const Present& has, const Output& out) {
  for (int64_t c = 0; c < in.channels; ++c) {
    const auto channel = static_cast<size_t>(c);
    const double r = in.r[channel], weight = has.weight ? in.weight[channel] : 1.0;
    const double p = has.p ? in.p[channel] : 0.0, q = has.q ? in.q[channel] : 0.0;
    std::vector<size_t> at;
    std::vector<double> u, dy, xhat, h;
    for (int64_t row = 0; row < in.n; ++row) {
      for (int64_t i = 0; i < in.length; ++i)
        at.push_back(static_cast<size_t>((row * in.channels + c) * in.length + i));
    }
    const auto count = static_cast<double>(at.size());
    double u_xhat = 0.0, dy_xhat = 0.0, u_pdy = 0.0;
    for (size_t index : at) {
      u.push_back(has.u ? in.u[index] : 0.0);
      dy.push_back(in.dy[index]);
      xhat.push_back((in.x[index] - static_cast<double>(in.mean[channel])) * r);
      u_xhat += u.back() * xhat.back();
      dy_xhat += dy.back() * xhat.back();
    }
    const std::vector<double> pu = project(u, xhat), pdy = project(dy, xhat);
    for (size_t i = 0; i < at.size(); ++i) u_pdy += u[i] * pdy[i];
    for (size_t i = 0; i < at.size(); ++i) {
      h.push_back((p - weight * r * u_xhat / count) * dy[i] - weight * r * dy_xhat / count * u[i]);
    }
    const std::vector<double> ph = project(h, xhat);
    const double slack = 2e-5 * (1.0 + r * r);
    for (size_t i = 0; i < at.size(); ++i) {
      const double to_dy = weight * r * pu[i] + p * xhat[i] + q;
      const double to_x = r * ph[i] - weight * r * r * u_pdy / count * xhat[i];
      CHECK_NOTE(std::fabs(out.to_dy[at[i]] - to_dy) <= slack, "to_dy %g, not %g", out.to_dy[at[i]], to_dy);
      CHECK_NOTE(std::fabs(out.to_x[at[i]] - to_x) <= slack, "to_x %g, not %g", out.to_x[at[i]], to_x);
    }
    CHECK_NOTE(std::fabs(out.to_weight[channel] - r * u_pdy) <= slack * count, "to_weight %g, not %g",
               out.to_weight[channel], r * u_pdy);
  }
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool same(const Output& a, const Output& b) {
  return same(a.to_dy, b.to_dy) && same(a.to_x, b.to_x) && same(a.to_weight, b.to_weight);
}

void over_awkward_shapes(const BatchNormSecondKernel& kernel) {
  check::Random random(7);
  for (int64_t length : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 49, 64, 100, 257, 1024, 5000}) {
    for (int64_t n : {1, 2, 5}) {
      const Input in = make_input(n, 3, length, random);
      for (int bits = 0; bits < 16; ++bits) {
        const Present has = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
        Output expected, out;
        const BatchNormSecondArgs reference = args_of(in, has, &expected);
        for (int64_t c = 0; c < 3; ++c) batch_norm_second_reference()->run(reference, c);
        if (kernel.isa == Isa::reference) check_doubles(in, has, expected);
        CHECK(batch_norm_second(args_of(in, has, &out), kernel.isa) == Status::ok);
        CHECK_NOTE(same(out, expected), "%s: n=%d length=%d present=%d", isa_name(kernel.isa), static_cast<int>(n),
                   static_cast<int>(length), bits);
        CHECK(out.to_dy.back() == kUntouched && out.to_x.back() == kUntouched && out.to_weight.back() == kUntouched);
      }
    }
  }
  // Enough values that the channels are shared out over the threads.
  const Input in = make_input(4, 19, 1000, random);
  Output expected, out;
  const BatchNormSecondArgs reference = args_of(in, {true, true, true, true}, &expected);
  for (int64_t c = 0; c < 19; ++c) batch_norm_second_reference()->run(reference, c);
  CHECK(batch_norm_second(args_of(in, {true, true, true, true}, &out), kernel.isa) == Status::ok);
  CHECK(same(out, expected));
}

void nothing_and_bad_arguments() {
  check::Random random(8);
  const Input in = make_input(2, 2, 9, random);
  Output out;
  for (int field = 0; field < 3; ++field) {
    BatchNormSecondArgs args = args_of(in, {true, true, true, true}, &out);
    int64_t* sizes[] = {&args.n, &args.channels, &args.length};
    *sizes[field] = 0;
    CHECK(batch_norm_second(args, Isa::reference) == Status::ok);
    CHECK(out.to_x[0] == kUntouched && out.to_weight[0] == kUntouched);
    *sizes[field] = -1;
    CHECK(batch_norm_second(args, Isa::reference) == Status::invalid_argument);
  }
  BatchNormSecondArgs args = args_of(in, {true, true, true, true}, &out);
  args.to_weight = nullptr;
  CHECK(batch_norm_second(args, Isa::reference) == Status::invalid_argument);
}

}  // namespace

int main() {
  const BatchNormSecondKernel* kernels[] = {batch_norm_second_avx512(), batch_norm_second_avx2(),
                                            batch_norm_second_neon(), batch_norm_second_reference()};
  std::size_t listed = 0, compiled = 0;
  const Isa* isas = batch_norm_second_variants(&listed);
  for (const BatchNormSecondKernel* kernel : kernels) {
    if (kernel == nullptr) continue;
    CHECK(compiled < listed && isas[compiled] == kernel->isa);
    ++compiled;
    if (const char* missing = isa_missing(kernel->isa)) {
      std::printf("  %-12s not run: %s\n", isa_name(kernel->isa), missing);
      continue;
    }
    const int failed = check::failed;
    over_awkward_shapes(*kernel);
    std::printf("  %-12s %s\n", isa_name(kernel->isa),
                check::failed == failed ? "ran, equal to the reference" : "ran, DIFFERS");
  }
  CHECK(compiled == listed);
  nothing_and_bad_arguments();
  return check::report("test_batch_norm");
}
