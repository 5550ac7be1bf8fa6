// How far the ascent of one row goes, step by step; the same for every kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include "recontrol/ascend.h"

#if defined(__CUDACC__)
#define RECONTROL_EVERYWHERE __host__ __device__
#else
#define RECONTROL_EVERYWHERE
#endif

namespace recontrol {

// What one row asks for.
struct Limits {
  int64_t steps = 0;  // 0 where the row is masked out
  float step_size = 0;
  float radius = INFINITY;  // where none is set
  float target = NAN;       // likewise

  RECONTROL_EVERYWHERE bool has_radius() const { return radius < INFINITY; }
  RECONTROL_EVERYWHERE bool has_target() const { return target == target; }
};

RECONTROL_EVERYWHERE inline Limits limits_of(const AscentBatch& batch, int64_t row) {
  Limits limits;
  limits.steps = batch.mask == nullptr || batch.mask[row] ? batch.steps[row] : 0;
  limits.step_size = batch.step_size[row];
  if (batch.radius != nullptr) limits.radius = batch.radius[row];
  if (batch.target != nullptr) limits.target = batch.target[row];
  return limits;
}

// How far a row has gone. `begin_step` turns what is known at the present point into the scale of the next step.
struct Progress {
  int64_t taken = 0;
  double edit_square = 0;  // u.u
  bool stopped = false;

  // value: V here; slope_square: |grad V|^2 = c.d; edit_slope: u.grad V = S.d
  RECONTROL_EVERYWHERE float begin_step(const Limits& limits, double value, double slope_square, double edit_slope) {
    double scale = limits.step_size;
    if (limits.has_target()) scale *= 2 * (limits.target - value);
    if (limits.has_radius()) {
      const double square = scale * scale * slope_square, dot = scale * edit_slope;
      double room = static_cast<double>(limits.radius) * limits.radius - edit_square;
      if (!(room > 0)) room = 0;
      double fraction = 1;
      if (2 * dot + square > room) {
        const double under = dot * dot + square * room;
        const double root = std::sqrt(under > 0 ? under : 0.0);
        // Two forms of the same root: each is used where it does not subtract nearly equal numbers.
        fraction = dot > 0 ? room / (dot + root) : (square > 0 ? (root - dot) / square : 0);
        fraction = fraction > 0 ? (fraction < 1 ? fraction : 1.0) : 0.0;
        stopped = true;
      }
      edit_square += fraction * (2 * dot + fraction * square);
      scale *= fraction;
    }
    ++taken;
    return static_cast<float>(scale);
  }

  RECONTROL_EVERYWHERE bool done(const Limits& limits) const { return stopped || taken >= limits.steps; }
};

// How many steps of one length can be taken before any unit's sign changes, plus the one in which it does; `shortest` is the
// length after which the first does.
RECONTROL_EVERYWHERE inline int64_t quiet_steps(float shortest, float step_size, int64_t left) {
  // Stay clear of rounding; a sign that changed all the same is noticed when the step is taken.
  const double steps = std::floor(static_cast<double>(shortest) / step_size * (1 - 1e-5));
  if (!(steps < static_cast<double>(left))) return left;
  return steps > 1 ? static_cast<int64_t>(steps) : 1;
}

}  // namespace recontrol
