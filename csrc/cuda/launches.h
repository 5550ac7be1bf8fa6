// One function for each launch of an ascent; each is compiled on its own.
#pragma once

#include "three_layers.h"
#include "two_layers.h"

namespace recontrol::cuda {

// z = W1 h + b1
void launch_enter(const ValueNetwork& network, const AscentBatch& batch, Numbers z, Stream stream);
// d = G c
void launch_first_velocity(const ValueNetwork& network, Numbers z, Numbers d, int64_t rows, Stream stream);
// All steps of two layers: total = S
void launch_climb(const Climb& climb, Stream stream);
// All steps of three layers: total = S
void launch_climb_three(const ThreeLayers& climb, const Device& device, Stream stream);
// edited = hidden + W1^T S
void launch_leave(const ValueNetwork& network, Numbers total, const AscentBatch& batch, Stream stream);

// The most units that `launch_climb` can keep on the chip.
int64_t most_units();

// Blocks that cover `columns` results of `rows` rows.
template <class S>
Launch cover(int64_t columns, int64_t rows) {
  Launch shape;
  shape.columns = static_cast<unsigned>((columns + S::kBlockColumns - 1) / S::kBlockColumns);
  shape.rows = static_cast<unsigned>((rows + S::kBlockRows - 1) / S::kBlockRows);
  shape.threads = kThreads;
  shape.shared_bytes = S::kSharedBytes;
  return shape;
}

// Blocks for products of `columns` results of which each waits for the others, so no more than can run at the same time.
template <class S, class Kernel>
Launch together(Kernel kernel, const Device& device, int64_t columns, int64_t rows) {
  Launch shape = cover<S>(columns, rows);
  const unsigned wanted = shape.columns * shape.rows, most = static_cast<unsigned>(blocks_together(kernel, device, kThreads, S::kSharedBytes));
  shape.columns = wanted < most ? wanted : most;
  shape.rows = 1;
  shape.together = true;
  return shape;
}

inline bool is_measured(const AscentBatch& batch) { return batch.trace != nullptr || batch.radius != nullptr || batch.target != nullptr; }

// f(shape): how a product is shared out for so many rows. Its result is the same to the bit.
template <class F>
void with_shape(int64_t rows, F f) {
  if (rows <= FewRows::kBlockRows)
    f(FewRows{});
  else if (rows <= SomeRows::kBlockRows)
    f(SomeRows{});
  else
    f(ManyRows{});
}

// f(a number of the type of the weights)
template <class F>
void with_weights(DType dtype, F f) {
  if (dtype == DType::kFloat32) f(float{});
  if (dtype == DType::kBFloat16) f(BFloat16{});
  if (dtype == DType::kFloat16) f(Float16{});
}

}  // namespace recontrol::cuda
