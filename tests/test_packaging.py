"""The wheel: what is in it, that it works from elsewhere, with and without its extension, and on any processor."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from oracle import edit_error, oracle, released_loop, rounding_error

import recontrol as rc
from recontrol import _C

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "baseline")
# What a build reads; everything else in a checkout must not matter to it.
BUILD_INPUTS = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "csrc",
    "kernels",
    "recontrol",
    "tests",
)


def mirror(source: Path, into: Path) -> None:
    """Make `into` hold what a build reads. Unchanged files keep their times, so that ninja compiles only what changed."""
    wanted = set()
    for name in BUILD_INPUTS:
        for path in [source / name, *(source / name).rglob("*")]:
            if path.is_file() and path.suffix not in {".so", ".pyc"}:
                relative = path.relative_to(source)
                wanted.add(relative)
                copy = into / relative
                if not copy.exists() or copy.read_bytes() != path.read_bytes():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
    for path in list(into.rglob("*")):
        relative = path.relative_to(into)
        if path.is_file() and relative not in wanted and not (relative.parts[0] == "build" and relative.parts[1].startswith("temp")):
            path.unlink()


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=580, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command[:6]))} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


def pip_wheel(source: Path, into: Path, build: str = "auto") -> Path:
    environment = {**os.environ, "RECONTROL_BUILD": build, "MAX_JOBS": "2"}
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", into, source, env=environment)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(request, tmp_path_factory) -> Path:
    """Built from a copy of the source that is kept with its object files: a minute the first time, seconds after that."""
    cache = getattr(request.config, "cache", None)
    name = f"build-py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    folder = cache.mkdir(name) if cache else tmp_path_factory.mktemp(name)
    with FileLock(folder / "lock"):
        mirror(ROOT, folder / "source")
        return pip_wheel(folder / "source", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel installed into a folder that is no environment."""
    site = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel)
    return site


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory) -> Path:
    """Built with RECONTROL_BUILD=python."""
    source = tmp_path_factory.mktemp("pure")
    mirror(ROOT, source)
    return pip_wheel(source, tmp_path_factory.mktemp("pure-wheel"), "python")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    mirror(ROOT, source)
    run(sys.executable, "-c", "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def python_files() -> set[str]:
    """Every module of the source tree, under its installed name."""
    found = {f"recontrol/{path.relative_to(ROOT / 'recontrol')}" for path in (ROOT / "recontrol").rglob("*.py")}
    return found | {f"recontrol/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}


# Run by a fresh interpreter that sees only the folder under test: what a user of this installation gets.
PROBE = """
import sys, json, logging
sys.path.insert(0, sys.argv[1])
# An editable install lends its extension to a package that has none.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch
import recontrol as rc
import recontrol.kernels
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("recontrol").addHandler(Keep())
logging.getLogger("recontrol").setLevel(logging.INFO)
torch.manual_seed(0)
value, hidden = rc.ValueFunction(16, (24,)), torch.randn(5, 16)
def ascend(backend):
    try:
        return rc.ascend(hidden, value, backend=backend)
    except RuntimeError as error:
        return error
by_name = {name: ascend(name) for name in ("cpu", "torch", "oracle")}
auto = [rc.ascend(hidden, value) for _ in range(3)]
exact = rc.oracle.ascend(hidden.double(), value.double())
print(json.dumps({
    "file": rc.__file__,
    "kernels": recontrol.kernels.__file__,
    "version": rc.__version__,
    "info": rc.backend_info(),
    "cpu_error": str(by_name["cpu"]) if isinstance(by_name["cpu"], RuntimeError) else None,
    "auto_is_cpu": isinstance(by_name["cpu"], torch.Tensor) and torch.equal(auto[0], by_name["cpu"]),
    "auto_is_torch": torch.equal(auto[0], by_name["torch"]),
    "error": ((auto[0] - exact).norm() / (exact - hidden).norm()).item(),
    "log": records,
}))
"""


# What a user's code looks like to a type checker.
USES = """
import recontrol as rc
from recontrol import _C
reveal_type(rc.ascend)
reveal_type(_C.compiler)
reveal_type(rc.ValueFunction.from_released)
"""


def probe(site: Path, tmp_path: Path) -> dict:
    """What the installation in `site` says of itself, asked from another directory."""
    return json.loads(run(sys.executable, "-I", "-c", PROBE, site, cwd=tmp_path).splitlines()[-1])


class TestContents:
    def test_wheel_holds_the_package_and_nothing_else(self, wheel):
        names = zipfile.ZipFile(wheel).namelist()
        assert {name.split("/")[0] for name in names} == {"recontrol", f"recontrol-{rc.__version__}.dist-info"}
        assert {name for name in names if name.endswith(".py")} == python_files()
        assert {"recontrol/kernels/__init__.py", "recontrol/ascent/backends/__init__.py"} <= set(names)
        extensions = [name for name in names if name.endswith(".so")]
        assert len(extensions) == 1 and extensions[0].startswith("recontrol/_C.")
        assert {"recontrol/py.typed", "recontrol/_C.pyi"} <= set(names)
        assert not [name for name in names if re.search(r"\.(cpp|h|cu|cuh|pyc|o)$|(^|/)(tests|csrc|examples|benchmarks|build)/", name)]

    def test_wheel_is_small(self, wheel):
        """No debugging information, no models."""
        assert wheel.stat().st_size < 5_000_000

    def test_wheel_is_of_this_platform_and_the_one_without_extension_of_any(self, wheel, pure_wheel):
        assert re.search(r"-cp\d+-cp\d+-\w+\.whl$", wheel.name)
        assert pure_wheel.name == f"recontrol-{rc.__version__}-py3-none-any.whl"
        names = zipfile.ZipFile(pure_wheel).namelist()
        assert {name for name in names if name.endswith(".py")} == python_files() and not [name for name in names if name.endswith(".so")]

    def test_metadata(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            metadata = archive.read(f"recontrol-{rc.__version__}.dist-info/METADATA").decode()
            points = archive.read(f"recontrol-{rc.__version__}.dist-info/entry_points.txt").decode()
            top = archive.read(f"recontrol-{rc.__version__}.dist-info/top_level.txt").decode()
        assert f"\nVersion: {rc.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
        assert re.search(r"\nRequires-Dist: torch>=", metadata) and re.search(r"\nRequires-Dist: safetensors>=", metadata)
        scripts, plugins = (
            ["[console_scripts]", "recontrol", "=", "recontrol.cli:main"],
            ["[vllm.general_plugins]", "recontrol", "=", "recontrol.vllm_plugin:register"],
        )
        assert points.split() == [*scripts, *plugins]
        assert top.split() == ["recontrol"]

    def test_sdist_can_be_built_from(self, sdist, tmp_path):
        """It holds the headers, the kernels and the tests, and its C++ compiles with nothing else at hand."""
        names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
        wanted = {
            str(path.relative_to(ROOT))
            for folder in ("csrc", "kernels", "tests")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in {".py", ".h", ".cuh", ".cpp", ".cu"}
        }
        wanted |= {name for name in BUILD_INPUTS if (ROOT / name).is_file()}
        assert wanted <= names
        assert not [name for name in names if name.endswith((".so", ".pyc", ".o", ".safetensors"))]
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            pytest.skip("no C++ compiler")
        for path in sorted((sdist / "csrc" / "cpu").glob("*.cpp")):
            run(compiler, "-std=c++20", "-fsyntax-only", "-Wno-psabi", "-fopenmp", "-I", sdist / "csrc" / "include", "-I", sdist / "csrc" / "cpu", path)

    def test_wheel_from_the_sdist_is_the_same_without_extension(self, sdist, pure_wheel, tmp_path):
        again = pip_wheel(sdist, tmp_path, "python")
        assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(pure_wheel).namelist())


class TestInstallation:
    def test_works_from_another_directory(self, installed, tmp_path):
        found = probe(installed, tmp_path)
        assert Path(found["file"]).is_relative_to(installed) and Path(found["kernels"]).is_relative_to(installed / "recontrol" / "kernels")
        assert found["version"] == rc.__version__
        assert found["info"]["auto"] == "cpu" and found["info"]["backends"]["cpu"]["available"] is True
        assert found["info"]["backends"]["cpu"]["instruction_set"] in CAPABILITIES
        assert found["cpu_error"] is None and found["auto_is_cpu"] and found["error"] < 1e-5 and found["log"] == []

    def test_with_pythonpath(self, installed, tmp_path):
        where = run(
            sys.executable, "-c", "import recontrol, recontrol._C; print(recontrol._C.__file__)", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}
        )
        assert Path(where.strip()).is_relative_to(installed)

    def test_its_types_reach_the_code_of_others(self, installed, tmp_path):
        """mypy sees what `ascend` takes and returns, and what the extension holds."""
        (tmp_path / "uses.py").write_text(USES)
        # Reading the sources of these would take a minute.
        skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "transformers", "numpy", "huggingface_hub"))
        (tmp_path / "mypy.ini").write_text(f"[mypy]\ncache_dir = {tmp_path / 'cache'}\n{skipped}")
        shown = run(sys.executable, "-m", "mypy", "uses.py", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})
        revealed = re.findall(r'Revealed type is "(.*)"', shown)
        assert len(revealed) == 3 and revealed[0].startswith("def (hidden: ") and "backend: " in revealed[0], shown
        assert revealed[1].removeprefix("builtins.") == "str" and revealed[2].startswith("def (path: "), shown

    def test_console_script(self, installed, tmp_path):
        """It is installed, and its target is there."""
        assert (installed / "bin" / "recontrol").is_file()
        (point,) = importlib.metadata.entry_points(group="console_scripts", name="recontrol")
        assert point.value == "recontrol.cli:main"
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        shown = run(sys.executable, installed / "bin" / "recontrol", "--help", cwd=tmp_path, env=environment)
        assert all(name in shown for name in ("collect", "train", "generate", "evaluate", "info"))
        # Only the first line may name the program differently.
        assert run(sys.executable, "-m", "recontrol", "--help", cwd=tmp_path, env=environment).split("options:")[1] == shown.split("options:")[1]

    @pytest.fixture
    def spoilt(self, installed, tmp_path, request) -> Path:
        """The installed tree with an extension that cannot be loaded, and why."""
        site = tmp_path / "site"
        shutil.copytree(installed, site)
        (extension,) = (site / "recontrol").glob("_C*.so")
        if request.param == "absent":
            extension.unlink()
        elif request.param == "rubbish":
            extension.write_bytes(b"rubbish")
        elif request.param == "empty":
            extension.write_bytes(b"")
        else:
            compiler = shutil.which(os.environ.get("CXX", "g++"))
            if compiler is None:
                pytest.skip("no C++ compiler")
            # A library that is no Python module, and a module made for another version of torch.
            code = {"foreign": "int x;", "unresolved": 'void gone(); extern "C" void* PyInit__C() { gone(); return nullptr; }'}[request.param]
            (tmp_path / "x.cpp").write_text(code)
            extension.unlink()
            run(compiler, "-shared", "-fPIC", "-o", extension, tmp_path / "x.cpp")
        return site

    @pytest.mark.parametrize(
        "spoilt,reason",
        [
            ("absent", "No module named 'recontrol._C'"),
            ("rubbish", "(file too short|invalid ELF header)"),
            ("empty", "file too short"),
            ("foreign", "does not define module export function"),
            ("unresolved", "undefined symbol"),
        ],
        indirect=["spoilt"],
        ids=["absent", "rubbish", "empty", "foreign", "unresolved"],
    )
    def test_without_its_extension(self, spoilt, reason, tmp_path):
        """Import and "auto" work on the torch path, `backend_info` says why, and "cpu" raises with the same reason."""
        found = probe(spoilt, tmp_path)
        assert Path(found["file"]).is_relative_to(spoilt)
        status = found["info"]["backends"]["cpu"]
        assert found["info"]["auto"] == "torch" and status["available"] is False
        assert re.search(reason, status["reason"]) and "could not be loaded" in status["reason"]
        assert found["cpu_error"].startswith("backend 'cpu' cannot run here: ") and status["reason"] in found["cpu_error"] and "'torch'" in found["cpu_error"]
        assert found["auto_is_torch"] and found["error"] < 1e-5
        # Said once, however often "auto" falls back.
        assert len(found["log"]) == 1 and status["reason"] in found["log"][0]

    def test_pure_wheel_works(self, pure_wheel, tmp_path):
        with zipfile.ZipFile(pure_wheel) as archive:
            archive.extractall(tmp_path / "site")
        found = probe(tmp_path / "site", tmp_path)
        assert found["info"]["auto"] == "torch" and found["auto_is_torch"] and found["error"] < 1e-5
        assert "No module named 'recontrol._C'" in found["cpu_error"]


@pytest.fixture(scope="session")
def disassembly(installed) -> dict[str, list[str]]:
    """The instructions of each function of the wheel's extension, without their addresses."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("only x86-64 is compiled for several instruction sets")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    (extension,) = (installed / "recontrol").glob("_C*.so")
    functions: dict[str, list[str]] = {}
    body: list[str] = []
    for line in run("objdump", "-dC", "--no-show-raw-insn", extension).splitlines():
        if match := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            body = functions.setdefault(match[1], [])
        elif "\t" in line:
            body.append(line.split("\t", 1)[1].strip())
    assert len(functions) > 300
    return functions


def capability_of(function: str) -> str:
    """The namespace of a function; anything instantiated over a type of that namespace belongs to it alone, too."""
    match = re.search(r"recontrol::(avx512_bf16|avx512|avx2|baseline)::", function)
    return match[1] if match else "baseline"


# Every instruction of AVX and later begins with a v; those of BMI do not.
ABOVE_BASELINE = re.compile(r"(?:v(?!err|erw)\w+|andn|bextr|bls[ir]|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|popcnt)[ldqw]?\s|.*%[yz]mm|.*%k[0-7]")


class TestProcessors:
    def test_nothing_above_the_baseline_outside_the_kernels_of_an_instruction_set(self, disassembly):
        """Whatever runs before the choice, and the library functions that the linker keeps once for all, run on any x86-64."""
        found = {name: [line for line in body if ABOVE_BASELINE.match(line)][:3] for name, body in disassembly.items() if capability_of(name) == "baseline"}
        assert (
            any("recontrol::baseline::" in name for name in found)
            and any("use_cpu_capability" in name for name in found)
            and any("std::" in name for name in found)
        )
        assert {name: lines for name, lines in found.items() if lines} == {}

    def test_each_instruction_set_keeps_to_its_own(self, disassembly):
        lines = {
            capability: [line for name, body in disassembly.items() if f"recontrol::{capability}::" in name for line in body] for capability in CAPABILITIES
        }
        assert (
            any("%ymm" in line for line in lines["avx2"])
            and any("%zmm" in line for line in lines["avx512"])
            and any("vdpbf16ps" in line for line in lines["avx512_bf16"])
        )
        assert not [line for line in lines["avx2"] if re.search(r"%zmm|%k[0-7]|%[xyz]mm(1[6-9]|2\d|3[01])\b", line)]
        assert not [line for line in lines["avx512"] if re.search(r"bf16", line.split()[0])]


@pytest.fixture
def capability():
    """Sets the instruction set, and restores it."""
    before = _C.cpu_capability()
    yield _C.use_cpu_capability
    _C.use_cpu_capability(before)


class TestCapabilities:
    @pytest.mark.parametrize("dims", [(257,), (129, 70)], ids=["two-layers", "three-layers"])
    @pytest.mark.parametrize("name", CAPABILITIES)
    def test_results_agree_within_the_tolerance_of_the_oracle(self, name, dims, capability):
        try:
            capability(name)
        except ValueError:
            pytest.skip(f"this processor has no {name}")
        assert _C.cpu_capability() == name and rc.backend_info()["backends"]["cpu"]["instruction_set"] == name
        value, hidden = rc.ValueFunction(37, dims), torch.randn(128, 37)
        exact, _ = oracle(hidden, value, 0.5, 30)
        ours = edit_error(rc.ascend(hidden, value, 0.5, 30, backend="cpu"), exact, hidden)
        bound = torch.maximum(edit_error(released_loop(hidden, value, 0.5, 30), exact, hidden), rounding_error(exact, hidden))
        for quantile in (0.5, 0.9):
            assert ours.quantile(quantile) <= bound.quantile(quantile)

    @pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx", "baseline ", "auto"])
    def test_unknown_names_are_refused_and_change_nothing(self, name, capability):
        before = _C.cpu_capability()
        with pytest.raises(ValueError, match=re.escape(f"no instruction set '{name}'")):
            capability(name)
        assert _C.cpu_capability() == before

    def test_baseline_is_always_there_and_the_best_is_the_default(self, capability):
        """The default is the first of those that can be had."""
        fresh = run(sys.executable, "-c", "import torch; from recontrol import _C; print(_C.cpu_capability())").strip()
        had = []
        for name in CAPABILITIES:
            try:
                capability(name)
            except ValueError:
                continue
            had.append(name)
        assert had[-1] == "baseline" and had[0] == fresh
