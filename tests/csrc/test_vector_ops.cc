// Every variant of the long-vector kernels against the reference, bit for bit, and the reference
// against sums in double.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "vector_ops/vector_ops.h"

namespace bw = bantamweight;

namespace {

using Vector = std::vector<float>;

Vector random_vector(int64_t n, check::Random* random) {
  Vector v(static_cast<size_t>(n));
  for (float& x : v) x = random->uniform();
  return v;
}

struct Answer {
  Vector w;
  std::vector<double> dots;
  double norm2 = 0.0;
};

bool same_bits(const Answer& a, const Answer& b) {
  const auto same = [](const auto& x, const auto& y) {
    return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof x[0]) == 0);
  };
  return same(a.w, b.w) && same(a.dots, b.dots) && std::memcmp(&a.norm2, &b.norm2, sizeof a.norm2) == 0;
}

// A list of tensors (some of them empty) of n elements in all, and k basis rows.
struct Case {
  std::vector<int64_t> sizes;
  std::vector<Vector> parts, rows;
  int64_t n = 0;

  Case(const std::vector<int64_t>& list, int64_t k, unsigned seed) : sizes(list) {
    check::Random random(seed);
    for (const int64_t size : sizes) {
      parts.push_back(random_vector(size, &random));
      n += size;
    }
    for (int64_t i = 0; i < k; ++i) rows.push_back(random_vector(n, &random));
  }
};

template <class T>
std::vector<T*> pointers(std::vector<Vector>& vectors) {
  std::vector<T*> list;
  for (Vector& v : vectors) list.push_back(v.data());
  return list;
}

Answer measure(Case& c, bw::Isa isa) {
  Answer a;
  a.dots.assign(c.rows.size(), -1.0);
  const auto parts = pointers<const float>(c.parts), rows = pointers<const float>(c.rows);
  CHECK(bw::vector_measure(parts.data(), c.sizes.data(), static_cast<int64_t>(c.sizes.size()), rows.data(),
                           static_cast<int64_t>(rows.size()), c.n, a.dots.data(), isa) == bw::Status::ok);
  return a;
}

// The first of the rows are removed, all are measured.
Vector coefficients_of(const Case& c) {
  Vector coefficients(c.rows.size() - c.rows.size() / 3);
  for (size_t i = 0; i < coefficients.size(); ++i) coefficients[i] = 0.25f * static_cast<float>(i + 1);
  return coefficients;
}

Answer remove(Case& c, float scale, bw::Isa isa) {
  Answer a;
  a.w.assign(static_cast<size_t>(c.n), -1.0f);
  a.dots.assign(c.rows.size(), -1.0);
  const Vector coefficients = coefficients_of(c);
  const auto parts = pointers<const float>(c.parts), rows = pointers<const float>(c.rows);
  CHECK(bw::vector_remove(parts.data(), c.sizes.data(), static_cast<int64_t>(c.sizes.size()), scale, rows.data(),
                          coefficients.data(), static_cast<int64_t>(coefficients.size()), rows.data(),
                          static_cast<int64_t>(rows.size()), a.w.data(), c.n, a.dots.data(), &a.norm2,
                          isa) == bw::Status::ok);
  return a;
}

// The same with w as its own only part.
Answer remove_in_place(Case& c, const Vector& w, bw::Isa isa) {
  Answer a;
  a.w = w;
  a.dots.assign(c.rows.size(), -1.0);
  const Vector coefficients = coefficients_of(c);
  const auto rows = pointers<const float>(c.rows);
  const float* const self = a.w.data();
  CHECK(bw::vector_remove(&self, &c.n, 1, 1.0f, rows.data(), coefficients.data(),
                          static_cast<int64_t>(coefficients.size()), rows.data(), static_cast<int64_t>(rows.size()),
                          a.w.data(), c.n, a.dots.data(), &a.norm2, isa) == bw::Status::ok);
  return a;
}

// dot, axpy and scale over the list, as one answer.
Answer lists(Case& c, bw::Isa isa) {
  Answer a;
  const auto count = static_cast<int64_t>(c.sizes.size());
  std::vector<Vector> y = c.parts, x = c.parts;
  for (Vector& v : y) {
    for (float& e : v) e = 0.5f - e;
  }
  const auto xs = pointers<const float>(x), ys = pointers<const float>(y);
  CHECK(bw::vector_dot(xs.data(), ys.data(), c.sizes.data(), count, &a.norm2, isa) == bw::Status::ok);
  const auto targets = pointers<float>(y), scaled = pointers<float>(x);
  CHECK(bw::vector_axpy(1.5f, xs.data(), targets.data(), c.sizes.data(), count, isa) == bw::Status::ok);
  CHECK(bw::vector_scale(-0.75f, scaled.data(), c.sizes.data(), count, isa) == bw::Status::ok);
  for (const auto* list : {&x, &y}) {
    for (const Vector& v : *list) a.w.insert(a.w.end(), v.begin(), v.end());
  }
  return a;
}

double dot_in_double(const Vector& x, const Vector& y) {
  double sum = 0.0;
  for (size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

void check_dots(const Case& c, const Vector& w, const Answer& a) {
  const double square = dot_in_double(w, w);
  for (size_t r = 0; r < c.rows.size(); ++r) {
    CHECK(std::fabs(a.dots[r] - dot_in_double(w, c.rows[r])) <= 1e-6 * (square + 1.0));
  }
}

void check_reference(Case& c, float scale) {
  Vector flat;
  for (const Vector& part : c.parts) flat.insert(flat.end(), part.begin(), part.end());
  check_dots(c, flat, measure(c, bw::Isa::reference));
  const Answer left = remove(c, scale, bw::Isa::reference);
  const Vector coefficients = coefficients_of(c);
  for (size_t i = 0; i < flat.size(); ++i) {
    double expected = static_cast<double>(scale) * static_cast<double>(flat[i]);
    for (size_t r = 0; r < coefficients.size(); ++r) {
      expected -= static_cast<double>(coefficients[r]) * static_cast<double>(c.rows[r][i]);
    }
    CHECK(std::fabs(static_cast<double>(left.w[i]) - expected) <= 1e-4);
  }
  check_dots(c, left.w, left);
  const double square = dot_in_double(left.w, left.w);
  CHECK(std::fabs(left.norm2 - square) <= 1e-6 * square);
}

void check_bad_arguments() {
  const int64_t negative = -1, two = 2;
  float x[2] = {1.0f, 2.0f};
  const float* list[1] = {x};
  double result;
  const bw::Isa isa = bw::Isa::reference;
  CHECK(bw::vector_dot(list, list, &negative, 1, &result, isa) == bw::Status::invalid_argument);
  CHECK(bw::vector_dot(list, list, nullptr, 1, &result, isa) == bw::Status::invalid_argument);
  CHECK(bw::vector_dot(list, list, &two, 1, nullptr, isa) == bw::Status::invalid_argument);
  CHECK(bw::vector_measure(list, &two, 1, nullptr, 0, 3, nullptr, isa) == bw::Status::invalid_argument);
  CHECK(bw::vector_remove(list, &two, 1, 1.0f, list, x, 0, list, 0, x, 3, nullptr, &result, isa) ==
        bw::Status::invalid_argument);
  CHECK(bw::vector_remove(list, &two, 1, 1.0f, list, x, -1, list, 1, x, 2, nullptr, &result, isa) ==
        bw::Status::invalid_argument);
  CHECK(bw::vector_remove(list, &two, 1, 1.0f, list, x, 1, list, -1, x, 2, nullptr, &result, isa) ==
        bw::Status::invalid_argument);
}

// A vector so long that it is written past the caches, whole chunks and a tail.
void check_long(bw::Isa isa) {
  Case c({(int64_t{4} << 20) - 5, 40}, 2, 1);
  const Answer expected = remove(c, 0.5f, bw::Isa::reference);
  CHECK(same_bits(remove(c, 0.5f, isa), expected));
  Answer split = remove(c, 0.5f, isa);
  CHECK(same_bits(remove_in_place(c, split.w, isa), remove_in_place(c, expected.w, bw::Isa::reference)));
}

}  // namespace

int main() {
  const std::vector<std::vector<int64_t>> sizes = {
      {},           {0},          {1},        {7, 0, 9},           {31, 1, 33}, {15, 0, 0, 2048, 5},
      {2047, 2, 1}, {40000, 333}, {1, 65536}, {3, 70001, 0, 17, 0}};
  std::size_t count;
  const bw::Isa* isas = bw::vector_variants(&count);
  for (std::size_t v = 0; v < count; ++v) {
    if (const char* missing = bw::isa_missing(isas[v])) {
      std::printf("vector_ops %s not run: %s\n", bw::isa_name(isas[v]), missing);
      continue;
    }
    CHECK(bw::vector_select(isas[v]) == isas[v]);  // so what follows runs this variant and no other
    int cases = 0;
    for (const auto& list : sizes) {
      for (const int64_t k : {0, 1, 2, 3, 5, 8, 13}) {
        Case c(list, k, static_cast<unsigned>(++cases));
        if (isas[v] == bw::Isa::reference) check_reference(c, 0.7f);
        const Answer expected = remove(c, 0.7f, bw::Isa::reference);
        CHECK_NOTE(same_bits(measure(c, isas[v]), measure(c, bw::Isa::reference)), "measure, n=%d k=%d", int(c.n),
                   int(k));
        CHECK_NOTE(same_bits(remove(c, 0.7f, isas[v]), expected), "remove, n=%d k=%d", int(c.n), int(k));
        CHECK_NOTE(
            same_bits(remove_in_place(c, expected.w, isas[v]), remove_in_place(c, expected.w, bw::Isa::reference)),
            "remove in place, n=%d k=%d", int(c.n), int(k));
        CHECK_NOTE(same_bits(lists(c, isas[v]), lists(c, bw::Isa::reference)), "lists, n=%d", int(c.n));
      }
    }
    check_long(isas[v]);
    std::printf("vector_ops %s ran, equal to the reference in %d cases\n", bw::isa_name(isas[v]), cases);
  }
  check_bad_arguments();
  return check::report("test_vector_ops");
}
