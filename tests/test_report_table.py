"""The table that the command line prints."""

import pytest
from results import result

from recontrol.reports.table import table


@pytest.fixture
def results():
    rows = [result(0.0, 0, [-1.0, 0.0, 0.5])]
    return rows + [result(size, steps, [size * steps / 30, 0.1, 1.0]) for size in (0.25, 0.5, 1.0, 5.0) for steps in (30, 60)]


def test_the_table_is_aligned_and_narrow(results):
    lines = table(results, ["RE-Control (alpha 0.5, n 30)"]).splitlines()
    body = lines[: 2 + len(results)]
    assert len({len(line) for line in body}) == 1
    assert all(len(line) <= 120 for line in lines)
    assert lines[2].split() == ["uncontrolled", "-0.167", "[-0.667,", "0.333]", "0.910", "0.420", "4.20", "47.5", "1234", "1.00x", "-"]
    assert [line for line in body if "*" in line] == [line for line in body if line.startswith("RE-Control (alpha 0.5, n 30) ")]
    assert "* chosen" in lines[-1]


def test_the_table_shows_what_was_not_measured(results):
    text = table([result(0.0, 0, [1.0], coherence=None, nll=None, tokens_per_second=3.25)])
    assert text.splitlines()[2].split()[4:] == ["0.910", "-", "-", "47.5", "3.2", "1.00x", "-"]
    assert "chosen" not in text
    # A setting that is not among the results is not announced.
    assert "chosen" not in table(results, ["RE-Control (alpha 0.75, n 30)"])
