// All steps of the ascent for two linear layers, V(h) = out . relu(W1 h + b1) + offset: one cluster of blocks for each row.
//
// With z = W1 h + b1, c = out * [z > 0] and d = G c, one step is z += alpha d. The velocity d changes only where a unit's sign does:
// by +-out_j G[j, :] for each unit j that flipped. Each thread keeps a few units in registers. After a step the warps tell all
// blocks of the cluster which signs changed, every block lists them in rising order, and adds the rows of G for its own units.
#pragma once

#include "products.h"

namespace recontrol::cuda {

// Blocks of a cluster, threads of a block, units of a thread. Whether the shape is one for devices that have clusters.
template <int Blocks, int Threads, int Units, bool Clusters>
struct ClimbShape {
  static constexpr bool kClusters = Clusters;
  static constexpr int kBlocks = Blocks, kThreads = Threads, kUnits = Units;
  static constexpr int kBlockWarps = Threads / 32, kAllWarps = Blocks * kBlockWarps;
  // A word has a bit for each lane of a warp, for one of its units.
  static constexpr int kWords = kAllWarps * Units;
  static constexpr int64_t kCapacity = int64_t{32} * kWords;
};

template <class S>
struct ClimbShared {
  // Of the present and the last step, so that a block that is ahead overwrites nothing that another still reads.
  uint32_t flipped[2][S::kWords];
  uint32_t on[2][S::kWords];
  uint32_t shortest[2][S::kAllWarps];
  uint32_t sums[3][S::kAllWarps];
  uint16_t list[S::kCapacity];
};

struct Climb {
  Numbers z, d, total;
  const float* out;
  const float* offset;
  Matrix gram;
  AscentBatch batch;
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, other);
  return x;
}

// One row; every thread of its cluster runs this with its own units. `Measured`: the length of a step depends on V or on |u|, or V is traced.
template <class S, bool Measured>
class RowClimb {
 public:
  __device__ RowClimb(const Climb& climb, ClimbShared<S>& shared)
      : climb_(climb),
        shared_(shared),
        units_(climb.gram.rows),
        row_(blockIdx.x / S::kBlocks),
        rank_(cluster_rank()),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        first_((static_cast<int64_t>(rank_) * S::kThreads + threadIdx.x) * S::kUnits),
        limits_(limits_of(climb.batch, row_)),
        trace_(climb.batch.trace == nullptr ? nullptr : climb.batch.trace + row_ * climb.batch.trace_columns) {}

  __device__ void run() {
    // Padding units rest at z = d = 0 and never flip.
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) {
      const bool inside = first_ + u < units_;
      z_[u] = inside ? climb_.z(row_, first_ + u) : 0.0f;
      d_[u] = inside ? climb_.d(row_, first_ + u) : 0.0f;
      correction_[u] = 0;
    }
    // Nobody writes into the memory of a block that has not started.
    cluster_barrier();
    if constexpr (Measured)
      climb_measured();
    else
      climb_freely();
    // S_j = out_j * (total step length while unit j was on) = total * c_j + what flips have changed about it.
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u)
      if (first_ + u < units_) climb_.total(row_, first_ + u) = static_cast<float>(correction_[u] + total_ * slope(u));
  }

 private:
  // Steps of one length. After a step without a flip, as many as are safe are taken at once.
  __device__ void climb_freely() {
    const float alpha = limits_.step_size;
    int64_t left = alpha > 0 ? limits_.steps : 0;
    bool quiet = false;
    float shortest = 0;
    while (left > 0) {
      const int64_t taken = quiet ? quiet_steps(shortest, alpha, left) : 1;
      left -= taken;
      total_ += static_cast<double>(alpha) * static_cast<double>(taken);
      const uint32_t flipped = advance(alpha * static_cast<float>(taken));
      if (left == 0) break;
      tell(flipped, true);
      quiet = turn() == 0;
      shortest = shortest_of_all();
      parity_ ^= 1;
    }
  }

  // Steps whose length depends on V, on |u|, or that are traced.
  __device__ void climb_measured() {
    Progress progress;
    for (;;) {
      float value = 0, slope_square = 0, edit_slope = 0;
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u) {
        const float out = first_ + u < units_ ? climb_.out[first_ + u] : 0.0f, c = z_[u] > 0 ? out : 0.0f;
        // A NaN shows.
        value += out * (z_[u] <= 0 ? 0.0f : z_[u]);
        slope_square += c * d_[u];
        edit_slope += static_cast<float>(correction_[u] + total_ * c) * d_[u];
      }
      add_up(value, slope_square, edit_slope);
      value += *climb_.offset;
      const bool teller = trace_ != nullptr && rank_ == 0;
      if (teller && threadIdx.x == 0 && progress.taken < climb_.batch.trace_columns) trace_[progress.taken] = value;
      if (progress.done(limits_)) {
        // A row that ended early keeps its last value.
        if (teller)
          for (int64_t column = progress.taken + threadIdx.x; column < climb_.batch.trace_columns; column += S::kThreads) trace_[column] = value;
        return;
      }
      const float scale = progress.begin_step(limits_, value, slope_square, edit_slope);
      total_ += scale;
      const uint32_t flipped = advance(scale);
      if (trace_ == nullptr && progress.done(limits_)) return;
      tell(flipped, false);
      turn();
      parity_ ^= 1;
    }
  }

  __device__ float slope(int u) const { return z_[u] > 0 ? climb_.out[first_ + u] : 0.0f; }

  // z += scale * d; the bits of the units of this thread whose sign changed.
  __device__ uint32_t advance(float scale) {
    uint32_t flipped = 0;
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) {
      const float before = z_[u], after = fmaf(scale, d_[u], before);
      z_[u] = after;
      if ((before > 0) != (after > 0)) {
        const float out = climb_.out[first_ + u];
        correction_[u] += total_ * static_cast<double>(after > 0 ? -out : out);
        flipped |= 1u << u;
      }
    }
    return flipped;
  }

  // Tell all blocks the signs of this warp's units, which of them changed and, if that is wanted, the step length after which the first would.
  __device__ void tell(uint32_t flipped, bool with_shortest) {
    const int all_warps_index = static_cast<int>(rank_) * S::kBlockWarps + warp_;
    uint32_t nearest = 0xFFFFFFFFu;
#pragma unroll
    for (int u = 0; u < S::kUnits; ++u) {
      const uint32_t changed = __ballot_sync(0xFFFFFFFFu, flipped >> u & 1u), on = __ballot_sync(0xFFFFFFFFu, z_[u] > 0);
      if (lane_ < S::kBlocks) {
        store_in_block(&shared_.flipped[parity_][all_warps_index * S::kUnits + u], lane_, changed);
        store_in_block(&shared_.on[parity_][all_warps_index * S::kUnits + u], lane_, on);
      }
      // Towards zero: on and falling, or off and rising. Lengths are not negative, so they order as their bits do.
      if (with_shortest && (z_[u] > 0 ? d_[u] < 0 : d_[u] > 0)) {
        const uint32_t length = float_to_bits(fabsf(z_[u]) / fabsf(d_[u]));
        nearest = length < nearest ? length : nearest;
      }
    }
    if (with_shortest) {
      nearest = __reduce_min_sync(0xFFFFFFFFu, nearest);
      if (lane_ < S::kBlocks) store_in_block(&shared_.shortest[parity_][all_warps_index], lane_, nearest);
    }
    cluster_barrier();
  }

  // The step length after which the first unit's sign changes, right when none has changed in the last step. Infinite when none ever does.
  __device__ float shortest_of_all() const {
    uint32_t nearest = float_to_bits(INFINITY);
    for (int warp = lane_; warp < S::kAllWarps; warp += 32) {
      const uint32_t length = shared_.shortest[parity_][warp];
      nearest = length < nearest ? length : nearest;
    }
    return bits_to_float(__reduce_min_sync(0xFFFFFFFFu, nearest));
  }

  // Bring d in line with the signs after a step; returns how many changed. Every warp counts all of them, and lists its share for its block.
  __device__ int turn() {
    constexpr int kEach = (S::kWords + 31) / 32;
    const uint32_t* words = shared_.flipped[parity_];
    int before = 0, count = 0;
    count_bits<kEach>(words, before, count);
    if (count == 0) return 0;
    const int flips = count;
    // Adding up the active units anew is then the shorter sum, and it starts without old rounding.
    const bool anew = 2 * static_cast<int64_t>(flips) > units_;
    if (anew) {
      words = shared_.on[parity_];
      count_bits<kEach>(words, before, count);
    }
    for (int i = 0; i < kEach; ++i) {
      const int index = lane_ * kEach + i;
      if (index >= S::kWords) break;
      uint32_t bits = words[index];
      if (index % S::kBlockWarps != warp_) {
        before += __popc(bits);
        continue;
      }
      for (; bits != 0; bits &= bits - 1) shared_.list[before++] = static_cast<uint16_t>(unit_of(index, __ffs(bits) - 1));
    }
    __syncthreads();
    if (anew)
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u) d_[u] = 0;
    // Several rows at once are on their way from memory, and their sum is short.
    constexpr int kAtOnce = S::kUnits <= 2 ? 8 : S::kUnits <= 8 ? 4 : 2;
    const float* const gram = static_cast<const float*>(climb_.gram.data);
    const bool aligned = is_aligned<S::kUnits, float>(gram, climb_.gram.stride);
    for (int begin = 0; begin < count; begin += kAtOnce) {
      Several<float, S::kUnits> rows[kAtOnce];
      float by[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool there = begin + i < count;
        const int j = there ? shared_.list[begin + i] : 0;
        rows[i] = load<S::kUnits>(gram + j * climb_.gram.stride + first_, there ? units_ - first_ : 0, aligned);
        by[i] = there ? change_of(j) : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < S::kUnits; ++u) {
        float moved = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) moved = fmaf(by[i], rows[i].at[u], moved);
        d_[u] += moved;
      }
    }
    return flips;
  }

  // How many bits are set in the words of the lanes before this one, and in all.
  template <int Each>
  __device__ void count_bits(const uint32_t* words, int& before, int& count) const {
    int mine = 0;
    for (int i = 0; i < Each; ++i) {
      const int index = lane_ * Each + i;
      if (index < S::kWords) mine += __popc(words[index]);
    }
    int up_to = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, up_to, distance);
      if (lane_ >= distance) up_to += other;
    }
    before = up_to - mine;
    count = __shfl_sync(0xFFFFFFFFu, up_to, 31);
  }

  // The unit that a bit of a word stands for.
  __device__ static int unit_of(int word, int bit) { return word / S::kUnits * 32 * S::kUnits + bit * S::kUnits + word % S::kUnits; }

  // By how much c changes, or what it becomes, at a unit that is listed.
  __device__ float change_of(int j) const {
    const int word = j / (32 * S::kUnits) * S::kUnits + j % S::kUnits, bit = j / S::kUnits % 32;
    const float out = climb_.out[j];
    return shared_.on[parity_][word] >> bit & 1u ? out : -out;
  }

  // Add up three numbers over all threads of the cluster, in one order for all of them.
  __device__ void add_up(float& a, float& b, float& c) {
    a = warp_sum(a), b = warp_sum(b), c = warp_sum(c);
    if (lane_ < S::kBlocks) {
      const int index = static_cast<int>(rank_) * S::kBlockWarps + warp_;
      store_in_block(&shared_.sums[0][index], lane_, float_to_bits(a));
      store_in_block(&shared_.sums[1][index], lane_, float_to_bits(b));
      store_in_block(&shared_.sums[2][index], lane_, float_to_bits(c));
    }
    // The next barrier, that of `tell`, keeps these sums from being overwritten before all have read them.
    cluster_barrier();
    a = b = c = 0;
    for (int warp = lane_; warp < S::kAllWarps; warp += 32) {
      a += bits_to_float(shared_.sums[0][warp]);
      b += bits_to_float(shared_.sums[1][warp]);
      c += bits_to_float(shared_.sums[2][warp]);
    }
    a = warp_sum(a), b = warp_sum(b), c = warp_sum(c);
  }

  const Climb& climb_;
  ClimbShared<S>& shared_;
  const int64_t units_, row_;
  const unsigned rank_;
  const int warp_, lane_;
  const int64_t first_;  // unit of this thread
  const Limits limits_;
  float* const trace_;
  float z_[S::kUnits], d_[S::kUnits];
  double correction_[S::kUnits];
  double total_ = 0;     // step length taken so far
  int parity_ = 0;
};

template <class S, bool Measured>
__global__ void __launch_bounds__(S::kThreads, 1) climb(Climb given) {
  // A device is never given the shapes of the others, so their code would only lie about.
  if constexpr (S::kClusters == kHasClusters) RowClimb<S, Measured>(given, *reinterpret_cast<ClimbShared<S>*>(shared_memory())).run();
}

}  // namespace recontrol::cuda
