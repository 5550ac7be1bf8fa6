"""Imports of earlier releases go on working, with a word on what the module is called now."""

import importlib
import sys
import warnings

import pytest

import recontrol as rc
from recontrol.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_module_is_found_under_its_old_name(old):
    sys.modules.pop(old, None)
    new = importlib.import_module(MOVED[old])
    spec = new.__spec__
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        assert importlib.import_module(old) is new
    assert new.__spec__ is spec and new.__name__ == MOVED[old]


def test_it_is_said_once():
    importlib.import_module("recontrol.loading")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module("recontrol.loading")


def test_the_old_name_of_the_oracle():
    # Importing the module of this name, as above, puts it there.
    vars(rc).pop("reference", None)
    with pytest.warns(DeprecationWarning, match=r"recontrol\.reference is now recontrol\.oracle"):
        assert rc.reference is rc.oracle


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("recontrol.nothing")
