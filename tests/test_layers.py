"""One direction of imports, and what no file may hold."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".py", ".cpp", ".cc", ".h", ".cu", ".cuh"}
THIS = Path(__file__).resolve()

# The rooms from the lowest to the highest: a module imports from its own room and from those before it. Rooms on one line are siblings
# and do not know each other.
ROOMS = (
    ("version", "moved", "checks", "configs", "files", "ambient"),
    ("kernels",),
    ("value",),
    ("ascent",),
    ("decoding",),
    ("generation", "vllm_plugin", "data"),
    ("training",),
    ("methods",),
    ("evaluation",),
    ("reports",),
    ("studies",),
    ("cli",),
)
FLOOR = {f"recontrol.{room}": floor for floor, rooms in enumerate(ROOMS) for room in rooms}
# What decodes under control; it must not need what the pipelines need.
CORE = ("ambient", "checks", "configs", "files", "moved", "version", "value", "ascent", "decoding", "generation", "kernels")
LONGEST_FUNCTION, MOST_LINES = 60, 14_000


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


def room(module: str) -> str:
    """`recontrol.value` for `recontrol.value.files`."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("name", FLOOR)
def test_modules_import_only_what_lies_below(name):
    """Also inside functions."""
    members = [module for module in modules() if room(module) == name]
    assert members, f"{name} is gone: the table of this test is out of date"
    for member in members:
        for module in imports_of(member, deferred=True) - {"recontrol._C"}:
            other = room(module)
            assert other == name or FLOOR.get(other, len(ROOMS)) < FLOOR[name], f"{member} imports {module}, which does not lie below it"


def test_every_module_is_in_a_room():
    assert {room(module) for module in modules()} - FLOOR.keys() == {"recontrol", "recontrol.__main__"}


def test_the_table_knows_a_violation_when_it_sees_one(monkeypatch, tmp_path):
    (tmp_path / "checks.py").write_text("def f():\n    from recontrol.ascent.backends import triton\n")
    monkeypatch.setitem(modules(), "recontrol.checks", tmp_path / "checks.py")
    with pytest.raises(AssertionError, match=r"recontrol.checks imports recontrol.ascent.backends.triton, which does not lie below it"):
        test_modules_import_only_what_lies_below("recontrol.checks")


def test_no_import_goes_round_in_a_circle():
    """Not even one that closes inside a function."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"modules import each other: {' -> '.join((*path[path.index(name) :], name))}"
        if name in done:
            return
        for module in imports_of(name, deferred=True):
            # A module's parents are imported before it anyway.
            if module in modules() and not name.startswith(module + ".") and module != "recontrol":
                visit(module, (*path, name))
        done.add(name)

    for name in modules():
        visit(name, ())


def test_the_core_needs_torch_numpy_safetensors_and_transformers_only():
    """The rest comes with extras and is imported where it is used; tqdm, yaml and huggingface_hub come with transformers."""
    known = {"recontrol", "torch", "numpy", "safetensors", "transformers", "tqdm", "huggingface_hub", "triton"}
    for name in modules():
        if room(name).removeprefix("recontrol.") in CORE:
            tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
            found = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
            found |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
            others = {module.split(".")[0] for module in found} - known - sys.stdlib_module_names
            assert not others, f"{name} imports {sorted(others)}"


def test_the_layer_is_thin():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items() if room(name) != "recontrol.kernels")
    assert lines <= MOST_LINES, f"recontrol/ has {lines} lines of Python"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """The lines of a function without its docstring, comments and blank lines."""
    numbers = set(range(function.lineno, (function.end_lineno or 0) + 1))
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        numbers -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return sum(bool(text := source[number - 1].strip()) and not text.startswith("#") for number in numbers)


def test_no_function_is_longer_than_sixty_lines_of_code():
    long = {}
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                long[f"{name}.{node.name}"] = code_lines(node, text.splitlines())
    assert {name: count for name, count in long.items() if count > LONGEST_FUNCTION} == {}


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
