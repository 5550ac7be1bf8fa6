"""Running a study on small random models: every step, the choice among settings, and going on."""

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors import safe_open

import recontrol.studies.study
from recontrol.evaluation.results import choose
from recontrol.studies.dry_run import COUNTS, NEW_TOKENS, WIDTH, small
from recontrol.studies.run import StudyRun, timed
from recontrol.studies.study import WinSection, load_study

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}
# More than the studies of the package ask for: what is trained on the spot, and what chooses between responses.
METHODS = [
    {"method": "re-control", "name": "steered", "alpha": [0.5, 1.0], "n": 5},
    {"method": "static editing", "name": "moved", "strength": [0.05, 0.2]},
    {"method": "static editing", "name": "moved by means", "direction": "mean-difference", "strength": 0.1},
    {"method": "prompting + re-control", "name": "both", "examples": 1, "alpha": 1.0, "n": 5},
    {"method": "prefix scorer", "strength": 2.0, "k": 3},
    {"method": "args", "w": 1.0, "k": 3},
    {"method": "best-of-n", "n": 2},
    {"method": "dpo", "beta": 0.1},
    {"method": "rloo", "beta": 0.1, "samples": 2},
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small one of the first architecture, sampled, with every method."""
    made = small(load_study("hh-rlhf-vicuna-7b"), tmp_path_factory.mktemp("made-up"))
    options = dataclasses.replace(made.generation, options=SAMPLING)
    methods = [{**entry, **({"batch_size": 4, "rank": 2} if entry["method"] in ("dpo", "rloo") else {})} for entry in METHODS]
    return dataclasses.replace(made, generation=options, methods=methods, seeds=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def findings(study, folder):
    return StudyRun(study, folder, progress=False).findings()


def test_every_method_is_chosen_on_validation_prompts_and_reported_on_test_prompts(study, findings):
    assert findings.names == ["uncontrolled", "steered", "moved", "moved by means", "both", "prefix scorer", "args", "best-of-n", "dpo", "rloo"]
    assert len(findings.prompts) == COUNTS["test"]
    assert all(len(result.responses) == COUNTS["test"] * 2 and result.seeds == 2 for result in findings.results)
    assert len(findings.validation) == 1 + 11 and findings.groups["steered"] == [1, 2] and findings.groups["moved"] == [3, 4]
    for name, group in findings.groups.items():
        best = choose([findings.validation[index] for index in group])
        assert findings.results[findings.names.index(name)].method == best.method
    kinds = [result.kind for result in findings.results]
    assert kinds == [
        "uncontrolled",
        "RE-Control",
        "static editing",
        "static editing",
        "prompting + RE-Control",
        "prefix scorer",
        "ARGS",
        "best-of-n",
        "LoRA DPO",
        "LoRA RLOO",
    ]


def test_what_was_trained_is_told(findings, folder):
    by_name = dict(zip(findings.names, findings.results, strict=True))
    value = by_name["steered"].training
    assert value.parameters == 32 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + WIDTH + 1 and value.seconds > 0 and value.peak_bytes is not None
    assert by_name["prefix scorer"].training == value and by_name["args"].training.parameters == 0
    assert by_name["dpo"].training.parameters > 0 and by_name["dpo"].training.seconds > 0
    assert json.loads((folder / "seconds.json").read_text())["train"] == {"seconds": value.seconds, "finished": True}


def test_a_finished_study_is_read_and_not_run_again(study, folder, findings, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("there was nothing to do")

    monkeypatch.setattr("recontrol.decoding.batches.respond", never)
    monkeypatch.setattr("recontrol.methods.base.generate_batch", never)
    again = StudyRun(study, folder, progress=False).findings()
    assert again.results == findings.results and again.groups == findings.groups


def test_a_study_with_another_seed_does_not_go_on_with_this_one(study, folder, findings):
    with pytest.raises(ValueError, match="another seed"):
        StudyRun(dataclasses.replace(study, seed=1), folder, progress=False).findings()


def test_the_rule_of_choice_is_the_study_s(study, folder, findings):
    def chosen(rule):
        found = StudyRun(dataclasses.replace(study, choose=rule, methods=[study.methods[0], study.methods[1]]), folder, progress=False).findings()
        return [found.validation[group[0]] for group in found.groups.values()], found

    _, by_reward = chosen("reward")
    for name, group in by_reward.groups.items():
        rewards = {by_reward.validation[index].method: by_reward.validation[index].reward for index in group}
        assert by_reward.results[by_reward.names.index(name)].method == max(rewards, key=rewards.get)
    kls = [findings.validation[index].kl for index in findings.groups["moved"]]
    assert kls[0] < kls[1]
    # A budget that only the weaker setting keeps.
    _, within = chosen({"kl": (kls[0] + kls[1]) / 2})
    assert within.results[within.names.index("moved")].settings["strength"] == 0.05


def test_win_rates_against_the_uncontrolled_model_and_against_preferred_ones(study, folder, findings, tmp_path, monkeypatch):
    (tmp_path / "scores_of_words.py").write_text("def score(prompts, responses):\n    return [len(text.split()) for text in responses]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    few = dataclasses.replace(study, methods=study.methods[:1])
    against = StudyRun(dataclasses.replace(few, wins=WinSection("python:scores_of_words:score")), folder, progress=False).findings()
    assert against.against == "uncontrolled" and against.wins[0] is None
    base, steered = ([len(text.split()) for text in result.responses] for result in against.results)
    wins = [1 if one > other else 0.5 if one == other else 0 for one, other in zip(steered, base, strict=True)]
    assert against.wins[1].rate == pytest.approx(sum(wins) / len(wins))
    referred = StudyRun(dataclasses.replace(few, wins=WinSection("python:scores_of_words:score", "preferred")), folder, progress=False).findings()
    lines = [json.loads(line) for line in Path(study.prompts.test.source).read_text(encoding="utf-8").splitlines()]
    lengths = [len(line["chosen"].rpartition("Assistant:")[2].split()) for line in lines] * 2
    assert referred.against == "preferred" and lengths != base
    for result, found in zip(referred.results, referred.wins, strict=True):
        assert found.verdicts == [1 if len(one.split()) > n else 0.5 if len(one.split()) == n else 0 for one, n in zip(result.responses, lengths, strict=True)]


def test_a_value_function_that_is_there_is_taken(study, folder, findings, tmp_path):
    given = dataclasses.replace(study, value=str(folder / "value"), methods=study.methods[:1])
    found = StudyRun(given, tmp_path, progress=False).findings()
    assert found.results[1].responses == findings.results[1].responses
    assert not (tmp_path / "rollouts").exists() and found.results[1].training.seconds is None
    with pytest.raises(ValueError, match="a study with a value function of its own collects none"):
        StudyRun(dataclasses.replace(given, methods=[study.methods[1]]), tmp_path / "other", progress=False).findings()


def test_what_nobody_needs_is_not_collected(study, tmp_path):
    found = StudyRun(dataclasses.replace(study, methods=[{"method": "best-of-n", "n": 2}], seeds=1), tmp_path, progress=False).findings()
    assert found.names == ["uncontrolled", "best-of-n"] and not (tmp_path / "rollouts").exists()


def test_prompts_that_are_reported_on_are_not_for_choosing(study, tmp_path):
    same = dataclasses.replace(study, prompts=dataclasses.replace(study.prompts, validation=study.prompts.test))
    with pytest.raises(ValueError, match=r"prompts\.validation are the prompts that are reported on"):
        StudyRun(same, tmp_path, progress=False).findings()


def test_a_mistake_in_an_entry_is_found_before_anything_is_loaded(study, tmp_path, monkeypatch):
    monkeypatch.setattr(recontrol.studies.study, "load_reward", lambda *arguments, **options: pytest.fail("something was loaded"))
    with pytest.raises(ValueError, match="no setting 'alfa'"):
        StudyRun(dataclasses.replace(study, methods=[{"method": "re-control", "alfa": 1}]), tmp_path, progress=False).findings()


def test_seconds_of_tries_that_were_stopped_count(tmp_path):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timed(tmp_path, "step", stopped)
    first = json.loads((tmp_path / "seconds.json").read_text())["step"]
    assert first["seconds"] > 0 and not first["finished"]
    result, seconds = timed(tmp_path, "step", lambda: "done")
    assert result == "done" and seconds > first["seconds"]
    # Reading what is finished takes no time of the step.
    assert timed(tmp_path, "step", lambda: "read") == ("read", seconds)


def test_small_studies_keep_what_they_try(tmp_path):
    whole = load_study("shp-llama3-8b")
    made = small(whole, tmp_path)
    assert made.generation.stop_strings == ("\n\nHuman:", "\nHuman:", "Human:") and made.generation.max_new_tokens == NEW_TOKENS
    assert [entry["method"] for entry in made.methods] == [entry["method"] for entry in whole.methods]
    assert made.methods[0] == whole.methods[0] and made.train["hidden_dims"] == [WIDTH]
    with safe_open(tmp_path / "reward-0" / "model.safetensors", "pt") as file:
        assert "regression_head.weight" in file.keys()  # noqa: SIM118
    assert set(json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])) == {"history", "human_ref_A", "human_ref_B", "labels"}
