"""In which order "auto" tries the backends."""

# By the type of the device, first what was measured to be the fastest: on the CPU by benchmarks/data/cpu.csv. "torch" can run everything;
# what comes behind it is reached only where it is asked for by name.
MEASURED = {"cpu": ("cpu",)}
UNMEASURED = ("torch", "cpu", "cuda", "triton", "oracle")


def order(device: str) -> tuple[str, ...]:
    """The names of the backends to try on a device of this type; the first that can run an ascent is taken."""
    return tuple(dict.fromkeys((*MEASURED.get(device, ()), *UNMEASURED)))
