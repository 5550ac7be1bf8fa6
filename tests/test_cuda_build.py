"""What nvcc makes of the CUDA kernels: no GPU is needed to compile them and to read the machine code."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")
NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("nvcc is not installed", allow_module_level=True)
# Largest programs first, so that the last one does not run alone.
SOURCES.sort(key=lambda path: path.stem not in ("dots", "climb_three"))


def cuobjdump() -> str | None:
    """That of the CUDA toolkit, or the one that Triton ships."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton")
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.exists() else None


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """The object file of each source, for both architectures, and what ptxas reports about it."""
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{name.removeprefix('sm_')},code={name}" for name in ARCHITECTURES]

    def build(source: Path) -> tuple[Path, str]:
        into = folder / f"{source.stem}.o"
        command = [NVCC, "-O3", "-std=c++20", "-I", ROOT / "csrc" / "include", *targets, "-Xptxas", "-v", "-Werror", "all-warnings", "-c", source, "-o", into]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return into, done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(build, SOURCES), strict=True))


@pytest.fixture(scope="module")
def code(built):
    """The instructions of each kernel: {(source, architecture): {kernel: text}}."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump, neither of a CUDA toolkit nor of Triton")
    found = {}
    for source, (path, _) in built.items():
        for architecture in ARCHITECTURES:
            text = subprocess.run([tool, "--dump-sass", "-arch", architecture, path], capture_output=True, text=True, check=True).stdout
            parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)[1:]
            found[source, architecture] = dict(zip(parts[::2], parts[1::2], strict=True))
    return found


def test_nothing_is_spilled(built):
    """No kernel keeps anything in local memory: neither registers that did not fit, nor arrays that are indexed at run time."""
    kernels = 0
    for source, (_, report) in built.items():
        entries = re.findall(
            r"Compiling entry function '(\S+)' for '(\S+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        )
        assert len(entries) == report.count("Compiling entry function")
        assert [entry for entry in entries if entry[2:] != ("0", "0", "0")] == [], source
        kernels += len(entries)
    assert kernels > 100


def test_there_is_no_local_memory_in_the_code(code):
    for kernels in code.values():
        for name, instructions in kernels.items():
            assert not re.search(r"\b(LDL|STL)\b", instructions), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["dots", "sums", "climb_three"])
def test_products_run_on_tensor_cores(code, source, architecture):
    kernels = code[source, architecture]
    assert kernels
    for name, instructions in kernels.items():
        assert "HMMA.16816.F32.BF16" in instructions, name


def test_the_steps_of_a_row_wait_for_its_cluster_alone(code):
    """Hardware barriers of a cluster, and nothing that all blocks of the grid would have to reach."""
    for name, instructions in code["climb", "sm_90a"].items():
        clustered = "Lb1EEELb" in name
        # The shapes of devices without clusters are left empty.
        assert ("UCGABAR_ARV" in instructions and "UCGABAR_WAIT" in instructions) == clustered, name
        assert not re.search(r"\b(ATOM|ATOMG|RED)\b", instructions), name
    assert all("UCGABAR" not in instructions for instructions in code["climb", "sm_80"].values())
    assert any("BAR.SYNC" in instructions for instructions in code["climb", "sm_80"].values())


def test_rows_of_the_gram_matrix_are_loaded_several_at_once(code):
    """In the step loop the loads of some rows of G are issued before the first of them is used."""
    (instructions,) = (text for name, text in code["climb", "sm_90a"].items() if "ILi8ELi256ELi2ELb1EEELb0E" in name)
    lines = [line for line in instructions.splitlines() if re.search(r"\b(LDG|FFMA)\b", line)]
    runs = re.findall(r"L+", "".join("L" if "LDG.E.64" in line else "F" if "FFMA" in line else "" for line in lines))
    assert max(map(len, runs)) >= 4
