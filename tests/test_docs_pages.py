"""docs/: every block of every page is run or read, in the order of the page. test_integrations.py does it for integrations.md."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT, fences, help_of

import recontrol as rc
from recontrol import methods
from recontrol.configs import field_docs
from recontrol.studies import study
from recontrol.studies.catalogue import KINDS, read_entries
from recontrol.studies.study import make_study

DOCS = ROOT / "docs"
PAGES = [path.name for path in sorted(DOCS.glob("*.md")) if path.name != "integrations.md"]
# The most that the blocks may ask for: small, but enough to run everything. A tenth of the training prompts is held out, and at least three must be.
TRAIN_PROMPTS, PROMPTS = 32, 4
# Functions that get a smaller number, by the modules where they are looked up when they are called.
CAPPED = (
    ("recontrol.data.collect", "collect", "max_new_tokens", 8),
    ("recontrol.training.train", "train", "epochs", 4),
    ("recontrol.evaluation.evaluate", "evaluate", "max_new_tokens", 8),
    ("recontrol.generation.generate", "generate", "max_new_tokens", 8),
    ("recontrol.methods", "make_preference_pairs", "max_new_tokens", 8),
)
# A command that names one of these is not run: it needs the hub, or would start a server.
ELSEWHERE = ("lmsys/vicuna-7b-v1.5", "Anthropic/hh-rlhf", "rollouts/hh", "hh-rlhf-vicuna-7b", "recontrol serve")
# Files that the text names and no later block reads.
LEFT = {"guide.md": ("value/diagnosis.png", "report/responses.jsonl", "win-rate.json"), "study.md": ("out/study/report.html",)}
# Packages of the extras.
NEEDED = {"guide.md": ("vaderSentiment",), "methods.md": ("trl", "peft")}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # TRL's own use of transformers.
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
]


def text_of(page):
    return (DOCS / page).read_text(encoding="utf-8")


def commands(block):
    """The words of each `recontrol ...` of a shell block."""
    lines = [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "recontrol"]


def is_run(words):
    return not any(name in " ".join(["recontrol", *words]) for name in ELSEWHERE)


def capped(function, name, most):
    """The function with a setting of at most this, whether it is given as a keyword or in a config."""

    def smaller(argument):
        has_it = dataclasses.is_dataclass(argument) and hasattr(argument, name)
        return dataclasses.replace(argument, **{name: min(getattr(argument, name), most)}) if has_it else argument

    @functools.wraps(function)
    def called(*arguments, **options):
        arguments, options = [smaller(each) for each in arguments], {key: smaller(each) for key, each in options.items()}
        in_config = any(dataclasses.is_dataclass(each) and hasattr(each, name) for each in (*arguments, *options.values()))
        if name in options or not in_config:
            options[name] = min(options.get(name, most), most)
        return function(*arguments, **options)

    return called


def table_of_fields(config):
    """A Markdown table of the fields of a config, their defaults and their documentation."""
    docs, rows = field_docs(config), ["| field | default | what |", "| --- | --- | --- |"]
    for each in dataclasses.fields(config):
        factory = each.default_factory
        default = each.default if factory is dataclasses.MISSING else factory()
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
        rows.append("| " + " | ".join(part.replace("|", r"\|") for part in (f"`{each.name}`", shown, docs[each.name])) + " |")
    return "\n".join(rows)


def with_tables(text):
    """A page with each table of fields as the code has it."""

    def section(found):
        return f"<!-- fields of rc.{found[1]} -->\n{table_of_fields(getattr(rc, found[1]))}\n<!-- end -->"

    return re.sub(r"<!-- fields of rc\.(\w+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that has only `examples` in it; models and data are small there."""
    from recontrol.data import prompts
    from recontrol.studies import run

    load = prompts.load_prompts

    def few(source, *arguments, limit=None, **options):
        most = TRAIN_PROMPTS if "train" in str(source) else PROMPTS
        return load(source, *arguments, limit=min(limit or most, most), **options)

    small = {(module, name): capped(getattr(importlib.import_module(module), name), setting, most) for module, name, setting, most in CAPPED}
    for (module, name), function in {**small, ("recontrol.data.prompts", "load_prompts"): few}.items():
        monkeypatch.setattr(f"{module}.{name}", function)
        if hasattr(run, name):
            monkeypatch.setattr(run, name, function)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_in_the_order_of_the_page(page, folder, capsys, monkeypatch):
    """Python runs in one namespace, commands run unless they need the hub or a server, and a block that begins with a file's name is written to it."""
    from recontrol.cli import main

    for package in NEEDED.get(page, ()):
        pytest.importorskip(package, reason=f"{package} is not installed; it is in an extra")
    # A command that names a function puts the folder on the path for good; here it goes again.
    monkeypatch.syspath_prepend(folder)
    text = text_of(page)
    namespace = {"__name__": "page"}
    for line, code in fences(text, "python", "sh", "yaml"):
        language = text.splitlines()[line - 2].removeprefix("```")
        if language == "python":
            # Empty lines before it, so that a traceback shows the line of the page.
            exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), namespace)
        elif language == "yaml":
            if named := re.match(r"# (\S+\.yaml)\n", code):
                Path(named[1]).write_text(code, encoding="utf-8")
        else:
            for words in filter(is_run, commands(code)):
                with pytest.raises(SystemExit) as ended:
                    main(words)
                assert ended.value.code == 0, f"{page}, line {line}: recontrol {shlex.join(words)}\n{capsys.readouterr().err[-2000:]}"
    for left in LEFT.get(page, ()):
        assert (folder / left).is_file(), f"{page} names {left}, which is not there"


def test_commands_that_run_here_are_separated_from_those_that_need_more():
    run = [
        words[0]
        for page in ("guide.md", "study.md", "files.md", "large-models.md", "serving.md", "training.md")
        for _, block in fences(text_of(page), "sh")
        for words in commands(block)
        if is_run(words)
    ]
    assert run == ["info", "collect", "train", "evaluate", "judge", "generate", "evaluate", "generate", "train", "train"]


def test_options_exist(capsys, monkeypatch):
    """The `--help` of a command has every `--option` of the pages, also of commands that are not run."""
    found = [(page, words) for page in PAGES for _, block in fences(text_of(page), "sh") for words in commands(block)]
    assert {words[0] for _, words in found} >= {"collect", "train", "evaluate", "generate", "serve", "judge"}
    helps = {name: set(re.findall(r"--[a-z][\w-]*", help_of([name], capsys, monkeypatch))) for name in {words[0] for _, words in found}}
    unknown = [
        f"{page}: recontrol {words[0]} {word}"
        for page, words in found
        for word in words[: words.index("--") if "--" in words else None]
        if word.startswith("--") and word.split("=")[0] not in helps[words[0]]
    ]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES)
def test_studies_can_be_read(page):
    for line, code in fences(text_of(page), "yaml"):
        made = make_study(yaml.safe_load(code), f"{page}, line {line}")
        assert read_entries(made.methods)


def test_the_keys_of_a_study_are_those_of_the_code():
    """Tables and examples name every key and every method. Sections are found as dataclasses, so a new one cannot be forgotten."""
    text = text_of("study.md")
    sections = [each for each in vars(study).values() if dataclasses.is_dataclass(each) and each.__module__ == study.__name__]
    keys = {field.name for section in sections for field in dataclasses.fields(section)}
    # Keys of the study, of a source of prompts, and of the win rate.
    assert keys >= {"model", "limit", "against"}
    assert sorted(key for key in keys if f"`{key}`" not in text) == []
    rows = dict(re.findall(r"^\| ((?:`[\w -]+`(?:, )?)+) \| (.*) \|$", text, re.MULTILINE))
    documented = {kind: settings for kinds, settings in rows.items() for kind in re.findall(r"`([^`]+)`", kinds)}
    for name, kind in KINDS.items():
        assert [setting for setting in (*kind.strengths, *kind.options) if setting != "*" and setting not in documented[name]] == [], name
    shown = {part for _, code in fences(text, "yaml") for entry in read_entries(make_study(yaml.safe_load(code)).methods) for part in entry.kinds}
    assert shown == KINDS.keys() - {"grpo"}


def test_the_tables_of_settings_are_those_of_the_code():
    """`PYTHONPATH=. python tests/test_docs_pages.py` rewrites them."""
    text = text_of("settings.md")
    assert {"Control", "Decoding", "TrainConfig"} <= set(re.findall(r"<!-- fields of rc\.(\w+) -->", text))
    assert with_tables(text) == text


def test_links_lead_somewhere():
    """Relative links, to files and to headings of pages."""
    broken = []
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text_of(page)):
            path = DOCS / (target or page)
            if re.match(r"[a-z]+:", target):
                continue
            found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
            anchors = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in found or []]
            if found is None or (heading and heading not in anchors):
                broken.append(f"{page}: {target}#{heading}")
    assert broken == []


def test_files_and_functions_that_the_architecture_names_exist():
    """Each name in backticks is a file of the package, or is defined in one of the files named beside it."""
    text = text_of("architecture.md").split("## The path of a token")[1]
    package = ROOT / "recontrol"
    names = set(re.findall(r"`([\w./]+\.(?:py|h|cpp|cu))`", text))
    tried = [[*ROOT.glob(name), *package.glob(name), *package.glob(f"*/{name}")] for name in sorted(names)]
    assert len(names) > 15 and [name for name, found in zip(sorted(names), tried, strict=True) if not found] == []
    sources = {path: path.read_text(encoding="utf-8") for found in tried for path in found}
    defined = {
        node.name
        for path, source in sources.items()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    kernel = (ROOT / "csrc" / "cpu" / "two_layers.h").read_text(encoding="utf-8")
    defined |= set(re.findall(r"\b(?:void|int|float) (\w+)\(", kernel))
    # Methods and private functions: names that only our own code defines.
    called = set(re.findall(r"`(?:\w+\.)?(_\w+)`", text)) | set(re.findall(r"`(\w+)`(?=[^|]*\|\n)", text.split("## The recursion")[1]))
    assert len(called) > 10 and sorted(called - defined - {"Prepared", "PreparedCache", "gram"}) == []


def test_everything_public_is_mentioned():
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.glob("*.md")))
    assert [name for name in (*rc.__all__, *methods.__all__) if not re.search(rf"(?<![\w]){name}(?![\w])", texts)] == []


def test_pages_are_short():
    """Split a longer page."""
    assert {page: count for page in PAGES if (count := len(text_of(page).splitlines())) > 160} == {}


if __name__ == "__main__":
    (DOCS / "settings.md").write_text(with_tables(text_of("settings.md")), encoding="utf-8")
