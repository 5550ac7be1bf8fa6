// The ascent on a GPU, launch by launch.
#include "launches.h"

namespace recontrol {
namespace {

using namespace cuda;

// Takes pieces from the workspace, or with no workspace only counts their bytes.
class Pieces {
 public:
  explicit Pieces(void* workspace) : base_(static_cast<unsigned char*>(workspace)) {}

  Numbers numbers(int64_t rows, int64_t columns) {
    const int64_t stride = (columns + 15) / 16 * 16;
    return {static_cast<float*>(take(static_cast<size_t>(rows * stride) * sizeof(float))), stride};
  }

  void* take(size_t bytes) {
    void* const taken = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return taken;
  }

  size_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_ = 0;
};

Climb two_layers(Pieces& pieces, const ValueNetwork& network, const float* offset, const AscentBatch& batch) {
  Climb climb;
  for (Numbers* numbers : {&climb.z, &climb.d, &climb.total}) *numbers = pieces.numbers(batch.rows, network.first.rows);
  climb.out = network.out;
  climb.offset = offset;
  climb.gram = network.gram;
  climb.batch = batch;
  return climb;
}

ThreeLayers three_layers(Pieces& pieces, const ValueNetwork& network, const float* offset, const AscentBatch& batch) {
  ThreeLayers climb;
  climb.network = network;
  climb.offset = offset;
  climb.batch = batch;
  for (Numbers* numbers : {&climb.z1, &climb.s, &climb.c, &climb.d, &climb.total, &climb.turn1, &climb.move1})
    *numbers = pieces.numbers(batch.rows, network.first.rows);
  for (Numbers* numbers : {&climb.z2, &climb.c2, &climb.turn2, &climb.move2}) *numbers = pieces.numbers(batch.rows, network.second.rows);
  climb.flips = static_cast<Flips*>(pieces.take(static_cast<size_t>(batch.rows) * sizeof(Flips)));
  climb.rows = static_cast<RowState*>(pieces.take(static_cast<size_t>(batch.rows) * sizeof(RowState)));
  climb.state = static_cast<BatchState*>(pieces.take(sizeof(BatchState)));
  return climb;
}

}  // namespace

size_t cuda_workspace_bytes(const ValueNetwork& network, int64_t rows) {
  Pieces pieces(nullptr);
  AscentBatch batch;
  batch.rows = rows;
  if (network.three_layers())
    three_layers(pieces, network, nullptr, batch);
  else
    two_layers(pieces, network, nullptr, batch);
  return pieces.bytes();
}

const char* cuda_why_not(const ValueNetwork& network) {
  if (current_device().major < 8) return "it needs tensor cores for bfloat16, compute capability 8.0 or newer";
  if (!network.three_layers() && network.first.rows > most_units())
    return most_units() > 8192 ? "it keeps at most 16384 units of a row on the chip" : "it keeps at most 8192 units of a row on a chip without clusters";
  return nullptr;
}

void ascend_cuda(const ValueNetwork& network, const float* offset, const AscentBatch& batch, void* workspace, void* stream_pointer) {
  if (batch.rows == 0) return;
  const auto stream = static_cast<Stream>(stream_pointer);
  const Device device = current_device();
  Pieces pieces(workspace);
  if (network.three_layers()) {
    const ThreeLayers climb = three_layers(pieces, network, offset, batch);
    clear(climb.state, sizeof(BatchState), stream);
    launch_enter(network, batch, climb.z1, stream);
    launch_climb_three(climb, device, stream);
    launch_leave(network, climb.total, batch, stream);
  } else {
    const Climb climb = two_layers(pieces, network, offset, batch);
    launch_enter(network, batch, climb.z, stream);
    launch_first_velocity(network, climb.z, climb.d, batch.rows, stream);
    launch_climb(climb, stream);
    launch_leave(network, climb.total, batch, stream);
  }
}

}  // namespace recontrol
