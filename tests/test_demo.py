import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "movie_reviews"
SMALL = [
    *("--train-prompts", "24", "--validation-prompts", "4", "--test-prompts", "4", "--new-tokens", "6", "--batch-size", "8"),
    *("--width", "32", "--epochs", "2", "--step-sizes", "0.5", "1", "--steps", "3", "5"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("movie_reviews_demo", EXAMPLE / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_on_few_prompts(demo, tmp_path, capsys):
    status = demo.main(["--out", str(tmp_path), *SMALL])
    out, err = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["step_size"] for row in report["results"]] == [0, 0.5, 1, demo.TOO_LARGE]
    assert [(row["step_size"], row["steps"]) for row in report["validation"]] == [(0, 0), (0.5, 3), (0.5, 5), (1, 3), (1, 5)]
    (chosen,) = [row for row in report["results"] if row["method"] in report["chosen"]]
    assert {row["steps"] for row in report["results"][1:]} == {chosen["steps"]}
    assert (tmp_path / "report.html").stat().st_size > 10_000
    for line in ("uncontrolled ", "controlled ", "too large ", "alpha 5, n", "* chosen"):
        assert line in out
    assert out.count("prompt  ") == 3
    # The exit status says whether control has raised the reward by more than the interval.
    base, best = report["results"][0], chosen
    assert status == (best["reward_interval"][0] <= base["reward_interval"][1]) == ("does not exceed" in err)

    # A second run goes on from what is there: neither rollouts nor value function are made again.
    made = {path: path.stat().st_mtime_ns for path in [*(tmp_path / "rollouts").iterdir(), *(tmp_path / "value").glob("model.safetensors")]}
    assert len(made) > 6
    assert demo.main(["--out", str(tmp_path), *SMALL]) == status
    assert {path: path.stat().st_mtime_ns for path in made} == made
    again = json.loads((tmp_path / "report.json").read_text())
    assert [row["reward"] for row in again["results"]] == [row["reward"] for row in report["results"]]


def test_the_prompts_of_the_three_sets_differ():
    sets = [set((EXAMPLE / f"prompts-{split}.jsonl").read_text().splitlines()) for split in ("train", "validation", "test")]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_the_demo_is_thin():
    assert len((EXAMPLE / "demo.py").read_text().splitlines()) < 150
