"""`Decoding`: one value for the settings of decoding."""

import pytest

from recontrol import Decoding


def test_keywords_that_are_no_field_are_options_of_generate():
    found = Decoding.of(max_new_tokens=4, stop_strings=None, do_sample=True, temperature=0.5)
    assert found == Decoding(4, options={"do_sample": True, "temperature": 0.5})


def test_settings_are_replaced_and_options_are_merged():
    base = Decoding(4, 8, 3, ["."], {"do_sample": True})
    assert Decoding.of(base, seed=5, top_k=2) == Decoding(4, 8, 5, ["."], {"do_sample": True, "top_k": 2})
    assert Decoding.of(base) == base


def test_one_stop_string_is_a_list_of_one():
    assert Decoding(stop_strings="END").stop_strings == ("END",)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, found 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, found 0"),
        ({"seed": -1}, "seed must be 0 or more, found -1"),
        ({"stop_strings": [""]}, "stop_strings must be texts that are not empty"),
    ],
)
def test_what_cannot_be_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        Decoding.of(**keywords)
