// Which instruction sets this CPU has, and which of an op's variants to run.
//
// Every op lists its variants in one VariantList (variants.h), best first, and picks from it. The
// environment variable BANTAMWEIGHT_FORCE_KERNEL names a ceiling: the op runs its best variant
// that is not above it, so "avx2" turns AVX-512 off everywhere and "reference" leaves only the
// scalar code. A name this CPU cannot run is an error of the caller's, never a silent fallback.
#pragma once

namespace bantamweight {

// Ordered within an architecture: a later one implies the earlier ones, except that none implies avx_vnni.
enum class Isa : int {
  reference = 0,
  avx2 = 1,         // AVX2 + FMA + F16C
  avx_vnni = 2,     // the above + VNNI in 256 bits; CPUs with AVX-512 may lack it
  avx512 = 3,       // avx2 + F, BW, VL, DQ
  avx512_vnni = 4,  // the above + VNNI
  avx512_vbmi = 5,  // the above + VBMI
  amx = 6,          // the above + AVX512-BF16 + AMX-TILE, -INT8, -BF16, and the operating system's leave to use them
  neon = 11,        // AArch64 baseline
  neon_dotprod = 12,
  neon_i8mm = 13,
};

constexpr Isa kAllIsas[] = {Isa::amx,  Isa::avx512_vbmi, Isa::avx512_vnni,  Isa::avx512, Isa::avx_vnni,
                            Isa::avx2, Isa::neon_i8mm,   Isa::neon_dotprod, Isa::neon,   Isa::reference};

const char* isa_name(Isa isa);

// Null if this CPU runs it, otherwise a phrase saying what is missing.
const char* isa_missing(Isa isa);

// False if the name is unknown; otherwise *isa is set.
bool isa_from_name(const char* name, Isa* isa);

// The ceiling set by BANTAMWEIGHT_FORCE_KERNEL, read at every call so that a test may change it.
// Returns null and sets *ceiling on success (the best of this CPU when the variable is unset),
// otherwise a sentence that names the variable's value and what is allowed.
const char* isa_ceiling(Isa* ceiling);

}  // namespace bantamweight
