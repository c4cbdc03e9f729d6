#include "runtime/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bantamweight {
namespace {

struct Features {
  bool avx2 = false;
  bool avx_vnni = false;
  bool avx512 = false;
  bool avx512_vnni = false;
  bool avx512_vbmi = false;
  bool amx = false;
  bool amx_cpu = false;  // the CPU has AMX, whether or not the kernel lets us use it
  bool neon = false;
  bool neon_dotprod = false;
  bool neon_i8mm = false;
};

#if defined(__x86_64__)

unsigned long long read_xcr0() {
  unsigned eax = 0, edx = 0;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (static_cast<unsigned long long>(edx) << 32) | eax;
}

// Linux hands out the 8 KB of AMX tile state only on request (arch_prctl ARCH_REQ_XCOMP_PERM).
bool request_amx_state() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = (c >> 27) & 1, fma = (c >> 12) & 1, f16c = (c >> 29) & 1;
  if (!osxsave) return f;
  const unsigned long long xcr0 = read_xcr0();
  const bool ymm_state = (xcr0 & 0x6) == 0x6;
  const bool zmm_state = (xcr0 & 0xe6) == 0xe6;
  const bool tile_state = (xcr0 & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = ymm_state && fma && f16c && ((b >> 5) & 1);
  const bool avx512 = ((b >> 16) & 1) && ((b >> 17) & 1) && ((b >> 30) & 1) && ((b >> 31) & 1);  // F DQ BW VL
  f.avx512 = f.avx2 && zmm_state && avx512;
  f.avx512_vnni = f.avx512 && ((c >> 11) & 1);
  f.avx512_vbmi = f.avx512_vnni && ((c >> 1) & 1);
  const bool amx = ((d >> 22) & 1) && ((d >> 24) & 1) && ((d >> 25) & 1);  // BF16 TILE INT8
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return f;
  f.avx_vnni = f.avx2 && ((a >> 4) & 1);
  f.amx_cpu = f.avx512_vbmi && amx && ((a >> 5) & 1);  // AVX512_BF16
  f.amx = f.amx_cpu && tile_state && request_amx_state();
  return f;
}

#elif defined(__aarch64__)

Features detect() {
  Features f;
  f.neon = true;
#if defined(__linux__)
  f.neon_dotprod = (getauxval(AT_HWCAP) >> 20) & 1;                    // HWCAP_ASIMDDP
  f.neon_i8mm = f.neon_dotprod && ((getauxval(AT_HWCAP2) >> 13) & 1);  // HWCAP2_I8MM
#endif
  return f;
}

#else

Features detect() { return Features(); }

#endif

const Features& features() {
  static const Features detected = detect();
  return detected;
}

constexpr bool on_x86 =
#if defined(__x86_64__)
    true;
#else
    false;
#endif
constexpr bool on_arm =
#if defined(__aarch64__)
    true;
#else
    false;
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::reference:
      return "reference";
    case Isa::avx2:
      return "avx2";
    case Isa::avx_vnni:
      return "avx_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_vbmi:
      return "avx512_vbmi";
    case Isa::amx:
      return "amx";
    case Isa::neon:
      return "neon";
    case Isa::neon_dotprod:
      return "neon_dotprod";
    case Isa::neon_i8mm:
      return "neon_i8mm";
  }
  return "unknown";
}

const char* isa_missing(Isa isa) {
  const Features& f = features();
  const bool wants_x86 = isa >= Isa::avx2 && isa <= Isa::amx;
  const bool wants_arm = isa >= Isa::neon;
  if (wants_x86 && !on_x86) return "needs an x86-64 CPU";
  if (wants_arm && !on_arm) return "needs an AArch64 CPU";
  switch (isa) {
    case Isa::reference:
      return nullptr;
    case Isa::avx2:
      return f.avx2 ? nullptr : "the CPU lacks AVX2, FMA or F16C";
    case Isa::avx_vnni:
      return f.avx_vnni ? nullptr : "the CPU lacks AVX-VNNI";
    case Isa::avx512:
      return f.avx512 ? nullptr : "the CPU lacks AVX-512 F, BW, VL or DQ";
    case Isa::avx512_vnni:
      return f.avx512_vnni ? nullptr : "the CPU lacks AVX-512 VNNI";
    case Isa::avx512_vbmi:
      return f.avx512_vbmi ? nullptr : "the CPU lacks AVX-512 VBMI";
    case Isa::amx:
      if (f.amx) return nullptr;
      return f.amx_cpu ? "the operating system does not grant the AMX tile state"
                       : "the CPU lacks AMX-INT8 or AMX-BF16";
    case Isa::neon:
      return f.neon ? nullptr : "the CPU lacks NEON";
    case Isa::neon_dotprod:
      return f.neon_dotprod ? nullptr : "the CPU lacks the dot-product extension";
    case Isa::neon_i8mm:
      return f.neon_i8mm ? nullptr : "the CPU lacks the i8mm extension";
  }
  return "unknown instruction set";
}

bool isa_from_name(const char* name, Isa* isa) {
  for (Isa candidate : kAllIsas) {
    if (std::strcmp(name, isa_name(candidate)) == 0) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

const char* isa_ceiling(Isa* ceiling) {
  thread_local char sentence[320];
  const char* forced = std::getenv("BANTAMWEIGHT_FORCE_KERNEL");
  if (forced == nullptr || *forced == '\0') {
    for (Isa isa : kAllIsas) {
      if (isa_missing(isa) == nullptr) {
        *ceiling = isa;
        return nullptr;
      }
    }
  }
  if (!isa_from_name(forced, ceiling)) {
    std::snprintf(sentence, sizeof sentence,
                  "BANTAMWEIGHT_FORCE_KERNEL=%.40s names no kernel; allowed are amx, avx512_vbmi, avx512_vnni, avx512, "
                  "avx_vnni, avx2, neon_i8mm, neon_dotprod, neon and reference",
                  forced);
    return sentence;
  }
  if (const char* missing = isa_missing(*ceiling)) {
    std::snprintf(sentence, sizeof sentence,
                  "BANTAMWEIGHT_FORCE_KERNEL=%s cannot run here: %s; unset it or name another kernel", forced, missing);
    return sentence;
  }
  return nullptr;
}

}  // namespace bantamweight
