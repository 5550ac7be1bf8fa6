"""`recontrol relabel`, `recontrol push`, and the options that name rewards."""

import pytest
import torch
from test_cli import EXAMPLE, one_line, run
from test_judge import by_length, serve  # noqa: F401

import recontrol as rc
from recontrol.cli import options, parser

pytestmark = pytest.mark.usefixtures("one_thread")
FUNCTIONS = "def length(prompts, responses):\n    return [len(text) for text in responses]\n"
RESPONSES = [" a wonderful film.", " a terrible, boring film.", " ok"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the command is run: rollouts and a module of rewards."""
    monkeypatch.chdir(tmp_path)
    rc.Rollouts.write("rollouts", [torch.ones(2, 4)] * 3, [0.0, 1.0, 2.0], ["This is"] * 3, RESPONSES, shard_size=2)
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    return tmp_path


def test_relabel_with_a_reward_model(folder, capsys):
    assert run("relabel", "--rollouts", "rollouts", "--reward-model", EXAMPLE / "reward", "--device", "cpu") == 0
    found = rc.Rollouts("rollouts")
    wanted = rc.RewardModel.from_pretrained(EXAMPLE / "reward")(["This is"] * 3, RESPONSES)
    torch.testing.assert_close(found.rewards[:, 0], torch.tensor(wanted), rtol=0.02, atol=0.05)
    assert found.rewards[0] > found.rewards[1] and found.manifest["reward"] == str(EXAMPLE / "reward")
    assert f"{EXAMPLE / 'reward'}: average {found.rewards.mean():.3f}\n3 responses: rollouts\n" in capsys.readouterr().out


def test_relabel_adds_several_rewards_to_a_copy(folder, capsys):
    rewards = ["--reward-model", "python:my_rewards:length", "--reward-model", EXAMPLE / "reward"]
    assert run("relabel", "--rollouts", "rollouts", "--out", "copy", "--add", "--device", "cpu", *rewards) == 0
    copy = rc.Rollouts("copy")
    assert copy.manifest["reward"] == ["reward", "length", str(EXAMPLE / "reward")]
    assert torch.equal(copy.rewards[:, :2], torch.tensor([[0.0, len(RESPONSES[0])], [1.0, len(RESPONSES[1])], [2.0, len(RESPONSES[2])]]))
    assert rc.Rollouts("rollouts").num_heads == 1
    assert "reward: average 1.000\nlength: average " in capsys.readouterr().out


def test_relabel_with_a_judge(folder, serve):  # noqa: F811
    server = serve(by_length)
    command = ["relabel", "--rollouts", "rollouts", "--reward-model", "judge:tiny", "--judge-url", server.url, "--judge-range", "0,5", "--judge-cache", "cache"]
    assert run(*command) == 0
    assert torch.equal(rc.Rollouts("rollouts").rewards, torch.tensor([[3.0], [4.0], [1.0]]))
    asked = len(server.requests)
    assert run(*command) == 0
    assert len(server.requests) == asked == 3 and rc.Rollouts("rollouts").manifest["reward"] == "judge tiny, 0 to 5"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--rollouts", "missing", "--reward-model", "no/such"], "missing is no rollout folder"),
        (["--rollouts", "rollouts", "--reward-model", "no/such/model"], "no/such/model"),
        (["--rollouts", "rollouts", "--reward-model", "python:my_rewards:width"], "the module my_rewards has no width"),
        (["--rollouts", "rollouts", "--reward-model", "python:no_such_module:length"], "No module named 'no_such_module'"),
        (["--rollouts", "rollouts", "--reward-model", "python:my_rewards"], "a function is named MODULE:FUNCTION, found 'my_rewards'"),
        (["--rollouts", "rollouts", "--reward-model", "judge:m", "--judge-range", "1,2,3"], "range must be two numbers, found 3"),
        (["--rollouts", "rollouts", "--reward-model", "judge:m", "--judge-range", "3,1"], "the range of scores is empty"),
        (["--rollouts", "rollouts", "--reward-model", str(EXAMPLE / "reward"), "--reward-template", "{prompt}"], "must have {prompt} and {response} in it"),
        (["--rollouts", "rollouts", "--reward-model", str(EXAMPLE / "lm")], "is no reward model: its checkpoint has no weights for score.weight"),
    ],
)
def test_errors_are_one_line_and_leave_the_rewards(folder, arguments, message, capsys):
    assert run("relabel", *arguments) == 2
    assert message in one_line(capsys)
    assert torch.equal(rc.Rollouts("rollouts").rewards[:, 0], torch.tensor([0.0, 1.0, 2.0]))


def test_how_rewards_are_read():
    def parsed(*arguments):
        return options.load_reward(parser().parse_args(["relabel", "--rollouts", "x", "--device", "cpu", *map(str, arguments)]))

    model = parsed("--reward-model", EXAMPLE / "reward", "--reward-template", "Q: {prompt}\\nA: {response}", "--reward-batch-size", 3)
    assert (model.template, model.batch_size) == ("Q: {prompt}\nA: {response}", 3)
    assert parsed("--reward-model", EXAMPLE / "reward").template is None
    assert len(parsed("--reward-model", EXAMPLE / "reward", "--reward-model", EXAMPLE / "reward").rewards) == 2


def test_push(folder, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(rc.ValueFunction, "push_to_hub", lambda value, repo, **settings: pushed.append((value.hidden_size, repo, settings)) or "https://hub/1")
    rc.ValueFunction(6, (8,)).save_pretrained("value")
    assert run("push", "--value", "value", "--repo", "me/value", "--private", "--revision", "v1", "--message", "Better") == 0
    assert capsys.readouterr().out == "https://hub/1\n"
    assert run("push", "--value", "value", "--repo", "me/value", "--pull-request") == 0
    first, second = ((size, repo, tuple(settings[name] for name in ("private", "revision", "create_pr", "commit_message"))) for size, repo, settings in pushed)
    assert first == (6, "me/value", (True, "v1", False, "Better")) and second == (6, "me/value", (None, None, True, "Upload value function"))


def test_the_card_is_printed_without_the_hub(folder, capsys):
    rc.ValueFunction(6, (8,), provenance={"reward": "length"}).save_pretrained("value")
    assert run("push", "--value", "value", "--card") == 0
    text = capsys.readouterr().out
    assert text.startswith("---\n") and "| reward | `length` |" in text
    assert run("push", "--value", "value") == 2
    assert "give --repo, or --card" in one_line(capsys)
    assert run("push", "--value", "missing", "--repo", "me/value") == 2
    assert "no value function at 'missing'" in one_line(capsys)
