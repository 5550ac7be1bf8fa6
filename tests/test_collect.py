import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recontrol.data.collect import collect
from recontrol.data.prompts import load_prompts
from recontrol.data.rollouts import Rollouts
from recontrol.decoding.responses import make_response

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "movie_reviews"
SAMPLING = {"max_new_tokens": 8, "batch_size": 4, "do_sample": True, "temperature": 1.0, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def lengths_of(prompts, responses):
    return [float(len(response)) for response in responses]


# Functions that score alike, whatever else they do, say so.
lengths_of.identity = "lengths"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "lm")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def exact_model():
    """In float64, where a cached step and a forward over the whole text differ by no more than rounding."""
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def prompts():
    # Of different lengths, so that there is padding.
    texts = load_prompts(EXAMPLE / "prompts-validation.jsonl", limit=10)
    return [text if index % 3 else text + " one of the best films of the year" for index, text in enumerate(texts)]


def responses_of(rollouts):
    states, lengths, _ = rollouts.batch(range(len(rollouts)))
    ids = rollouts.token_ids(range(len(rollouts)))
    return list(zip(rollouts.records(), states.split(lengths.tolist()), ids.split(lengths.tolist()), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_whose_logits_sampled_the_tokens(exact_model, tokenizer, prompts, tmp_path, side):
    tokenizer.padding_side = side
    rollouts = collect(exact_model, tokenizer, prompts[:5], lengths_of, tmp_path / "r", max_new_tokens=10, batch_size=3, progress=False)
    assert tokenizer.padding_side == side
    assert rollouts.lengths.tolist() == [10] * 5
    for record, states, ids in responses_of(rollouts):
        prompt = tokenizer(record["prompt"]).input_ids
        with torch.no_grad():
            whole = exact_model(torch.tensor([prompt + ids.tolist()]), output_hidden_states=True)
        # State t sits one position before token t: the first at the last prompt position, the last at the last token but one.
        wanted = whole.hidden_states[-1][0, len(prompt) - 1 : -1]
        torch.testing.assert_close(states, wanted, rtol=1e-10, atol=1e-10)
        assert torch.equal(exact_model.lm_head(states).argmax(-1), ids)
        assert record["response"] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_have_the_dtype_of_the_model(tokenizer, prompts, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=dtype)
    rollouts = collect(model, tokenizer, prompts[:2], lengths_of, tmp_path / "r", max_new_tokens=3, progress=False)
    assert rollouts.batch([0])[0].dtype == dtype
    assert rollouts.manifest["dtype"] == str(dtype).removeprefix("torch.")


def test_the_end_of_sequence_step_is_kept_and_padding_is_not(exact_model, tokenizer, prompts, tmp_path):
    free = collect(exact_model, tokenizer, prompts[:4], lengths_of, tmp_path / "free", max_new_tokens=12, progress=False)
    ids = [tokens.tolist() for _, _, tokens in responses_of(free)]
    # A token of the first response that comes late plays the end of sequence: some rows end early, others do not.
    end = next(token for place, token in enumerate(ids[0]) if place >= 4 and token not in ids[0][:place])
    cut = collect(exact_model, tokenizer, prompts[:4], lengths_of, tmp_path / "cut", max_new_tokens=12, eos_token_id=[end, 2], progress=False)
    for whole, (record, states, tokens), (_, free_states, _) in zip(ids, responses_of(cut), responses_of(free), strict=True):
        wanted = whole[: whole.index(end) + 1] if end in whole else whole
        assert tokens.tolist() == wanted
        assert record["finish"] == ("eos" if end in whole else "length")
        torch.testing.assert_close(states, free_states[: len(wanted)], rtol=1e-10, atol=1e-10)
    assert cut.lengths[0] < 12 and "eos" in [record["finish"] for record in cut.records()]


@pytest.mark.parametrize("inside", [False, True], ids=["whole token", "middle of a token"])
def test_responses_are_cut_before_a_stop_string(exact_model, tokenizer, prompts, tmp_path, inside):
    free = collect(exact_model, tokenizer, prompts[:4], lengths_of, tmp_path / "free", max_new_tokens=12, progress=False)
    # A stop string that begins with a late token of a response, or one character into it, and occurs there first.
    cases = []
    for row, (record, _, ids) in enumerate(responses_of(free)):
        pieces = [tokenizer.decode([token]) for token in ids.tolist()]
        assert "".join(pieces) == record["response"]
        for place in range(2, 11):
            stop = (pieces[place] + pieces[place + 1])[inside:]
            if len(pieces[place]) > 2 and record["response"].find(stop) == len("".join(pieces[:place])) + inside:
                cases.append((row, place, stop))
    row, place, stop = cases[0]
    whole, free_states, free_ids = responses_of(free)[row]
    seen = []

    def reward(prompts, responses):
        seen.extend(responses)
        return lengths_of(prompts, responses)

    cut = collect(exact_model, tokenizer, prompts[:4], reward, tmp_path / "cut", max_new_tokens=12, stop_strings=[stop, "never to be found"], progress=False)
    record, states, tokens = responses_of(cut)[row]
    assert record["finish"] == "stop"
    assert torch.equal(tokens, free_ids[:place])
    torch.testing.assert_close(states, free_states[:place], rtol=1e-10, atol=1e-10)
    assert record["response"] == seen[row] == tokenizer.decode(free_ids[:place]) == whole["response"][: len(seen[row])]
    assert [record["reward"] for record in cut.records()] == [[float(len(response))] for response in seen]
    assert all(stop not in record["response"] for record in cut.records())


def test_a_response_of_which_nothing_is_left_is_dropped(exact_model, tokenizer, prompts, tmp_path, caplog):
    free = collect(exact_model, tokenizer, prompts[:4], lengths_of, tmp_path / "free", max_new_tokens=4, batch_size=2, progress=False)
    first = tokenizer.decode(responses_of(free)[1][2][:1])
    left = [index for index, record in enumerate(free.records()) if not record["response"].startswith(first)]
    cut = collect(exact_model, tokenizer, prompts[:4], lengths_of, tmp_path / "cut", max_new_tokens=4, batch_size=2, stop_strings=first, progress=False)
    assert cut.groups.tolist() == left and len(left) < 4
    assert f"dropped {4 - len(left)} responses" in caplog.text


def test_a_batch_of_which_nothing_is_left_is_a_shard_without_responses(exact_model, tokenizer, prompts, tmp_path):
    options = {"max_new_tokens": 2, "batch_size": 1, "progress": False}
    free = list(collect(exact_model, tokenizer, prompts[:4], lengths_of, tmp_path / "free", **options).records())
    # Two prompts in turn whose responses begin with different words.
    first, second = next((a, b) for a, b in itertools.combinations(free, 2) if a["response"][:3] not in b["response"])
    pair = [first["prompt"], second["prompt"]]
    cut = collect(exact_model, tokenizer, pair, lengths_of, tmp_path / "cut", stop_strings=[first["response"][:3]], **options)
    assert cut.groups.tolist() == [1] and cut.rewards.tolist() == [second["reward"]]
    assert (tmp_path / "cut" / "shard-00000.safetensors").exists()


def test_generation_ends_early_at_a_stop_string(exact_model, tokenizer, prompts, tmp_path):
    free = collect(exact_model, tokenizer, prompts[:1], lengths_of, tmp_path / "free", max_new_tokens=12, progress=False)
    stop = tokenizer.decode(free.token_ids([0])[2:4])
    steps = []
    hook = exact_model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        collect(exact_model, tokenizer, prompts[:1], lengths_of, tmp_path / "cut", max_new_tokens=12, stop_strings=[stop], progress=False)
    finally:
        hook.remove()
    assert len(steps) <= 4


def test_several_samples_of_a_prompt_are_one_group(exact_model, tokenizer, prompts, tmp_path):
    rollouts = collect(exact_model, tokenizer, prompts[:6], lengths_of, tmp_path / "r", num_samples=3, **SAMPLING)
    assert rollouts.groups.tolist() == [index for index in range(6) for _ in range(3)]
    records = list(rollouts.records())
    assert [record["prompt"] for record in records] == [prompts[index] for index in rollouts.groups]
    assert [record["sample"] for record in records] == [0, 1, 2] * 6
    assert len({record["response"] for record in records}) > 12
    for record, states, ids in responses_of(rollouts):
        row = tokenizer(record["prompt"]).input_ids + ids.tolist()
        with torch.no_grad():
            wanted = exact_model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -len(ids) - 1 : -1]
        torch.testing.assert_close(states, wanted, rtol=1e-10, atol=1e-10)


def test_one_seed_one_result_and_the_callers_generator_is_left_alone(model, tokenizer, prompts, tmp_path):
    before = torch.get_rng_state()
    first = collect(model, tokenizer, prompts, lengths_of, tmp_path / "a", seed=3, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert_same_folder(tmp_path / "a", collect(model, tokenizer, prompts, lengths_of, tmp_path / "b", seed=3, **SAMPLING).path)
    other = collect(model, tokenizer, prompts, lengths_of, tmp_path / "c", seed=4, **SAMPLING)
    assert [record["response"] for record in first.records()] != [record["response"] for record in other.records()]


def test_each_batch_has_a_seed_of_its_own(model, tokenizer, prompts, tmp_path):
    rollouts = collect(model, tokenizer, prompts[:1] * 4, lengths_of, tmp_path / "r", unique_prompts=False, **{**SAMPLING, "batch_size": 1})
    assert len({record["response"] for record in rollouts.records()}) == 4
    assert rollouts.groups.tolist() == [0, 1, 2, 3] and rollouts.manifest["duplicate_prompts"] == 3


def test_the_model_is_left_as_it_was(model, tokenizer, prompts, tmp_path):
    model.train()
    model.model.layers[0].eval()
    try:
        collect(model, tokenizer, prompts[:2], lengths_of, tmp_path / "r", max_new_tokens=2, progress=False)
        assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    finally:
        model.eval()
    assert not model.lm_head._forward_pre_hooks


def test_the_reward_model_of_the_example(model, tokenizer, prompts, tmp_path):
    rollouts = collect(model, tokenizer, prompts[:4], str(EXAMPLE / "reward"), tmp_path / "r", **SAMPLING)
    assert rollouts.manifest["reward"] == str(EXAMPLE / "reward")
    assert rollouts.rewards.shape == (4, 1) and rollouts.rewards.std() > 0


def test_the_manifest_tells_how_the_rollouts_were_made(model, tokenizer, prompts, tmp_path):
    manifest = collect(model, tokenizer, prompts, lengths_of, tmp_path / "r", seed=3, stop_strings=["x\n"], **SAMPLING).manifest
    assert manifest["generation"] == {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0}
    assert (manifest["seed"], manifest["num_prompts"], manifest["num_shards"], manifest["batch_size"]) == (3, 10, 3, 4)
    assert (manifest["hidden_size"], manifest["dtype"], manifest["num_heads"]) == (256, "bfloat16", 1)
    assert manifest["stop_strings"] == ["x\n"] and manifest["reward"] == "lengths_of" and len(manifest["prompts_sha256"]) == 64
    assert manifest["base_model"]["hidden_size"] == 256


def assert_same_folder(found, wanted):
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in wanted.iterdir())
    for path in wanted.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture(scope="module")
def uninterrupted(model, tokenizer, prompts, tmp_path_factory):
    return collect(model, tokenizer, prompts, lengths_of, tmp_path_factory.mktemp("whole"), **SAMPLING).path


CHILD = """
import json, os, resource, signal, sys, time
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from recontrol.data.collect import collect

folder, how, lm, threads, prompts, sampling = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]), json.loads(sys.argv[6])
torch.set_num_threads(threads)
calls = 0

def lengths_of(prompts, responses):
    global calls
    calls += 1
    if calls == 2 and how == "wait":
        Path(str(folder) + ".ready").touch()
        time.sleep(300)
    if calls == 2 and how == "full disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return [float(len(response)) for response in responses]

lengths_of.identity = "lengths"

replace = os.replace

def replace_or_die(source, target):
    if str(target).endswith("shard-00001.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

if how == "while writing":
    os.replace = replace_or_die
model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.bfloat16)
collect(model, AutoTokenizer.from_pretrained(lm), prompts, lengths_of, folder, **sampling)
"""


def start_child(folder, how, prompts):
    arguments = [str(folder), how, str(EXAMPLE / "lm"), str(torch.get_num_threads()), json.dumps(prompts), json.dumps(SAMPLING)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Who runs the tests in the background may have switched interrupts off, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_resumes(folder, uninterrupted, model, tokenizer, prompts):
    """The shard that was done is not done again, the others are, and the result is that of a run without a break."""
    first = folder / "shard-00000.safetensors"
    before = first.stat().st_mtime_ns
    assert not (folder / "shard-00001.safetensors").exists()
    scored = []

    def lengths_of(prompts, responses):
        scored.extend(prompts)
        return [float(len(response)) for response in responses]

    lengths_of.__qualname__, lengths_of.identity = "lengths_of", "lengths"
    collect(model, tokenizer, prompts, lengths_of, folder, **SAMPLING)
    assert first.stat().st_mtime_ns == before
    assert scored == prompts[4:]
    assert_same_folder(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_or_interrupted_goes_on_where_it_was(model, tokenizer, prompts, uninterrupted, tmp_path, number):
    folder = tmp_path / "r"
    child = start_child(folder, "wait", prompts)
    ready = Path(f"{folder}.ready")
    deadline = time.monotonic() + 120
    while not ready.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert ready.exists(), errors
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors and "interrupted: 1 of 3 shards" in errors
        assert not list(folder.glob(".*.part"))
    else:
        assert child.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="found 1 of 3 shards"):
        Rollouts(folder)
    assert_resumes(folder, uninterrupted, model, tokenizer, prompts)


def test_a_run_that_is_killed_while_it_writes_leaves_no_half_shard(model, tokenizer, prompts, uninterrupted, tmp_path):
    child = start_child(tmp_path / "r", "while writing", prompts)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors
    # The lines are in place, the tensors are not: there is no such shard yet.
    assert (tmp_path / "r" / "shard-00001.jsonl").exists()
    assert len(list((tmp_path / "r").glob(".shard-00001.safetensors.*.part"))) == 1
    assert_resumes(tmp_path / "r", uninterrupted, model, tokenizer, prompts)


def test_a_full_disk_is_named_and_what_was_written_stays(model, tokenizer, prompts, uninterrupted, tmp_path):
    child = start_child(tmp_path / "r", "full disk", prompts)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "OSError" in errors and f"could not write {tmp_path / 'r' / 'shard-00001.safetensors'}: File too large" in errors
    assert not list((tmp_path / "r").glob(".*.part"))
    assert_resumes(tmp_path / "r", uninterrupted, model, tokenizer, prompts)


def test_a_folder_that_is_done_is_opened_without_work(model, tokenizer, prompts, tmp_path):
    collect(model, tokenizer, prompts[:2], lengths_of, tmp_path / "r", max_new_tokens=2, progress=False)

    def lengths_again(prompts, responses):
        raise AssertionError("scored again")

    lengths_again.__qualname__, lengths_again.identity = "lengths_of", "lengths"
    assert len(collect(model, tokenizer, prompts[:2], lengths_again, tmp_path / "r", max_new_tokens=2, progress=False)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another seed: found 0, wanted 1"),
        ({"batch_size": 2}, "another batch_size: found 4, wanted 2"),
        ({"temperature": 0.5}, "another generation: .*'temperature': 1.0.*'temperature': 0.5"),
        ({"max_new_tokens": 9}, "another generation"),
        ({"stop_strings": ["a"]}, r"another stop_strings: found \[\], wanted \['a'\]"),
        ({"num_samples": 2}, "another num_samples: found 1, wanted 2"),
    ],
)
def test_going_on_with_other_settings_is_refused(model, tokenizer, prompts, uninterrupted, change, message):
    with pytest.raises(ValueError, match=message):
        collect(model, tokenizer, prompts, lengths_of, uninterrupted, **{**SAMPLING, **change})


def test_going_on_with_other_prompts_or_another_reward_is_refused(model, tokenizer, prompts, uninterrupted):
    with pytest.raises(ValueError, match="another prompts_sha256"):
        collect(model, tokenizer, prompts[::-1], lengths_of, uninterrupted, **SAMPLING)
    with pytest.raises(ValueError, match=r"another reward: found 'lengths_of', wanted '.*lambda"):
        collect(model, tokenizer, prompts, lambda prompts, responses: [0.0] * len(prompts), uninterrupted, **SAMPLING)


def test_going_on_with_another_tokenizer_is_refused(model, prompts, uninterrupted):
    other = AutoTokenizer.from_pretrained(EXAMPLE / "lm")
    # Its name may be another one as long as it reads texts as the same tokens.
    other.name_or_path = "elsewhere"
    collect(model, other, prompts, lengths_of, uninterrupted, **SAMPLING)
    other.add_tokens(["Human"])
    with pytest.raises(ValueError, match="another tokenizer_sha256"):
        collect(model, other, prompts, lengths_of, uninterrupted, **SAMPLING)


def test_going_on_with_another_model_is_refused(tokenizer, prompts, uninterrupted):
    torch.manual_seed(0)
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    for hidden_size in (256, 64):
        other = LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=hidden_size, **sizes)).to(torch.bfloat16)
        with pytest.raises(ValueError, match="holds rollouts of another model"):
            collect(other, tokenizer, prompts, lengths_of, uninterrupted, **SAMPLING)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda count: [float("nan")] * count, r"batch 1 \(prompts 4, 5, 6, 7\): the reward returned NaN or infinity for responses \[0, 1, 2, 3\]"),
        (lambda count: [0.0] * (count - 1), r"batch 1 \(prompts 4, 5, 6, 7\): .*found 3, wanted 4"),
        (lambda count: [[0.0, 1.0]] * count, "another num_heads: found 1, wanted 2"),
    ],
)
def test_a_reward_that_breaks_is_named_and_what_was_written_stays(model, tokenizer, prompts, uninterrupted, tmp_path, scores, message):
    calls = []

    def breaking(prompts, responses):
        calls.append(len(prompts))
        return scores(len(prompts)) if len(calls) == 2 else lengths_of(prompts, responses)

    breaking.__qualname__, breaking.identity = "lengths_of", "lengths"
    with pytest.raises(ValueError, match=message):
        collect(model, tokenizer, prompts, breaking, tmp_path / "r", **SAMPLING)
    assert_resumes(tmp_path / "r", uninterrupted, model, tokenizer, prompts)


def test_prompts_that_are_too_long_are_named_before_any_work(model, tokenizer, tmp_path):
    prompts = ["short", "word " * 520, "short", "word " * 600]
    with pytest.raises(ValueError, match=r"2 prompts leave no room for 128 new tokens in a context of 512: 1 \(\d+ tokens\), 3 \(\d+ tokens\)"):
        collect(model, tokenizer, prompts, lengths_of, tmp_path / "r", progress=False)
    with pytest.raises(ValueError, match=r"1 prompts are longer than 3 tokens: 0 \(\d+ tokens\)"):
        collect(model, tokenizer, ["one two three four five"], lengths_of, tmp_path / "r", max_prompt_tokens=3, progress=False)
    with pytest.raises(ValueError, match="1 prompts leave no room for 600 new tokens in a context of 512"):
        collect(model, tokenizer, ["short"], lengths_of, tmp_path / "r", max_new_tokens=600, progress=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": []}, ValueError, "no prompts"),
        ({"prompts": "one text"}, TypeError, "list of texts"),
        ({"prompts": ["a", None]}, TypeError, "list of texts"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer of at least 1, found 0"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"num_samples": 2}, ValueError, "needs do_sample=True"),
        ({"num_beams": 4}, ValueError, "num_beams must be 1, found 4"),
        ({"max_length": 20}, ValueError, "max_length=20 is not taken here: use max_new_tokens"),
        ({"num_return_sequences": 2}, ValueError, "use num_samples"),
        ({"stop_strings": [""]}, ValueError, "not empty"),
        ({"reward": 3}, TypeError, "found int"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(model, tokenizer, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        collect(model, tokenizer, **{"prompts": ["a"], "reward": lengths_of, "out": tmp_path / "r", "progress": False, **options})
    assert not (tmp_path / "r").exists()


class Words:
    """A tokenizer whose tokens are given strings, some of them pieces of one character."""

    def __init__(self, *pieces):
        self.pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def decode(self, ids, **options):
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "stops", "kept"),
    [
        (("Yes.", "\n", "Human", ":"), ["\nHuman:"], 1),
        (("Yes.\n", "Human", ":"), ["\nHuman:"], 0),
        (("Yes", ".\n", "Human", ": hi"), ["\nHuman:"], 1),
        (("Yes", ".", "\n\nHuman:", " hi"), ["Human:"], 2),
        (("Yes", ".\n\n", "Human:", " hi"), ["Human:", "\n\nHuman:"], 1),
        (("Yes", " b", " a", " b"), ["a", "b"], 1),
        (("caf", b"\xc3", b"\xa9", "!", " Human:"), ["Human:"], 4),
        (("caf", b"\xc3", b"\xa9", "Human:"), ["\u00e9Human:"], 1),
        (("caf", b"\xc3", b"\xa9", "Human:"), ["Human:"], 3),
        (("", "Yes", "", "Human:"), ["Human:"], 3),
        (("Yes", "Human"), ["Human:"], None),
    ],
)
def test_a_token_that_touches_a_stop_string_goes(pieces, stops, kept):
    response = make_response(Words(*pieces), [], range(len(pieces)), set(), stops)
    assert response.finish == ("length" if kept is None else "stop")
    assert response.token_ids == list(range(len(pieces) if kept is None else kept))


def test_the_end_of_sequence_hides_what_comes_after_it():
    tokenizer = Words("Yes", "<eos>", "Human:", "<pad>")
    response = make_response(tokenizer, [], [0, 1, 3, 2], {1}, ["Human:"])
    assert (response.token_ids, response.finish) == ([0, 1], "eos")
    assert make_response(tokenizer, [], [2, 1], {1}, ["Human:"]).token_ids == []
    assert make_response(tokenizer, [], [1, 3], {1}, []).token_ids == [1]
