#include "launches.h"

namespace recontrol::cuda {

void launch_enter(const ValueNetwork& network, const AscentBatch& batch, Numbers z, Stream stream) {
  const States states{batch.hidden, batch.rows, batch.hidden_stride, batch.dtype};
  with_shape(batch.rows, [&](auto shape) {
    using S = decltype(shape);
    const Launch blocks = cover<S>(network.first.rows, batch.rows);
    with_weights(network.first.dtype, [&](auto kind) {
      using W = decltype(kind);
      if constexpr (kTerms<W> == 1) {
        if (batch.dtype == DType::kBFloat16) return launch(enter<W, W, S>, "enter", blocks, stream, network.first, network.first_bias, states, z);
      }
      launch(enter<W, AnyFloat, S>, "enter", blocks, stream, network.first, network.first_bias, states, z);
    });
  });
}

}  // namespace recontrol::cuda
