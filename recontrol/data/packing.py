"""The old name of `recontrol.decoding.packing`."""

import warnings

from recontrol.decoding.packing import byte_count, cache_bytes_per_token, pack_by_length

__all__ = ["byte_count", "cache_bytes_per_token", "pack_by_length"]

warnings.warn("recontrol.data.packing is now recontrol.decoding.packing; the old name will go", DeprecationWarning, stacklevel=2)
