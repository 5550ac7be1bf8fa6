#include "launches.h"

namespace recontrol::cuda {

void launch_first_velocity(const ValueNetwork& network, Numbers z, Numbers d, int64_t rows, Stream stream) {
  with_shape(rows, [&](auto shape) {
    using S = decltype(shape);
    launch(first_velocity<S>, "first_velocity", cover<S>(network.gram.cols, rows), stream, network.gram, network.out, z, d, rows);
  });
}

void launch_leave(const ValueNetwork& network, Numbers total, const AscentBatch& batch, Stream stream) {
  with_shape(batch.rows, [&](auto shape) {
    using S = decltype(shape);
    with_weights(network.first.dtype, [&](auto kind) {
      launch(leave<decltype(kind), S>, "leave", cover<S>(network.first.cols, batch.rows), stream, network.first, total, batch);
    });
  });
}

}  // namespace recontrol::cuda
