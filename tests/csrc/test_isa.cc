// Names, ceilings and the environment variable that forces one.
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "runtime/isa.h"

using namespace bantamweight;

namespace {

constexpr const char* kVariable = "BANTAMWEIGHT_FORCE_KERNEL";

void names_round_trip() {
  for (Isa isa : kAllIsas) {
    Isa back = Isa::reference;
    CHECK_NOTE(isa_from_name(isa_name(isa), &back) && back == isa, "%s", isa_name(isa));
  }
  Isa untouched = Isa::amx;
  CHECK(!isa_from_name("avx1024", &untouched) && untouched == Isa::amx);
  CHECK(!isa_from_name("", &untouched));
}

void every_isa_runs_or_says_why_not() {
  CHECK(isa_missing(Isa::reference) == nullptr);
  for (Isa isa : kAllIsas) {
    const char* missing = isa_missing(isa);
    std::printf("  %-12s %s\n", isa_name(isa), missing == nullptr ? "runs" : missing);
    CHECK_NOTE(missing == nullptr || std::strlen(missing) > 5, "%s", isa_name(isa));
  }
  // A later instruction set of a family implies the earlier ones.
  CHECK(isa_missing(Isa::amx) != nullptr || isa_missing(Isa::avx512_vbmi) == nullptr);
  CHECK(isa_missing(Isa::avx512_vbmi) != nullptr || isa_missing(Isa::avx512_vnni) == nullptr);
  CHECK(isa_missing(Isa::avx512_vnni) != nullptr || isa_missing(Isa::avx512) == nullptr);
  CHECK(isa_missing(Isa::avx_vnni) != nullptr || isa_missing(Isa::avx2) == nullptr);
  CHECK(isa_missing(Isa::avx512) != nullptr || isa_missing(Isa::avx2) == nullptr);
  CHECK(isa_missing(Isa::neon_i8mm) != nullptr || isa_missing(Isa::neon_dotprod) == nullptr);
  CHECK(isa_missing(Isa::neon_dotprod) != nullptr || isa_missing(Isa::neon) == nullptr);
  CHECK(isa_missing(Isa::avx2) != nullptr || isa_missing(Isa::neon) != nullptr);
}

void the_variable_is_a_ceiling() {
  Isa best = Isa::reference, got = Isa::reference;
  unsetenv(kVariable);
  CHECK(isa_ceiling(&best) == nullptr && isa_missing(best) == nullptr);
  setenv(kVariable, "", 1);
  CHECK(isa_ceiling(&got) == nullptr && got == best);

  for (Isa isa : kAllIsas) {
    setenv(kVariable, isa_name(isa), 1);
    const char* sentence = isa_ceiling(&got);
    if (isa_missing(isa) == nullptr) {
      CHECK_NOTE(sentence == nullptr && got == isa, "%s", isa_name(isa));
    } else {  // named, but not here: refused with the reason, never replaced in silence
      CHECK_NOTE(sentence != nullptr && std::strstr(sentence, isa_missing(isa)) != nullptr, "%s", isa_name(isa));
    }
  }
  setenv(kVariable, "avx1024", 1);
  const char* sentence = isa_ceiling(&got);
  CHECK(sentence != nullptr && std::strstr(sentence, "avx1024") != nullptr && std::strstr(sentence, "neon") != nullptr);
  unsetenv(kVariable);
}

}  // namespace

int main() {
  names_round_trip();
  every_isa_runs_or_says_why_not();
  the_variable_is_a_ceiling();
  return check::report("test_isa");
}
