import json
import math

import matplotlib.image
import numpy as np
import pytest
from results import result

from recontrol.evaluation.metrics import bootstrap_difference
from recontrol.evaluation.response_files import pair_up, read_responses
from recontrol.reports.report import draw, plot, save_report, table

PROMPTS = ["one", "two", "three"]


@pytest.fixture
def results():
    rows = [result(0.0, 0, [-1.0, 0.0, 0.5])]
    return rows + [result(size, steps, [size * steps / 30, 0.1, 1.0]) for size in (0.25, 0.5, 1.0, 5.0) for steps in (30, 60)]


def test_the_table_is_aligned_and_narrow(results):
    lines = table(results, chosen=(0.5, 30)).splitlines()
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
    assert "chosen" not in table(results, chosen=(0.75, 30))


def test_files_say_what_was_found(results, tmp_path):
    save_report(tmp_path / "new" / "folder", results, PROMPTS, chosen=(0.5, 30), validation=results[:2], about={"model": "some/model"})
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.png", "responses.jsonl"]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["format"] == "recontrol.report" and report["about"] == {"model": "some/model"}
    assert report["chosen"] == {"step_size": 0.5, "steps": 30}
    assert len(report["results"]) == 9 and len(report["validation"]) == 2
    base, first = report["results"][:2]
    assert base["reward"] == results[0].reward and base["reward_interval"] == list(results[0].reward_interval)
    assert base["values"] == results[0].values[:3] and "reward_gain" not in base
    assert first["reward_gain"] == results[1].reward - results[0].reward
    assert first["reward_gain_interval"] == list(bootstrap_difference(results[1].rewards, results[0].rewards))
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 9 * 3
    label = "RE-Control (alpha 0.25, n 30)"
    assert lines[4] == {"method": label, "seed": 0, "index": 1, "prompt": "two", "response": "réponse 1", "reward": 0.1}
    # The texts are not there twice.
    assert "responses" not in base and "rewards" not in base


def lines_of(axis):
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axis.lines}


def test_the_figure_shows_the_numbers(results):
    reward, diversity, nll, values = draw(results, chosen=(0.5, 60)).axes
    for axis, name in ((reward, "reward"), (diversity, "diversity"), (nll, "nll")):
        lines = lines_of(axis)
        assert set(lines) == {"uncontrolled", "30 steps", "60 steps", "chosen"}
        assert lines["uncontrolled"][1] == [getattr(results[0], name)] * 2 and lines["uncontrolled"][2] == "--"
        for steps in (30, 60):
            rows = [row for row in results if row.steps == steps]
            assert lines[f"{steps} steps"][:2] == ([0.25, 0.5, 1.0, 5.0], [getattr(row, name) for row in rows])
        assert lines["chosen"][:2] == ([0.5], [getattr(results[4], name)])
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0.25", "0.5", "1", "5"]
        assert axis.get_title() and axis.get_xlabel()
    # The intervals: one band for each line of the reward, and for nothing else.
    assert (len(reward.collections), len(diversity.collections)) == (2, 0)
    assert lines_of(values)["uncontrolled"][:2] == ([0, 1, 2], [0.0, 0.5, 0.0])
    # V under the chosen setting, not another one.
    assert [list(line.get_ydata()) for line in values.lines][-3:] == [[0.0, 0.5, 0.5]] * 3


def test_a_figure_without_control_and_values():
    axes = draw([result(0.0, 0, [1.0], answers=[])]).axes
    assert set(lines_of(axes[0])) == {"uncontrolled"}
    assert not axes[3].lines and axes[3].get_title() == "V was not recorded"


def test_the_file_is_a_picture_of_it(results, tmp_path):
    plot(results, tmp_path / "figure.png", chosen=(0.5, 30))
    pixels = matplotlib.image.imread(tmp_path / "figure.png")[..., :3]
    assert pixels.shape[:2] == (975, 1430)
    # The ring around the chosen setting, once in each of three panels.
    assert (np.abs(pixels - [0xD5 / 255, 0x5E / 255, 0]) < 0.02).all(-1).sum() > 3 * 50


def test_what_was_not_measured_is_no_line(results, tmp_path):
    rows = [result(row.step_size, row.steps, row.rewards, nll=None, coherence=None) for row in results]
    save_report(tmp_path, rows, PROMPTS)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["chosen"] is None and report["validation"] is None
    assert all(row["nll"] is None for row in report["results"])
    assert not any(isinstance(row["reward"], float) and math.isnan(row["reward"]) for row in report["results"])


def test_an_error_leaves_the_old_report(results, tmp_path, monkeypatch):
    save_report(tmp_path, results, PROMPTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, *arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match=r"could not write .*report\.png"):
        plot(results[:3], tmp_path / "report.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_result_needs_a_response_to_every_prompt(results, tmp_path):
    with pytest.raises(ValueError, match=r"uncontrolled has 3 responses and 3 rewards for 2 prompts and 1 seeds, wanted 2"):
        save_report(tmp_path, results, PROMPTS[:2])


def test_seeds_are_numbered_and_the_lines_can_be_judged(tmp_path):
    rows = [result(0.0, 0, [-1.0, 0.0, 0.5, 1.0, 2.0, 4.0], seeds=2), result(0.5, 30, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], seeds=2)]
    save_report(tmp_path, rows, PROMPTS)
    lines = read_responses(tmp_path / "responses.jsonl", "RE-Control (alpha 0.5, n 30)")
    assert [(line.seed, line.prompt, line.response) for line in lines] == [
        (seed, prompt, f"réponse {3 * seed + index}") for seed in range(2) for index, prompt in enumerate(PROMPTS)
    ]
    prompts, responses, others = pair_up(lines, read_responses(tmp_path / "responses.jsonl", "uncontrolled"))
    assert prompts == PROMPTS * 2 and responses == others
    gained = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["results"][1]
    # Over three prompts whose seeds are averaged, not over six responses.
    assert gained["reward_gain_interval"] == list(bootstrap_difference([1.5, 2.5, 3.5], [0.0, 1.0, 2.25]))
    assert gained["reward_gain_interval"] != list(bootstrap_difference(rows[1].rewards, rows[0].rewards))


def test_numbers_that_json_does_not_have_are_null(results, tmp_path):
    save_report(tmp_path, [results[0], result(0.5, 30, [1.0, 2.0, 3.0], perplexity=math.inf, settings={"radius": math.nan})], PROMPTS)

    def refuse(name):
        raise AssertionError(f"the file has {name}")

    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["results"][1]["perplexity"] is None and report["results"][1]["settings"] == {"radius": None}
    assert report["results"][0]["perplexity"] == 70.0
