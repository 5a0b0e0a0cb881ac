// CUDA's types and qualifiers for a host compiler: bf16, e4m3, vectors, tensor maps.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    bits = f != f ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
struct nv_bfloat162 { nv_bfloat16 x, y; };
struct __nv_fp8_e4m3 {
  uint8_t bits;
  __nv_fp8_e4m3() = default;
  // round to nearest even, saturating at 448, as the hardware's cvt.rn.satfinite does
  __nv_fp8_e4m3(float f) {
    uint8_t sign = std::signbit(f) ? 0x80 : 0;
    float a = std::fabs(f);
    if (f != f) { bits = 0x7f; return; }
    if (a >= 448.f) { bits = sign | 0x7e; return; }
    int e = a < 0x1p-6f ? -6 : std::ilogb(a);
    float q = std::nearbyint(std::ldexp(a, 3 - e));  // 8..16 for normal numbers
    a = std::ldexp(q, e - 3);
    if (a == 0) { bits = sign; return; }
    e = a < 0x1p-6f ? -6 : std::ilogb(a);
    int m = (int)std::ldexp(a, 3 - e);
    bits = sign | (m < 8 ? m : ((e + 7) << 3 | (m - 8)));
  }
  operator float() const {
    int e = (bits >> 3) & 15, m = bits & 7;
    float v = e == 0 ? std::ldexp((float)m, -9) : std::ldexp((float)(8 + m), e - 10);
    if ((bits & 0x7f) == 0x7f) v = NAN;
    return bits & 0x80 ? -v : v;
  }
};
struct dim3_ { int x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint1 { uint x; };
struct alignas(8) uint2 { uint x, y; };
struct alignas(16) uint4 { uint x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint x, uint y) { return {x, y}; }
static inline uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }
static inline nv_bfloat162 make_nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }

// A tensor map as cuTensorMapEncodeTiled makes it: two dimensions, 128-byte swizzle.
struct CUtensorMap { const uint8_t* base; int64_t columns, rows, pitch_bytes; int32_t box_columns, box_rows, element_bytes; };

using std::max;
using std::min;
template <class A, class B> static inline auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
template <class A, class B> static inline auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
