"""What is written about the code agrees with it: docstrings, README, CHANGELOG, and the linters."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import recontrol as rc
from benchmarks.rows import DATA, GPU_DATA, read_rows
from benchmarks.table import render, render_gpu, summary

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
SUBCOMMANDS = {"collect", "relabel", "train", "push", "generate", "serve", "evaluate", "judge", "info"}


@dataclass
class Documented:
    """A function or class of the package as it stands in the source."""

    where: str
    public: bool
    docstring: str | None
    parameters: tuple[str, ...]


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    given = function.args
    named = [*given.posonlyargs, *given.args, *filter(None, [given.vararg]), *given.kwonlyargs, *filter(None, [given.kwarg])]
    return tuple(argument.arg for argument in named if argument.arg not in ("self", "cls"))


def constructor_parameters(node: ast.ClassDef, path: Path) -> tuple[str, ...]:
    """Those of `__init__` or `__new__`, or the fields of a dataclass, with those of its bases."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name in ("__init__", "__new__"):
            return parameters_of(child)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        if node.bases:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            return tuple(inspect.signature(getattr(module, node.name)).parameters)
        return tuple(child.target.id for child in node.body if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name))
    return ()


def documented_in(path: Path) -> list[Documented]:
    found = []

    def visit(node: ast.Module | ast.ClassDef, prefix: str, public: bool) -> None:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            # What follows it has the docstring.
            if any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in child.decorator_list):
                continue
            is_class = isinstance(child, ast.ClassDef)
            seen = public and not child.name.startswith("_")
            parameters = constructor_parameters(child, path) if isinstance(child, ast.ClassDef) else parameters_of(child)
            found.append(Documented(f"{prefix}{child.name}", seen, ast.get_docstring(child), parameters))
            if is_class:
                visit(child, f"{prefix}{child.name}.", seen)

    visit(ast.parse(path.read_text(encoding="utf-8")), f"{path.relative_to(ROOT)}: ", True)
    return found


@cache
def documented() -> list[Documented]:
    paths = [*sorted((ROOT / "recontrol").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
    return [entry for path in paths for entry in documented_in(path)]


def section(docstring: str | None, title: str) -> list[str] | None:
    """The names in a section of a Google-style docstring, `*` and `**` stripped; None without the section."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    if f"{title}:" not in lines:
        return None
    names: list[str] = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if re.match(r" {4}\S", line):
            match = re.match(r" {4}((?:\*{0,2}\w+, )*\*{0,2}\w+)(?: \([^)]*\))?:(?: |$)", line)
            assert match, f"not of the form `name: text`: {line!r}"
            names += [name.lstrip("*") for name in match[1].split(", ")]
    return names


def test_sections_are_read_as_written():
    text = "Do.\n\nArgs:\n    one: 1\n        more: of it\n    two, three (int): 2\n\n    **rest: others\n\nReturns:\n    four: x\n"
    assert section(text, "Args") == ["one", "two", "three", "rest"] and section("Do.", "Args") is None
    with pytest.raises(AssertionError, match="not of the form"):
        section("Do.\n\nArgs:\n    one - 1\n", "Args")


def test_every_public_function_and_class_has_a_docstring():
    entries = documented()
    assert len(entries) > 50
    assert [entry.where for entry in entries if entry.public and not entry.docstring] == []


def test_argument_names_in_docstrings_are_those_of_the_signature():
    """Wherever there is an `Args:` section, it names every parameter, in order, and nothing else."""
    wrong = {}
    for entry in documented():
        names = section(entry.docstring, "Args")
        if names is not None and tuple(names) != entry.parameters:
            wrong[entry.where] = {"documented": names, "signature": list(entry.parameters)}
    assert wrong == {}


def public_objects() -> dict[str, object]:
    """Functions and classes that a user reaches from `recontrol.__all__`; those of a public module are its own."""
    found: dict[str, object] = {}
    for name in rc.__all__:
        thing = getattr(rc, name)
        if isinstance(thing, ModuleType):
            own = [key for key, entry in vars(thing).items() if not key.startswith("_") and getattr(entry, "__module__", None) == thing.__name__]
            entries = {f"{name}.{key}": getattr(thing, key) for key in getattr(thing, "__all__", own)}
            found |= {key: entry for key, entry in entries.items() if inspect.isfunction(entry) or inspect.isclass(entry)}
        elif callable(thing):
            found[name] = thing
    return found


def test_everything_in_all_exists():
    assert sorted(rc.__all__) == sorted(set(rc.__all__))
    assert [name for name in rc.__all__ if not hasattr(rc, name)] == []
    assert {"ascend", "ValueFunction", "backend_info", "oracle"} <= set(rc.__all__)


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_every_parameter_of_the_public_interface_is_documented(name):
    thing = public_objects()[name]
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isclass(thing) and not issubclass(thing, str) and not isinstance(vars(thing).get("__init__"), FunctionType):
        pytest.skip("a class that adds no parameters to those of its base")
    parameters = [parameter for parameter in inspect.signature(thing).parameters if parameter not in ("self", "cls")]
    documented_names = section(inspect.getdoc(thing), "Args") or []
    # `Tensors:` is the section of a dataclass of tensors.
    documented_names += section(inspect.getdoc(thing), "Tensors") or []
    assert documented_names == parameters


def test_oracle_and_fast_path_share_their_signature():
    fast, oracle = inspect.signature(rc.ascend).parameters, inspect.signature(rc.oracle.ascend).parameters
    shared = [name for name in fast if name != "backend"]
    assert list(oracle)[: len(shared)] == shared
    assert {name: fast[name].default for name in shared} == {name: oracle[name].default for name in shared}


def readme() -> str:
    return README.read_text(encoding="utf-8")


def fences(text: str, *languages: str) -> list[tuple[int, str]]:
    """The first line number and the text of each fenced block in one of these languages."""
    found = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL):
        if match[1].strip() in languages:
            found.append((text[: match.start(2)].count("\n") + 1, match[2]))
    return found


def test_fences_are_found_with_their_lines():
    assert fences("a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny\n```\n", "python") == [(3, "x = 1\n"), (9, "y\n")]


def test_readme_code_runs(tmp_path, monkeypatch):
    """All ```python blocks, in order, in one namespace, in an empty folder that has only `examples` in it; with fewer prompts than shown."""
    load = rc.load_prompts
    monkeypatch.setattr(rc, "load_prompts", lambda *arguments, limit=None, **options: load(*arguments, limit=min(limit or 24, 24), **options), raising=False)
    text = readme()
    blocks = fences(text, "python")
    assert blocks, "README.md has no ```python block"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, code in blocks:
        # Empty lines before it, so that a traceback shows the line of the README.
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)


def help_of(arguments: list[str], capsys, monkeypatch) -> str:
    """What `recontrol ... --help` prints."""
    from recontrol.cli import main

    monkeypatch.setattr(sys, "argv", ["recontrol", *arguments, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def test_readme_mentions_every_subcommand(capsys, monkeypatch):
    text = readme()
    listed = re.search(r"\{([\w,-]+)\}", help_of([], capsys, monkeypatch))
    assert listed, "`recontrol --help` lists no subcommands"
    subcommands = set(listed[1].split(","))
    assert subcommands >= SUBCOMMANDS
    assert [name for name in sorted(subcommands) if not re.search(rf"\brecontrol {name}\b", text)] == []


def test_options_in_the_readme_exist(capsys, monkeypatch):
    """Every `--option` of a `recontrol` command in a shell block is one that its `--help` knows."""
    text = readme()
    unknown = []
    for _, block in fences(text, "sh", "bash", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if len(words) > 1 and words[0] == "recontrol" and words[1] in SUBCOMMANDS:
                known = set(re.findall(r"--[a-z][\w-]*", help_of([words[1]], capsys, monkeypatch)))
                unknown += [f"recontrol {words[1]} {word}" for word in words if word.startswith("--") and word.split("=")[0] not in known]
    assert unknown == []


@pytest.mark.parametrize("name,data,render", [("", DATA, render), (" benchmarks/data/gpu.csv", GPU_DATA, render_gpu)], ids=["cpu", "gpu"])
def test_measured_tables_are_those_of_the_recorded_rows(name, data, render):
    found = re.search(rf"<!-- python -m benchmarks\.table{re.escape(name)} -->\n(.*?)\n<!-- end -->", BENCHMARKS.read_text(encoding="utf-8"), re.DOTALL)
    assert found and found[1].strip() == render(read_rows(data) if data.exists() else []).strip()


def test_the_figures_on_the_first_screen_are_those_of_the_recorded_rows():
    found = re.search(r"<!-- python -m benchmarks\.table --summary -->\n(.*?)\n<!-- end -->", readme(), re.DOTALL)
    assert found and found[1].strip() == summary(read_rows(DATA)).strip()


def test_the_table_of_methods_is_that_of_the_report():
    path = "reports/movie_reviews/report.csv"
    shown = re.search(
        rf"<!-- python examples/movie_reviews/summary\.py {re.escape(path)} -->\n(.*?)\n<!-- end -->", BENCHMARKS.read_text(encoding="utf-8"), re.DOTALL
    )
    done = subprocess.run([sys.executable, "examples/movie_reviews/summary.py", path], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert shown and shown[1].strip() == done.stdout.strip()


def test_files_named_in_the_readme_exist():
    """Relative links lead somewhere."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", readme())
    assert [target for target in targets if not re.match(r"[a-z]+:", target) and not (ROOT / target).exists()] == []


def test_the_changelog_begins_with_this_version():
    changelog = ROOT / "CHANGELOG.md"
    versions = re.findall(r"^##\s+\[?v?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", changelog.read_text(encoding="utf-8"), re.MULTILINE)
    assert versions and versions[0] == rc.__version__


@pytest.mark.parametrize("arguments", [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)], ids=" ".join)
def test_linters_are_content(arguments):
    if importlib.util.find_spec(arguments[0]) is None:
        pytest.skip(f"{arguments[0]} is not installed; it is in the extra `dev`")
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)} found:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
