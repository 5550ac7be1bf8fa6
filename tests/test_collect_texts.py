import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recontrol.data.collect import collect, collect_pairs, collect_texts
from recontrol.data.prompts import Preference, load_pairs
from recontrol.training.objectives.preference import preference_pairs

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "movie_reviews"
DATA = ROOT.parent / "shared" / "data"
EOS = 2
PROMPTS = ["This film", "I saw it with my friends, and", "This film", "The"]
RESPONSES = [" is good.", " it was the worst of the year!", " is bad, and far too long for what it says.", " end"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    # In float64, where padding changes no more than rounding.
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, eos_token_id=EOS, pad_token_id=0)).double().eval()


def lengths_of(prompts, responses):
    return [float(len(response)) for response in responses]


def responses_of(rollouts):
    states, lengths, _ = rollouts.batch(range(len(rollouts)))
    ids = rollouts.token_ids(range(len(rollouts)))
    return list(zip(rollouts.records(), states.split(lengths.tolist()), ids.split(lengths.tolist()), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_states_are_those_that_would_have_sampled_the_tokens(model, tokenizer, tmp_path, append_eos, side):
    tokenizer.padding_side = side
    rollouts = collect_texts(model, tokenizer, PROMPTS, RESPONSES, tmp_path / "r", rewards=[1, 2, 3, 4], append_eos=append_eos, batch_size=3, progress=False)
    assert rollouts.rewards[:, 0].tolist() == [1, 2, 3, 4]
    assert rollouts.groups.tolist() == [0, 1, 0, 3]
    for place, (record, states, ids) in enumerate(responses_of(rollouts)):
        prompt = tokenizer(PROMPTS[place]).input_ids
        new = tokenizer(RESPONSES[place], add_special_tokens=False).input_ids
        assert ids.tolist() == new + [EOS] * append_eos
        assert (record["prompt"], record["response"], record["finish"]) == (PROMPTS[place], RESPONSES[place], "eos" if append_eos else "length")
        with torch.no_grad():
            whole = model(torch.tensor([prompt + ids.tolist()]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(states, whole[len(prompt) - 1 : -1], rtol=1e-10, atol=1e-10)
    assert not model.lm_head._forward_pre_hooks


def test_texts_have_the_states_that_sampling_them_had(model, tokenizer, tmp_path):
    sampled = collect(model, tokenizer, PROMPTS[:2], lengths_of, tmp_path / "s", max_new_tokens=6, progress=False)
    texts = [record["response"] for record in sampled.records()]
    given = collect_texts(model, tokenizer, PROMPTS[:2], texts, tmp_path / "t", reward=lengths_of, append_eos=False, progress=False)
    compared = 0
    for (_, states, ids), (_, others, other_ids) in zip(responses_of(sampled), responses_of(given), strict=True):
        # Sampled tokens need not be those that the tokenizer cuts the text into.
        if torch.equal(ids, other_ids):
            compared += 1
            torch.testing.assert_close(states, others, rtol=1e-10, atol=1e-10)
    assert compared
    assert torch.equal(sampled.rewards, given.rewards)


def test_logits_are_made_at_one_position_only(model, tokenizer, tmp_path):
    widths = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    try:
        collect_texts(model, tokenizer, PROMPTS, RESPONSES, tmp_path / "r", reward=lengths_of, batch_size=2, progress=False)
    finally:
        hook.remove()
    assert widths == [1, 1]


def test_long_responses_are_cut_and_the_cut_text_is_scored(model, tokenizer, tmp_path, caplog):
    cut = collect_texts(model, tokenizer, PROMPTS, RESPONSES, tmp_path / "r", reward=lengths_of, max_new_tokens=4, progress=False)
    for (record, _, ids), text in zip(responses_of(cut), RESPONSES, strict=True):
        whole = [*tokenizer(text, add_special_tokens=False).input_ids, EOS]
        assert ids.tolist() == whole[:4]
        assert record["finish"] == ("eos" if len(whole) <= 4 else "length")
        assert text.startswith(record["response"]) and record["reward"] == [float(len(record["response"]))]
    assert [record["response"] for record in cut.records()] != RESPONSES
    longer = sum(len(tokenizer(text, add_special_tokens=False).input_ids) + 1 > 4 for text in RESPONSES)
    assert f"{longer} of {len(RESPONSES)} responses are longer than max_new_tokens, 4, and are cut there" in caplog.text


def test_batches_are_packed_and_a_run_is_resumed(model, tokenizer, tmp_path):
    options = {"rewards": [[1, 0], [2, 0], [3, 0], [4, 1]], "cache_budget": 40_000, "progress": False}
    rollouts = collect_texts(model, tokenizer, PROMPTS, RESPONSES, tmp_path / "r", **options)
    assert rollouts.manifest["num_shards"] > 1 and rollouts.num_heads == 2
    records = list(rollouts.records())
    assert {RESPONSES.index(record["response"]): record["reward"][0] for record in records} == {0: 1, 1: 2, 2: 3, 3: 4}
    wanted = {path.name: path.read_bytes() for path in rollouts.path.iterdir()}
    (rollouts.path / "shard-00001.safetensors").unlink()
    collect_texts(model, tokenizer, PROMPTS, RESPONSES, tmp_path / "r", **options)
    assert {path.name: path.read_bytes() for path in rollouts.path.iterdir()} == wanted
    with pytest.raises(ValueError, match="another rewards_sha256"):
        collect_texts(model, tokenizer, PROMPTS, RESPONSES, tmp_path / "r", **{**options, "rewards": [[1, 0]] * 4})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"responses": RESPONSES[:3]}, ValueError, "found 3 responses to 4 prompts"),
        ({"rewards": [1.0, 2.0, 3.0]}, ValueError, "found 3, wanted 4"),
        ({"rewards": [1.0, 2.0, 3.0, float("nan")]}, ValueError, r"NaN or infinity for responses \[3\]"),
        ({"rewards": [[1.0], [2.0], [3.0], [4.0, 5.0]]}, ValueError, "same number of scores"),
        ({"rewards": None}, ValueError, "either reward"),
        ({"reward": lengths_of}, ValueError, "either reward"),
        ({"responses": [" a", " b", None, " c"]}, TypeError, "found NoneType at 2"),
        ({"responses": [" a", "", " b", ""], "append_eos": False}, ValueError, "2 responses have no tokens: 1, 3"),
        ({"responses": [" a", " b", " word" * 150, " c"]}, ValueError, r"1 prompts with their responses are longer .* context of 128: 2 \(\d+ tokens\)"),
        ({"prompts": [], "responses": [], "rewards": []}, ValueError, "no prompts"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"storage": "int3"}, ValueError, "unknown storage"),
    ],
)
def test_texts_that_cannot_be_are_refused_before_any_work(model, tokenizer, tmp_path, change, error, message):
    arguments = {"prompts": PROMPTS, "responses": RESPONSES, "rewards": [1.0, 2.0, 3.0, 4.0], "progress": False, **change}
    with pytest.raises(error, match=message):
        collect_texts(model, tokenizer, out=tmp_path / "r", **arguments)
    assert not (tmp_path / "r").exists()


def test_a_model_without_an_end_of_sequence_needs_no_one_to_append_it(model, tokenizer, tmp_path):
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [7, 9]
    try:
        ids = collect_texts(model, tokenizer, ["This"], [" film"], tmp_path / "r", rewards=[0.0], progress=False).token_ids([0])
        assert ids[-1] == 7
    finally:
        model.generation_config.eos_token_id = eos


PAIRS = [Preference(PROMPTS[1], RESPONSES[1], " it was"), Preference(PROMPTS[0], RESPONSES[0], RESPONSES[2]), Preference(PROMPTS[1], " we left.", " we did")]


@pytest.mark.parametrize("budget", [None, 60_000])
def test_pairs_are_side_by_side_and_training_finds_them(model, tokenizer, tmp_path, budget):
    rollouts = collect_pairs(model, tokenizer, PAIRS, tmp_path / "r", cache_budget=budget, progress=False)
    assert budget is None or rollouts.manifest["num_shards"] > 1
    records = list(rollouts.records())
    assert [record["preference"] for record in records] == ["chosen", "rejected"] * 3
    assert rollouts.rewards[:, 0].tolist() == [1, 0] * 3
    for chosen, rejected in zip(records[::2], records[1::2], strict=True):
        pair = PAIRS[chosen["pair"]]
        assert chosen["pair"] == rejected["pair"] and (chosen["prompt"], chosen["response"], rejected["response"]) == pair
        # Two pairs with one prompt are one group.
        assert chosen["index"] == rejected["index"] == (1 if chosen["pair"] == 1 else 0)
    found = {(records[chosen]["response"], records[rejected]["response"]) for chosen, rejected, _ in preference_pairs(rollouts)[0].tolist()}
    assert found == {pair[1:] for pair in PAIRS}


def test_pairs_are_scored_by_a_reward_if_one_is_given(model, tokenizer, tmp_path):
    rollouts = collect_pairs(model, tokenizer, PAIRS, tmp_path / "r", reward=lengths_of, progress=False)
    assert rollouts.rewards[:, 0].tolist() == [float(len(record["response"])) for record in rollouts.records()]
    assert rollouts.manifest["reward"] == "lengths_of"


def test_equal_pairs_are_refused_or_left_out(model, tokenizer, tmp_path):
    pairs = [*PAIRS, Preference("This", " film", " film"), Preference("This", " film is good", " film is bad")]
    with pytest.raises(ValueError, match=r"found 1 pairs whose chosen and rejected response are the same.*: 3; "):
        collect_pairs(model, tokenizer, pairs, tmp_path / "r", progress=False)
    # Cut to two tokens, others are equal too.
    with pytest.raises(ValueError, match=r"found 3 pairs whose chosen and rejected response are the same.*: 0, 3, 4; "):
        collect_pairs(model, tokenizer, pairs, tmp_path / "r", max_new_tokens=2, progress=False)
    assert not (tmp_path / "r").exists()
    left = collect_pairs(model, tokenizer, pairs, tmp_path / "r", max_new_tokens=2, skip_equal=True, progress=False)
    assert [record["pair"] for record in left.records()] == [1, 1, 2, 2] and left.manifest["left_out"] == 3
    with pytest.raises(ValueError, match="no pair of different responses is left"):
        collect_pairs(model, tokenizer, pairs[3:4], tmp_path / "n", skip_equal=True, progress=False)


def write_lines(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"


def test_two_dialogues_share_a_prompt(tmp_path):
    rows = [
        {"chosen": START + " Good.", "rejected": START + " Bad."},
        # They part in an earlier turn.
        {"chosen": START + " Good.", "rejected": "\n\nHuman: Hi\n\nAssistant: Hey.\n\nHuman: What?\n\nAssistant: Bad."},
        {"chosen": START + " Good.\n\nHuman: More\n\nAssistant: Yes", "rejected": START + " Good.\n\nHuman: More\n\nAssistant: No"},
    ]
    pairs = load_pairs(write_lines(tmp_path / "p.jsonl.gz", rows))
    assert pairs[0] == (START, " Good.", " Bad.")
    assert pairs[1].prompt == "\n\nHuman: Hi\n\nAssistant:" and pairs[1].rejected == " Hey.\n\nHuman: What?\n\nAssistant: Bad."
    assert pairs[2] == (START + " Good.\n\nHuman: More\n\nAssistant:", " Yes", " No")
    assert load_pairs(tmp_path / "p.jsonl.gz", limit=1, human="User")[0].prompt == START.replace("Human:", "User:")


def test_questions_with_two_answers_and_plain_pairs(tmp_path):
    answers = {"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No idea."}
    pairs = load_pairs(write_lines(tmp_path / "shp.jsonl", [{**answers, "labels": 1}, {**answers, "labels": 0}]))
    prompt = "Human: Why?\nAssistant:"
    assert pairs == [(prompt, " Because.", " No idea."), (prompt, " No idea.", " Because.")]
    rows = [{"prompt": "Q", "chosen": " a", "rejected": " b", "id": 3}]
    assert load_pairs(write_lines(tmp_path / "plain.jsonl", rows)) == [("Q", " a", " b")]


def test_equal_pairs_of_a_file_are_named_by_their_lines(tmp_path, caplog):
    good = {"prompt": "Q", "chosen": " a", "rejected": " b"}
    path = write_lines(tmp_path / "p.jsonl", [good, {**good, "rejected": " a"}, good, {**good, "chosen": " b"}])
    with pytest.raises(ValueError, match=r"p\.jsonl: found 2 pairs whose chosen and rejected response are the same.*: line 2, line 4; .*skip_equal=True"):
        load_pairs(path)
    assert len(load_pairs(path, skip_equal=True)) == 2
    assert "left out 2 pairs" in caplog.text
    assert len(load_pairs(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], r"no pairs: beside prompt it must have the columns chosen, rejected; found \['prompt'\]"),
        ([{"prompt": "", "chosen": "a", "rejected": "b"}], "line 1 must have text in its column prompt"),
        ([{"prompt": "a", "chosen": "a", "rejected": None}], "line 1 must have text in its columns rejected"),
        ([{"chosen": "no dialogue", "rejected": "none"}], "line 1: two dialogues must begin alike"),
        ([{"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 2}], "line 1: labels must be 1.* found 2"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "1 pairs whose"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(write_lines(tmp_path / "p.jsonl", rows))


def test_long_prompts_are_left_out_and_templates_rendered(tokenizer, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"chosen": START + " Good.", "rejected": START + " Bad. "}])
    with pytest.raises(ValueError, match=r"no prompt of at most 3 tokens \(1 are longer\)"):
        load_pairs(path, tokenizer=tokenizer, max_prompt_tokens=3)
    with pytest.raises(ValueError, match="need the tokenizer"):
        load_pairs(path, max_prompt_tokens=3)
    with pytest.raises(ValueError, match="no chat template"):
        load_pairs(path, tokenizer=tokenizer, chat_template=True)
    chat = AutoTokenizer.from_pretrained(EXAMPLE / "lm")
    chat.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    assert load_pairs(path, tokenizer=chat, chat_template=True) == [("[user]Hi[assistant]Hello.[user]And?[assistant]", "Good.", "Bad.")]


@pytest.mark.shared
@pytest.mark.skipif(not DATA.exists(), reason="the real data lines are not beside this checkout")
def test_the_real_comparisons(model, tokenizer, tmp_path):
    pairs = load_pairs(DATA / "hh-rlhf-harmless-test.jsonl.gz")
    assert len(pairs) == 2312
    assert all(pair.prompt.endswith("\n\nAssistant:") and pair.chosen != pair.rejected for pair in pairs)
    short = [pair for pair in pairs if len(pair.prompt) < 200][:8]
    rollouts = collect_pairs(model, tokenizer, short, tmp_path / "r", max_new_tokens=16, progress=False)
    assert len(rollouts) == 16 and rollouts.rewards.sum() == 8
