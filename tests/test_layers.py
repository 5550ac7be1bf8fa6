"""One direction of imports, and what no file may hold."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".py", ".cpp", ".cc", ".h", ".cu", ".cuh"}
THIS = Path(__file__).resolve()

# What the modules below the pipelines may import of the package. Anything not named here is a user-facing object.
BELOW = {
    "recontrol.version": set(),
    "recontrol.files": set(),
    "recontrol.trust_region": set(),
    "recontrol.prepared": set(),
    "recontrol.kernels": set(),
    "recontrol.value_files": {"recontrol.files"},
    # `push_to_hub` hands over to the hub when it is called, and the operators to the sums.
    "recontrol.value": {"recontrol.files", "recontrol.hub", "recontrol.prepared", "recontrol.value_files", "recontrol.weighted_sum"},
    "recontrol.weighted_sum": {"recontrol.value"},
    "recontrol.arguments": {"recontrol.value"},
    "recontrol.reference": {"recontrol.arguments", "recontrol.trust_region", "recontrol.value"},
    "recontrol.backends": {
        "recontrol.arguments",
        "recontrol.kernels",
        "recontrol.prepared",
        "recontrol.reference",
        "recontrol.trust_region",
        "recontrol.version",
    },
    "recontrol.ascend": {"recontrol.arguments", "recontrol.backends", "recontrol.prepared", "recontrol.value"},
}


@cache
def files() -> list[Path]:
    """What is tracked, and what is new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for folder, package in ((ROOT / "recontrol", "recontrol"), (ROOT / "kernels", "recontrol.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, *, deferred: bool) -> set[str]:
    """The modules of the package that a module imports; those inside functions only with `deferred`."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for child in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in inside and not deferred:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import in line {node.lineno}"
            # `from package import module` imports the module; `from package import name` the package.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                version = full == "recontrol.__version__"
                found.add("recontrol.version" if version else full if full in modules() else str(node.module))
    return {module for module in found if module.split(".")[0] == "recontrol"} - {name}


def layer(module: str) -> str:
    """The entry of BELOW that a module belongs to, or its own name."""
    return next((entry for entry in BELOW if module == entry or module.startswith(entry + ".")), module)


@pytest.mark.parametrize("entry", BELOW)
def test_modules_import_only_what_lies_below(entry):
    """user-facing object -> op -> backend -> kernel, also inside functions."""
    members = [name for name in modules() if layer(name) == entry]
    assert members, f"{entry} is gone: the table of this test is out of date"
    for name in members:
        found = {layer(module) for module in imports_of(name, deferred=True)} - {entry, "recontrol._C"}
        assert found <= BELOW[entry], f"{name} imports {sorted(found - BELOW[entry])}, which lies above it"


def test_the_table_knows_a_violation_when_it_sees_one(monkeypatch, tmp_path):
    (tmp_path / "trust_region.py").write_text("def f():\n    from recontrol.backends import cpu\n")
    monkeypatch.setitem(modules(), "recontrol.trust_region", tmp_path / "trust_region.py")
    with pytest.raises(AssertionError, match=r"imports \['recontrol.backends'\], which lies above it"):
        test_modules_import_only_what_lies_below("recontrol.trust_region")


def test_nobody_imports_the_command_line():
    for name in modules():
        if not name.startswith(("recontrol.cli", "recontrol.__main__")):
            assert not any(module.startswith("recontrol.cli") for module in imports_of(name, deferred=True)), name


def test_no_import_goes_round_in_a_circle():
    """At import time; a deferred import may close a circle."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"modules import each other: {' -> '.join((*path[path.index(name) :], name))}"
        if name in done:
            return
        for module in imports_of(name, deferred=False):
            # A module's parents are imported before it anyway.
            if module in modules() and not name.startswith(module + ".") and module != "recontrol":
                visit(module, (*path, name))
        done.add(name)

    for name in modules():
        visit(name, ())


def test_the_core_needs_torch_and_safetensors_only():
    """What decodes under control imports no pipeline library; hub access is deferred to the call that needs it."""
    heavy = {"transformers", "datasets", "accelerate", "tqdm", "matplotlib", "sentence_transformers", "huggingface_hub"}
    for entry in BELOW:
        for name in modules():
            if layer(name) == entry:
                tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
                found = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
                found |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
                assert not {module.split(".")[0] for module in found} & heavy, name


def test_kernels_know_no_torch():
    """Only the bindings do; everything else is handed pointers, sizes and strides."""
    checked = 0
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in SOURCES and path != ROOT / "csrc" / "bindings.cpp":
            text = path.read_text(encoding="utf-8")
            checked += 1
            assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)", text), f"{path.name} includes the tensor library"
            assert not re.search(r"\b(at|torch|c10|pybind11|py)::", text), f"{path.name} names the tensor library"
    assert checked > 5


def test_library_headers_come_before_the_instruction_set():
    """A function of the standard library compiled for AVX-512 may be the one that the linker keeps for all."""
    checked = 0
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        lines = path.read_text(encoding="utf-8").splitlines()
        targets = [number for number, line in enumerate(lines) if re.match(r"\s*#\s*pragma\s+(GCC\s+target|clang\s+attribute\s+push)", line)]
        if targets:
            checked += 1
            late = [line for line in lines[targets[0] :] if re.match(r"\s*#\s*include\s*<", line)]
            assert not late, f"{path.name} includes after the target pragma: {late}"
    assert checked > 0


def test_no_header_brings_library_headers_into_an_instruction_set():
    """The headers that are compiled once for each instruction set include nothing themselves."""
    for path in (ROOT / "csrc" / "cpu").glob("*.h"):
        assert not re.search(r"^\s*#\s*include", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


def test_the_build_is_for_every_processor():
    for path in files():
        if path.suffix in {*SOURCES, ".toml", ".cfg", ".sh", ".txt"} or path.name in {"Makefile", "run"}:
            for flag in ("march=native", "mtune=native", "mcpu=native", "xHost"):
                assert path == THIS or flag not in path.read_text(encoding="utf-8"), f"{path.relative_to(ROOT)} has {flag}"


def test_no_file_is_longer_than_500_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files() if path.suffix in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_nothing_is_left_to_do_and_no_path_of_a_machine_is_left_behind():
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b")
    machine = re.compile(r"(?<![\w.}])/(work|home|root|Users|mnt|media|scratch)/\w|\b[A-Z]:\\\\?Users\b")
    found = []
    for path in files():
        if path == THIS or path.stat().st_size > 1_000_000:
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        prose = path.suffix in {*SOURCES, ".md", ".toml", ".sh", ".txt", ".in"} or path.name in {"Makefile", "run"}
        for number, line in enumerate(lines, 1):
            if machine.search(line) or (prose and unfinished.search(line)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
