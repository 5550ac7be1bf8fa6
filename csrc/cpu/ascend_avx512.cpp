// The ascent compiled for the instruction set "avx512".
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <immintrin.h>

#include "recontrol/ascend.h"
#include "recontrol/progress.h"

// After the library's headers, so that none of its functions is compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define RECONTROL_WIDTH 16

namespace recontrol::avx512 {
namespace {
#include "simd.h"
#include "products.h"
#include "tile.h"
#include "two_layers.h"
#include "three_layers.h"
}  // namespace
#include "ascend_rows.h"
}  // namespace recontrol::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
