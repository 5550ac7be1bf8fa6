import json
from pathlib import Path

import numpy as np
import pytest
import torch
from controlled import Failing, hooks_on, llama, read_states, states_read, unchanged
from generating import TOKENIZER
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import recontrol as rc
import recontrol.training.data
from recontrol.data.collect import collect
from recontrol.data.prompts import load_prompts
from recontrol.data.rewards import RewardModel
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.batches import generate_batch
from recontrol.decoding.fingerprint import model_fingerprint
from recontrol.methods.base import Together, Uncontrolled
from recontrol.methods.control import ReControl
from recontrol.methods.static_editing import Direction, StaticEditing, mean_difference, reward_direction

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
PROMPT = torch.tensor([[5, 9, 31, 7]])


def direction(size=32, seed=3, **provenance):
    torch.manual_seed(seed)
    return Direction(torch.randn(size), "mean difference", provenance)


def stored(path, states, rewards, **options):
    return Rollouts.write(path, states, rewards, shard_size=8, **options)


@pytest.fixture
def data():
    """States of 40 responses far from zero, whose first two coordinates bear the reward."""
    torch.manual_seed(0)
    states = [torch.randn(length, 6) * torch.tensor([1.0, 2.0, 1.0, 1.0, 0.1, 3.0]) + 50 for length in torch.randint(1, 9, (40,)).tolist()]
    rewards = [float(rows[:, 0].mean() - 50 - 0.5 * (rows[:, 1].mean() - 50) + 0.1 * torch.randn(())) for rows in states]
    return states, rewards


def regression_by_rows(states, rewards, ridge):
    """The same minimum by least squares in NumPy: a row of the penalty for each coordinate, and a column of ones for the intercept."""
    rows = np.concatenate([part.double().numpy() for part in states])
    wanted = np.repeat(np.float32(rewards).astype(float), [len(part) for part in states])
    size = rows.shape[1]
    penalty = np.sqrt(len(rows) * ridge * rows.var(0).mean()) * np.eye(size)
    table = np.block([[rows, np.ones((len(rows), 1))], [penalty, np.zeros((size, 1))]])
    weight = np.linalg.lstsq(table, np.concatenate([wanted, np.zeros(size)]), rcond=None)[0]
    explained = 1 - np.mean((rows @ weight[:-1] + weight[-1] - wanted) ** 2) / wanted.var()
    return torch.from_numpy(weight[:-1]), explained, torch.from_numpy(rows).norm(dim=1).mean()


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 30.0])
def test_the_regression_is_the_one_that_least_squares_over_all_rows_gives(tmp_path, data, ridge, monkeypatch):
    rollouts = stored(tmp_path / "rollouts", *data)
    weight, explained, norm = regression_by_rows(*data, ridge)
    found = reward_direction(rollouts, ridge=ridge)
    # One rounding to float32.
    torch.testing.assert_close(found.vector.double(), weight * norm / weight.norm(), rtol=1e-6, atol=1e-5)
    assert found.provenance["explained"] == pytest.approx(explained, abs=1e-9)
    # In parts of a few responses, from a folder.
    monkeypatch.setattr(recontrol.training.data, "TOKENS_AT_ONCE", 10)
    torch.testing.assert_close(reward_direction(rollouts.path, ridge=ridge).vector, found.vector, rtol=1e-6, atol=1e-5)


def test_the_ridge_turns_the_direction_towards_the_covariance_with_the_reward(tmp_path, data):
    rollouts = stored(tmp_path / "rollouts", *data)
    rows = torch.cat(data[0]).double()
    rewards = torch.tensor(data[1]).double().repeat_interleave(rollouts.lengths)
    covariance = (rows - rows.mean(0)).T @ (rewards - rewards.mean())
    cosines = [
        float(torch.cosine_similarity(found.vector.double(), covariance, 0))
        for found in (reward_direction(rollouts, ridge=0.001), reward_direction(rollouts), reward_direction(rollouts, ridge=1e6))
    ]
    assert cosines[0] < cosines[1] - 1e-3 < cosines[2] and cosines[2] == pytest.approx(1, abs=1e-6)


def test_the_mean_difference_is_that_of_the_best_and_the_worst_responses(tmp_path, data):
    states, rewards = data
    rollouts = stored(tmp_path / "rollouts", *data)
    order = sorted(range(40), key=rewards.__getitem__)
    for share, count in ((0.25, 10), (0.5, 20), (0.01, 1)):
        worst, best = (torch.cat([states[index] for index in part]).double() for part in (order[:count], order[-count:]))
        difference, norm = best.mean(0) - worst.mean(0), torch.cat([worst, best]).norm(dim=1).mean()
        found = mean_difference(rollouts, share=share)
        torch.testing.assert_close(found.vector.double(), difference * norm / difference.norm(), rtol=1e-6, atol=1e-5)
    assert torch.equal(mean_difference(rollouts.path).vector, mean_difference(rollouts, share=0.25).vector)


def test_directions_are_as_long_as_a_state_and_point_where_the_reward_rises(tmp_path, data):
    rollouts = stored(tmp_path / "rollouts", *data)
    norm = torch.cat(data[0]).norm(dim=1).mean()
    for found in (reward_direction(rollouts), mean_difference(rollouts)):
        # Those of all states, and of half of them, which differ little.
        assert float(found.vector.norm() / norm) == pytest.approx(1, abs=0.02)
        assert found.vector[0] > 0 > found.vector[1]
    doubled = stored(tmp_path / "doubled", [2 * rows for rows in data[0]], [10 * reward - 3 for reward in data[1]])
    torch.testing.assert_close(reward_direction(doubled).vector, 2 * reward_direction(rollouts).vector, rtol=1e-4, atol=1e-4)


def test_several_rewards_want_weights(tmp_path, data):
    states, rewards = data
    noise = torch.randn(40).tolist()
    both, one = stored(tmp_path / "both", states, list(zip(rewards, noise, strict=True))), stored(tmp_path / "one", states, rewards)
    for find in (reward_direction, mean_difference):
        assert torch.equal(find(both, head_weights=[1, 0]).vector, find(one).vector)
        assert not torch.allclose(find(both, head_weights=[0, 1]).vector, find(one).vector)
        with pytest.raises(ValueError, match="found 2 rewards a response: give head_weights"):
            find(both)


def test_what_gives_no_direction_is_refused(tmp_path, data):
    states, rewards = data
    rollouts = stored(tmp_path / "rollouts", *data)
    with pytest.raises(ValueError, match="ridge must be above 0, found 0"):
        reward_direction(rollouts, ridge=0)
    with pytest.raises(ValueError, match="ridge must be finite and 0 or more, found -1"):
        reward_direction(rollouts, ridge=-1)
    for share in (0, 0.6):
        with pytest.raises(ValueError, match=f"share must be above 0 and at most 0.5, found {share}"):
            mean_difference(rollouts, share=share)
    flat = stored(tmp_path / "flat", states, [1.0] * 40)
    for find in (reward_direction, mean_difference):
        with pytest.raises(ValueError, match=r"all rewards of .*flat are the same"):
            find(flat)
    ties = stored(tmp_path / "ties", states, [0.0] * 35 + [1.0] * 5)
    with pytest.raises(ValueError, match="a reward of 0 is among the worst 10 responses and among the best 10: a smaller share"):
        mean_difference(ties)
    assert mean_difference(ties, share=0.125).hidden_size == 6
    still = stored(tmp_path / "still", [torch.ones(2, 6)] * 40, rewards)
    with pytest.raises(ValueError, match=r"the states of .*still are all the same"):
        reward_direction(still)
    with pytest.raises(ValueError, match=r"the mean difference of .*still is zero"):
        mean_difference(still)


def test_states_that_are_not_finite_are_named(tmp_path, data):
    states, rewards = data
    best = max(range(40), key=rewards.__getitem__)
    states[best][0, 3] = torch.nan
    rollouts = stored(tmp_path / "rollouts", states, rewards)
    with pytest.raises(ValueError, match=rf"found NaN or infinite ones in responses {best} of"):
        mean_difference(rollouts)
    with pytest.raises(ValueError, match=rf"found NaN or infinite ones in responses {best} of"):
        reward_direction(rollouts)


def test_a_direction_reads_back_as_it_was_saved(tmp_path, data):
    fingerprint = model_fingerprint(llama())
    rollouts = stored(tmp_path / "rollouts", *data, base_model=fingerprint)
    found = reward_direction(rollouts, ridge=0.3)
    found.save(tmp_path / "new" / "direction.safetensors")
    again = Direction.load(tmp_path / "new" / "direction.safetensors")
    assert torch.equal(again.vector, found.vector) and again.origin == "reward regression"
    assert again.provenance == json.loads(json.dumps(found.provenance)) and again.provenance["base_model"] == fingerprint
    assert again.provenance["ridge"] == 0.3 and again.provenance["data"] == {"responses": 40, "tokens": rollouts.num_tokens}
    assert StaticEditing(again, 0.2).training == (6, found.provenance["training_seconds"], None)


def test_files_that_hold_no_direction_are_refused(tmp_path):
    path = tmp_path / "direction.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no direction at .*: there is no such file"):
        Direction.load(path)
    direction().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Direction.load(path)
    save_file({"vector": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"holds no direction: found format None, wanted 'recontrol.direction'"):
        Direction.load(path)
    save_file({"vector": torch.ones(3)}, path, metadata={"format": "recontrol.direction", "format_version": "2"})
    with pytest.raises(ValueError, match="has format version '2', this release reads up to 1"):
        Direction.load(path)


def test_what_is_no_direction_is_refused_when_it_is_made():
    for vector in (torch.ones(2, 2), torch.zeros(3), torch.tensor([1.0, torch.inf])):
        with pytest.raises(ValueError, match="a direction must be a finite vector other than zero"):
            Direction(vector, "by hand")
    with pytest.raises(TypeError, match="a direction is a tensor and a text, found list and str"):
        Direction([1.0], "by hand")
    with pytest.raises(TypeError, match="direction must be a Direction, found Tensor"):
        StaticEditing(torch.ones(3), 0.1)
    with pytest.raises(ValueError, match="strength must be finite"):
        StaticEditing(direction(), float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_vector_is_added_to_every_state_that_is_read(dtype):
    model = llama().to(dtype)
    method = StaticEditing(direction(), 0.3)
    plain = read_states(model, input_ids=PROMPT)
    with unchanged(model), method.attach(model):
        edited = read_states(model, input_ids=PROMPT)
        logits = model(PROMPT).logits
    # One rounding of the sum in float32 or float64.
    expected = (plain.double() + (0.3 * method.direction.vector).double()).float().to(dtype)
    torch.testing.assert_close(edited, expected, rtol=2 * torch.finfo(torch.float32).eps if dtype != torch.bfloat16 else 2**-8, atol=1e-6)
    assert torch.equal(edited, method.edit(plain)) and edited.dtype == dtype
    assert torch.equal(logits, model.lm_head(edited.reshape(1, 4, -1)))


def test_the_states_of_generation_are_moved_and_no_key_or_value_is():
    model = llama(eos_token_id=None)
    method = StaticEditing(direction(), 2.0)
    with states_read(model) as plain:
        model.generate(PROMPT, max_new_tokens=1, do_sample=False)
    with method.attach(model), states_read(model) as edited:
        tokens = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
    # Step by step without a cache: what was added before has left no trace.
    with states_read(model) as again:
        model(tokens[:, :-1])
    assert len(edited) == 5 and torch.equal(edited[0], method.edit(plain[0]))
    torch.testing.assert_close(edited[-1], method.edit(again[0]), rtol=1e-5, atol=1e-5)


def test_strength_zero_and_a_paused_hook_change_no_bit():
    model = llama()
    plain = read_states(model, input_ids=PROMPT)
    with StaticEditing(direction(), 0.0).attach(model):
        assert torch.equal(read_states(model, input_ids=PROMPT), plain)
    with StaticEditing(direction(), 0.3).attach(model) as handle:
        assert not torch.equal(read_states(model, input_ids=PROMPT), plain)
        with handle.pause():
            assert torch.equal(read_states(model, input_ids=PROMPT), plain)


def test_a_model_that_it_does_not_fit_is_refused():
    model = llama()
    recorded = direction(base_model=model_fingerprint(llama(seed=1)))
    with unchanged(model):
        with pytest.raises(ValueError, match="the direction is for hidden states of size 8, the output embedding of this LlamaForCausalLM reads size 32"):
            StaticEditing(direction(8), 0.1).attach(model)
        with pytest.raises(ValueError, match="the direction was found in the states of another model: the weights differ"):
            StaticEditing(recorded, 0.1).attach(model)
    for allowed in (StaticEditing(recorded, 0.1, allow_other_model=True), StaticEditing(direction(base_model=model_fingerprint(model)), 0.1)):
        with unchanged(model), allowed.attach(model):
            assert hooks_on(model)


def test_one_editor_at_a_time_and_edits_must_reach_the_logits(monkeypatch):
    model = llama()
    method = StaticEditing(direction(), 0.1)
    torch.manual_seed(1)
    control = ReControl(rc.Control(rc.ValueFunction(32, (8,))))
    for pair in ([method, control], [control, method]):
        with unchanged(model), pytest.raises(RuntimeError, match="attached to this LlamaForCausalLM already"), Together(pair).applied(model, TOKENIZER, [], {}):
            pass
    # A model that goes past its own output embedding.
    with monkeypatch.context() as patch:
        head = torch.nn.Linear(32, model.config.vocab_size)
        patch.setattr(type(model), "get_output_embeddings", lambda self: head)
        with pytest.raises(RuntimeError, match="edits do not reach the logits"):
            method.attach(model)
        assert hooks_on(model) == [] and not head._forward_pre_hooks
    # An error of somebody else, whose hook removes itself, while it is being proved.
    Failing(model.lm_head, KeyboardInterrupt(), 2)
    with pytest.raises(KeyboardInterrupt):
        method.attach(model)
    assert hooks_on(model) == []


def test_what_it_says_of_itself():
    method = StaticEditing(direction(), 0.25)
    assert method.label == "static editing (by mean difference, strength 0.25)" and method.training == (32, None, None)
    assert StaticEditing(direction(), 0.5).identity == method.identity != StaticEditing(direction(seed=4), 0.25).identity


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "lm")
    reward = RewardModel.from_pretrained(EXAMPLE / "reward", batch_size=64, dtype=torch.float32)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    prompts = load_prompts(EXAMPLE / "prompts-train.jsonl", limit=96)
    path = tmp_path_factory.mktemp("reviews") / "rollouts"
    rollouts = collect(model, tokenizer, prompts, reward, path, max_new_tokens=16, batch_size=96, progress=False, **options)
    return model, tokenizer, reward, rollouts, options


def test_reviews_become_more_positive_along_a_direction_and_less_so_against_it(reviews):
    model, tokenizer, reward, rollouts, options = reviews
    prompts = load_prompts(EXAMPLE / "prompts-test.jsonl", limit=32)

    def mean_reward(method):
        responses = method.respond(model, tokenizer, prompts, max_new_tokens=16, seed=7, **options).responses
        return float(torch.tensor(reward(prompts, [response.text for response in responses])).mean())

    plain = mean_reward(Uncontrolled())
    for found in (reward_direction(rollouts), mean_difference(rollouts)):
        assert mean_reward(StaticEditing(found, -0.6)) < plain < mean_reward(StaticEditing(found, 0.6))
    assert hooks_on(model) == []


def test_on_its_own_it_is_a_hook_around_generation(reviews):
    model, tokenizer, _, rollouts, options = reviews
    method = StaticEditing(mean_difference(rollouts), 0.3)
    keywords = {"max_new_tokens": 6, "seed": 2, **options}
    with method.attach(model):
        by_hand = generate_batch(model, tokenizer, ["The film"] * 3, **keywords).responses
    assert method.respond(model, tokenizer, ["The film"] * 3, **keywords).responses == by_hand
    assert by_hand != generate_batch(model, tokenizer, ["The film"] * 3, **keywords).responses
