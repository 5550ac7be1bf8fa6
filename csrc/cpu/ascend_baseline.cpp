// The ascent compiled for the instruction set "baseline".
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "recontrol/ascend.h"
#include "recontrol/progress.h"

#define RECONTROL_WIDTH 4

namespace recontrol::baseline {
namespace {
#include "simd.h"
#include "products.h"
#include "tile.h"
#include "two_layers.h"
#include "three_layers.h"
}  // namespace
#include "ascend_rows.h"
}  // namespace recontrol::baseline
