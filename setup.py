"""Builds the compiled kernels. Everything that can be said without code is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent
INCLUDE = [str(ROOT / "csrc" / "include"), str(ROOT / "csrc" / "cpu")]


def wants_extension() -> bool:
    """RECONTROL_BUILD=python asks for a package without compiled code."""
    return os.environ.get("RECONTROL_BUILD", "auto") != "python"


def has_cuda() -> bool:
    """Whether nvcc and a CUDA build of torch are both here, and there are CUDA kernels to build."""
    import torch

    return (
        bool(cuda_sources())
        and torch.version.cuda is not None
        and CUDA_HOME is not None
        and shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) is not None
    )


def cuda_sources() -> list[str]:
    """The CUDA kernels."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def cpu_sources() -> list[str]:
    """The C++ kernels and the bindings. The processor's instruction set is chosen at run time, never here."""
    return sorted(str(path.relative_to(ROOT)) for path in [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "csrc" / "bindings.cpp"])


def compiler_flags() -> list[str]:
    """Flags of the host compiler; contraction is off because the kernels say where a product is fused."""
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    # Python's own flags ask for debugging information, which makes the wheel ten times as large.
    return ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *openmp]


def extension() -> CppExtension:
    """The one extension module, with CUDA kernels in it where they can be built."""
    link = [] if sys.platform == "darwin" else ["-fopenmp"]
    if not has_cuda():
        return CppExtension("recontrol._C", cpu_sources(), include_dirs=INCLUDE, extra_compile_args={"cxx": compiler_flags()}, extra_link_args=link)
    flags = {"cxx": [*compiler_flags(), "-DRECONTROL_WITH_CUDA"], "nvcc": ["-O3", "-std=c++20", *gpu_flags()]}
    return CUDAExtension("recontrol._C", cpu_sources() + cuda_sources(), include_dirs=INCLUDE, extra_compile_args=flags, extra_link_args=link)


def gpu_flags() -> list[str]:
    """The GPUs to compile for: those of TORCH_CUDA_ARCH_LIST where it is set, else Ampere, Hopper, and through PTX whatever is newer."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    # Given here, no other is added: the kernels use what came with each, clusters from 9.0 on.
    return [f"-gencode=arch=compute_{wanted}" for wanted in ("80,code=sm_80", "90a,code=sm_90a", "90,code=compute_90")]


setup(
    packages=["recontrol.kernels", *find_packages(include=["recontrol", "recontrol.*"])],
    package_dir={"recontrol": "recontrol", "recontrol.kernels": "kernels"},
    ext_modules=[extension()] if wants_extension() else [],
    cmdclass={"build_ext": BuildExtension},
)
