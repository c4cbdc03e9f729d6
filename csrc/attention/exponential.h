// exp(x) for x <= 0, within 2 units in the last place, 0 below -87.7: x = n ln 2 + r, |r| <= ln(2) / 2, and a
// polynomial in r (the coefficients of Cephes' expf, S. L. Moshier). n comes from adding a number so large that only
// whole numbers are left, with 127 in it, so that the low bits of the sum are the exponent of 2^n.
#pragma once

namespace bantamweight {

constexpr float kExpLowest = -88.0f;                                 // n = -127 here, and 2^n is taken as 0
constexpr float kLog2E = 1.44269504f;                                // 1 / ln 2
constexpr float kRoundToExponent = 12583039.0f;                      // 1.5 * 2^23 + 127
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // their sum is ln 2; n times the first is exact
constexpr float kExpPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                    4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

}  // namespace bantamweight
