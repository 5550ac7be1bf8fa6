"""The compiled extension. Its operators are under torch.ops.recontrol_cpu and torch.ops.recontrol_cuda."""

compiler: str
# The version of the CUDA toolkit, or None where the extension was built without CUDA.
cuda: str | None

def cpu_capability() -> str: ...
def use_cpu_capability(name: str) -> None: ...

# There with CUDA only.
def cuda_why_not(device: int, units: int, second_units: int) -> str | None: ...
