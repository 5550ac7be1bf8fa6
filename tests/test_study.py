"""What a study's file may say, and what the studies of the package say."""

import copy
import dataclasses

import pytest
import yaml

from recontrol.decoding.config import Decoding
from recontrol.reports.report_files import as_yaml
from recontrol.studies.catalogue import read_entries
from recontrol.studies.study import SourceSection, load_study, make_study, study_names

SMALL = {
    "model": {"name": "some/model"},
    "prompts": {"train": {"source": "a.jsonl"}, "test": {"source": "b.jsonl", "limit": 3}},
    "reward": {"names": ["some/reward"]},
    "methods": [{"method": "re-control", "alpha": [0.5, 1], "n": 30}],
}
# Kong et al. 2024, appendix: widths of the value net, alpha, n.
PAPER = {
    "hh-rlhf-vicuna-7b": ("lmsys/vicuna-7b-v1.5", "Anthropic/hh-rlhf", "argsearch/llama-7b-rm-float32", [4096, 4096], 0.5, 30),
    "hh-rlhf-falcon-7b": ("tiiuae/falcon-7b-instruct", "Anthropic/hh-rlhf", "argsearch/llama-7b-rm-float32", [4096], 0.2, 200),
    "shp-vicuna-7b": ("lmsys/vicuna-7b-v1.5", "stanfordnlp/SHP", "openbmb/UltraRM-13b", [4096], 1.0, 50),
    "shp-llama3-8b": ("meta-llama/Meta-Llama-3-8B", "stanfordnlp/SHP", "openbmb/UltraRM-13b", [4096], 1.0, 30),
}


def changed(path, entry):
    """The small study with one entry set, or with `...` removed."""
    content = copy.deepcopy(SMALL)
    place = content
    *folders, last = path.split(".")
    for folder in folders:
        place = place[folder]
    if entry is ...:
        del place[last]
    else:
        place[last] = entry
    return content


def test_a_small_study_is_filled_up_with_the_paper_s_settings():
    study = make_study(SMALL)
    assert (study.model.name, study.model.dtype) == ("some/model", "auto")
    assert (study.prompts.test.source, study.prompts.test.limit, study.prompts.validation, study.prompts.max_tokens) == ("b.jsonl", 3, None, 512)
    assert (study.generation.max_new_tokens, study.generation.options, study.choose, study.seeds) == (128, {"do_sample": False}, "paper", 1)
    assert make_study(changed("seeds", 3)).seeds == 3
    assert make_study(changed("choose", {"kl": 5})).choose == {"kl": 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "study must be a mapping of names to settings, found list"),
        (changed("model", ...), "study: model must be given"),
        (changed("model.name", ...), "study: model: name must be given"),
        (changed("prompts.test", ...), "study: prompts: test must be given"),
        (changed("sedes", 3), "study: found sedes, wanted some of model, prompts"),
        (changed("prompts.test.splt", "x"), "study: prompts: test: found splt, wanted some of source, split, limit"),
        (changed("prompts.test.limit", "ten"), "study: prompts: test: limit must be int, found 'ten'"),
        (changed("prompts.test.limit", True), "study: prompts: test: limit must be int, found True"),
        (changed("model", "some/model"), "study: model must be a mapping of names to settings, found str"),
        (changed("reward.names", "some/reward"), "study: reward: names must be list, found 'some/reward'"),
        (changed("reward.names", []), "study: reward: names must have at least one name"),
        (changed("reward.head_weights", ["one"]), r"study: reward: head_weights\[0\] must be float, found 'one'"),
        (changed("seeds", 0), "study: seeds must be at least 1, found 0"),
        (changed("choose", "best"), "study: choose must be 'paper', 'reward' or"),
        (changed("choose", {"kl": -1}), "study: choose must be"),
        (changed("wins", {"judge": "x", "against": "me"}), "study: wins: against must be 'uncontrolled' or 'preferred', found 'me'"),
        (changed("prompts.train", ...), "without a value there must be prompts.train"),
    ],
)
def test_what_a_study_may_not_say(content, message):
    with pytest.raises(ValueError, match=message):
        make_study(content)


def test_how_responses_are_decoded():
    study = make_study(changed("generation", {"max_new_tokens": 7, "stop": ["END"]}))
    assert study.generation == Decoding(7, 16, 0, ["END"], {"do_sample": False})
    assert make_study(changed("generation", {"stop_strings": ["END"]})).generation.stop_strings == ("END",)
    assert make_study(changed("generation", {"batch_size": 2, "options": {"do_sample": True}})).generation == Decoding(
        batch_size=2, options={"do_sample": True}
    )
    # Dialogues end before a further turn of the user, unless something else is said.
    dialogues = {"train": {"source": "a.jsonl"}, "test": {"source": "Anthropic/hh-rlhf"}, "human": "User"}
    content = changed("prompts", dialogues)
    assert make_study(content).generation.stop_strings == ("\n\nUser:", "\nUser:", "User:")
    assert make_study({**content, "generation": {"stop": []}}).generation.stop_strings == ()
    with pytest.raises(ValueError, match="study: generation: found length, wanted some of max_new_tokens"):
        make_study(changed("generation", {"length": 3}))
    with pytest.raises(ValueError, match="study: generation has no seed of its own, found 3: it is that of the study"):
        make_study(changed("generation", {"seed": 3}))


def test_the_old_name_of_preferred_responses_is_taken_and_told():
    with pytest.warns(DeprecationWarning, match="against: references is now against: preferred"):
        study = make_study(changed("wins", {"judge": "x", "against": "references"}))
    assert study.wins.against == "preferred"


def test_a_study_is_the_same_when_it_is_read_from_its_report(tmp_path):
    study = make_study({**SMALL, "generation": {"stop": ["END"]}, "wins": {"judge": "x"}, "report": "all", "choose": {"kl": 2}})
    assert make_study(yaml.safe_load(as_yaml(dataclasses.asdict(study)))) == study


def test_a_study_is_a_file_or_one_of_the_package(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: [}")
    with pytest.raises(ValueError, match=r"mine\.yaml is no YAML"):
        load_study(path)
    path.write_text("model: {name: x}\nprompts: {train: {source: a}, test: {source: b}}\nreward: {names: [r]}\nmethods: []\nseed: 4\n")
    assert load_study(path).seed == 4
    with pytest.raises(FileNotFoundError, match="the package has hh-rlhf-falcon-7b, hh-rlhf-vicuna-7b, shp-llama3-8b, shp-vicuna-7b"):
        load_study("nothing")


@pytest.mark.parametrize("name", PAPER)
def test_the_studies_of_the_package_have_the_paper_s_settings(name):
    assert set(study_names()) == set(PAPER)
    study = load_study(name)
    model, data, reward, widths, alpha, n = PAPER[name]
    assert (study.model.name, study.reward.names, study.prompts.max_tokens, study.generation.max_new_tokens) == (model, [reward], 512, 128)
    assert {part.source for part in (study.prompts.train, study.prompts.validation, study.prompts.test)} == {data}
    assert len({part.split for part in (study.prompts.train, study.prompts.validation, study.prompts.test)}) == 3
    assert study.train == {"hidden_dims": widths, "learning_rate": 1e-4, "batch_size": 512, "epochs": 100}
    controlled = [entry for entry in read_entries(study.methods) if "re-control" in entry.kinds]
    assert [entry.kinds for entry in controlled] == [("re-control",), ("prompting", "re-control")]
    for entry in controlled:
        assert [(settings["alpha"], settings["n"]) for settings in entry.settings] == [(alpha, n)]


def test_entries_are_all_combinations_of_their_lists():
    (entry,) = read_entries([{"method": "re-control", "alpha": [0.5, 1.0], "n": [10, 20], "head_weights": [1, 0]}])
    assert entry.name == "re-control"
    assert [(settings["alpha"], settings["n"]) for settings in entry.settings] == [(0.5, 10), (0.5, 20), (1.0, 10), (1.0, 20)]
    assert all(settings["head_weights"] == [1, 0] for settings in entry.settings)
    together, plain = read_entries(
        [{"method": "prompting + re-control", "name": "both", "template": "Well: {prompt}", "alpha": 1, "n": 3}, {"method": "best-of-n", "n": 4}]
    )
    assert together.name == "both" and together.kinds == ("prompting", "re-control")
    assert plain.settings == ({"n": 4},)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["re-control"], r"methods\[0\] must be a mapping with a method, found 're-control'"),
        ([{"method": "magic"}], r"methods\[0\]: found the method 'magic', wanted one of prompting, re-control"),
        ([{"method": "re-control", "alpha": 1}], r"methods\[0\]: re-control must have n"),
        ([{"method": "re-control", "alpha": [], "n": 3}], "alpha must have at least one number, found an empty list"),
        ([{"method": "args", "w": 1, "alpha": 1}], "args has no setting 'alpha', only w, k"),
        ([{"method": "prompting + best-of-n", "n": 1}], "best-of-n chooses between responses on its own"),
        ([{"method": "args", "w": 1}, {"method": "args", "w": 2}], "two rows are called 'args'"),
    ],
)
def test_what_an_entry_may_not_say(entries, message):
    with pytest.raises(ValueError, match=message):
        read_entries(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {"test": {"source": "t", "limit": 0}, "train": {"source": "t"}}}, "limit must be at least 1, found 0"),
        ({"prompts": {"test": {"source": "t"}, "train": {"source": "t"}, "chat_template": True, "human": "User"}}, "human has no use with chat_template"),
        ({"reward": {"names": ["r"], "judge": {"cache": "c"}}}, "the settings of a judge have no use"),
        ({"reward": {"names": ["judge:gpt"], "template": "{prompt}{response}"}}, "template has no use"),
        ({"wins": {"judge": "a/reward", "cache": "c"}}, "cache and url are of a judge:NAME"),
        ({"seeds_apart": -1}, "seed must be 0 or more"),
    ],
)
def test_settings_without_use_are_refused(change, message):
    study = {
        "model": {"name": "m"},
        "prompts": {"test": {"source": "t"}, "train": {"source": "t"}},
        "reward": {"names": ["r"]},
        "methods": [],
    }
    make_study(study)
    with pytest.raises(ValueError, match=message):
        make_study({**study, **change})


def test_a_part_of_a_file_is_refused(tmp_path):
    """It would be all of it: a file has no splits."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "I"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl is a file and has no splits, found train\[:5\]"):
        SourceSection(str(tmp_path / "p.jsonl"), "train[:5]")
    SourceSection(str(tmp_path / "p.jsonl"), "test")
