"""Checks and words that all rooms share."""

import pytest
import torch

from recontrol.checks import dtype_name, first_few, integer, number, required, several, wide_dtype


def test_long_lists_are_cut():
    assert first_few([1, 2]) == "1, 2" and first_few(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert first_few(list(range(11))) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


@pytest.mark.parametrize("given", [True, "1", None, 1j])
def test_numbers_are_numbers(given):
    with pytest.raises(TypeError, match="x must be a number, found"):
        number("x", given)


@pytest.mark.parametrize("given", [float("nan"), float("inf"), -1.0, 10**400])
def test_numbers_are_in_range(given):
    with pytest.raises(ValueError, match="x must be finite and 0 or more, found"):
        number("x", given, 0)


def test_integers():
    assert integer("x", torch.tensor(3).item()) == 3
    with pytest.raises(TypeError, match=r"must be an integer, found 1\.0"):
        integer("x", 1.0)
    with pytest.raises(ValueError, match="must be 0 or more, found -1"):
        integer("x", -1)


def test_several_takes_no_text():
    assert several("x", torch.tensor([1.0])) == [1.0]
    with pytest.raises(TypeError, match="x must be a sequence of numbers, found 'ab'"):
        several("x", "ab")


def test_dtypes():
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert [wide_dtype(each) for each in (torch.float16, torch.float64)] == [torch.float32, torch.float64]


def test_a_missing_package_names_its_extra():
    assert required("json", "train").dumps(1) == "1"
    with pytest.raises(ImportError, match=r"this needs the package nowhere .*pip install 'recontrol\[report\]'"):
        required("nowhere.figure", "report")
