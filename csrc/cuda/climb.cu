#include "launches.h"

namespace recontrol::cuda {
namespace {

template <class S>
bool launch_if_it_fits(const Climb& given, Stream stream) {
  if (given.gram.rows > S::kCapacity) return false;
  Launch shape;
  shape.columns = static_cast<unsigned>(given.batch.rows) * S::kBlocks;
  shape.threads = S::kThreads;
  shape.cluster = S::kBlocks;
  shape.shared_bytes = sizeof(ClimbShared<S>);
  launch(is_measured(given.batch) ? climb<S, true> : climb<S, false>, "climb", shape, stream, given);
  return true;
}

template <int Blocks, int Units>
using Clustered = ClimbShape<Blocks, 256, Units, true>;
template <int Units>
using Alone = ClimbShape<1, 512, Units, false>;
using Largest = Clustered<8, 8>;
using LargestAlone = Alone<16>;

// Clusters came with compute capability 9.0. What counts is the code that was found for the device: it may be of an older one.
bool has_clusters() { return compiled_for(climb<Largest, false>) >= 90; }

}  // namespace

int64_t most_units() { return has_clusters() ? Largest::kCapacity : LargestAlone::kCapacity; }

// The smallest that fits; the choice depends on the number of units alone, because it decides in which order rows of G are added.
void launch_climb(const Climb& given, Stream stream) {
  if (has_clusters())
    launch_if_it_fits<Clustered<1, 1>>(given, stream) || launch_if_it_fits<Clustered<2, 1>>(given, stream) ||
        launch_if_it_fits<Clustered<4, 1>>(given, stream) || launch_if_it_fits<Clustered<8, 1>>(given, stream) ||
        launch_if_it_fits<Clustered<8, 2>>(given, stream) || launch_if_it_fits<Clustered<8, 4>>(given, stream) ||
        launch_if_it_fits<Largest>(given, stream);
  else
    launch_if_it_fits<Alone<1>>(given, stream) || launch_if_it_fits<Alone<2>>(given, stream) ||
        launch_if_it_fits<Alone<4>>(given, stream) || launch_if_it_fits<Alone<8>>(given, stream) ||
        launch_if_it_fits<LargestAlone>(given, stream);
}

}  // namespace recontrol::cuda
