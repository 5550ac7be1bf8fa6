"""Settings as dataclasses: the same fields as flags, YAML keys and documentation."""

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from recontrol.configs import add_flags, field_docs, from_flags, from_mapping


@dataclass(frozen=True)
class Inner:
    """A part.

    Args:
        rate: of something.
    """

    rate: float = 0.5


@dataclass(frozen=True)
class Config:
    """An example.

    Args:
        name: what it is called, which may
            take two lines.
        sizes: some numbers.
        kind: one of two.
        limit: at most 100 % of it.
        deep: go on.
        quick: do not wait.
        inner: a part.
        options: anything.

    Raises:
        ValueError: a limit of 13.
    """

    name: str
    sizes: tuple[int, ...] = (4, 2)
    kind: Literal["plain", "fancy"] = "plain"
    limit: int | None = None
    deep: bool = False
    quick: bool = True
    inner: Inner | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.limit == 13:
            raise ValueError("limit must not be 13")


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser, Config, leave_out=("inner", "options"))
    return parser, from_flags(Config, parser.parse_args(arguments))


def test_the_docstring_documents_the_fields():
    docs = field_docs(Config)
    assert docs["name"] == "what it is called, which may take two lines." and "ValueError" not in docs
    assert list(docs) == ["name", "sizes", "kind", "limit", "deep", "quick", "inner", "options"]


def test_flags_become_the_config():
    _, config = parsed("--name", "x", "--sizes", "1,2,3", "--kind", "fancy", "--limit", "7", "--deep", "--no-quick")
    assert config == Config("x", (1, 2, 3), "fancy", 7, deep=True, quick=False)


def test_what_is_not_given_has_the_default_of_the_field():
    assert parsed("--name", "x")[1] == Config("x")


def test_help_says_what_the_docstring_says():
    text = " ".join(parsed("--name", "x")[0].format_help().split())
    assert "--sizes SIZES some numbers. (default: 4,2)" in text and "at most 100 % of it. (default: none)" in text and "{plain,fancy}" in text


@pytest.mark.parametrize("arguments", [[], ["--name", "x", "--kind", "other"], ["--name", "x", "--sizes", "1,b"], ["--name", "x", "--limit", "1.5"]])
def test_wrong_flags_end_the_program(arguments, capsys):
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert "error" in capsys.readouterr().err


def test_a_mapping_becomes_the_config():
    content = {"name": "x", "sizes": [1, 2], "limit": None, "inner": {"rate": 1}, "options": {"a": [1]}}
    found = from_mapping(Config, content, "file.yaml")
    assert found == Config("x", (1, 2), inner=Inner(1.0), options={"a": [1]}) and type(found.inner.rate) is float


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"f must be a mapping of names to settings, found list"),
        ({"name": "x", "other": 1}, r"f: found other, wanted some of name, sizes, kind"),
        ({}, r"f: name must be given"),
        ({"name": 1}, r"f: name must be str, found 1"),
        ({"name": "x", "sizes": 4}, r"f: sizes must be list, found 4"),
        ({"name": "x", "sizes": [1, "b"]}, r"f: sizes\[1\] must be int, found 'b'"),
        ({"name": "x", "limit": True}, r"f: limit must be int, found True"),
        ({"name": "x", "kind": "other"}, r"f: kind must be 'plain' or 'fancy', found 'other'"),
        ({"name": "x", "inner": {"speed": 1}}, r"f: inner: found speed, wanted some of rate"),
        ({"name": "x", "limit": 13}, r"f: limit must not be 13"),
    ],
)
def test_what_is_wrong_in_a_mapping_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Config, content, "f")
