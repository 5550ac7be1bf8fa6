"""Pushing a value function to the hub, which is a folder here, and getting it back."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from controlled import llama
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from test_value import assert_same

import recontrol as rc
from recontrol.decoding.fingerprint import model_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Keeps what is uploaded in folders, notes every call, and fails where it is told to."""
    calls = []
    state = SimpleNamespace(calls=calls, root=tmp_path / "hub", fail=None, options=None)

    class Api:
        def __init__(self, **options):
            state.options = options

        def _note(self, name, *args, **options):
            calls.append((name, args, options))
            if state.fail == name:
                raise OfflineModeIsEnabled("told to be offline")

        def create_repo(self, repo_id, **options):
            self._note("create_repo", repo_id, **options)
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def create_branch(self, repo_id, **options):
            self._note("create_branch", repo_id, **options)

        def upload_folder(self, *, repo_id, folder_path, **options):
            self._note("upload_folder", repo_id, **options)
            shutil.copytree(folder_path, state.root / repo_id, dirs_exist_ok=True)
            address = f"https://hub/{repo_id}"
            return SimpleNamespace(commit_url=f"{address}/commit/1", pr_url=f"{address}/pull/1" if options["create_pr"] else None)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(state.root / name))
    return state


@pytest.fixture
def value():
    return rc.ValueFunction(6, (8,), reward_mean=[1.0], reward_std=[2.0], provenance={"reward": "length"})


def test_what_is_pushed_comes_back(hub, value):
    assert value.push_to_hub("me/value") == "https://hub/me/value/commit/1"
    again = rc.ValueFunction.from_pretrained("me/value")
    assert_same(again, value)
    assert again.config == value.config
    assert sorted(path.name for path in (hub.root / "me" / "value").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert ModelCard.load(hub.root / "me" / "value" / "README.md").data.library_name == "recontrol"


def test_the_options_reach_the_hub(hub, value):
    value.push_to_hub("me/value", private=True, token="secret", revision="v1", commit_message="Better")
    assert hub.options["token"] == "secret" and hub.options["library_name"] == "recontrol"
    names = [name for name, _, _ in hub.calls]
    options = {name: options for name, _, options in hub.calls}
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert options["create_repo"] == {"private": True, "exist_ok": True} and options["create_branch"] == {"branch": "v1", "exist_ok": True}
    assert (options["upload_folder"]["revision"], options["upload_folder"]["commit_message"]) == ("v1", "Better")


def test_by_default_the_main_branch_and_the_owners_privacy(hub, value):
    value.push_to_hub("me/value")
    assert [name for name, _, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][2]["private"] is None and hub.calls[1][2]["revision"] is None and hub.options["token"] is None


def test_a_pull_request(hub, value):
    assert value.push_to_hub("me/value", create_pr=True) == "https://hub/me/value/pull/1"


def test_a_name_without_owner_is_completed_in_the_card(hub, value):
    value.push_to_hub("value")
    assert "# me/value\n" in (hub.root / "me" / "value" / "README.md").read_text()


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_an_unreachable_hub(hub, value, step):
    hub.fail = step
    with pytest.raises(OSError, match="could not push to 'me/value': told to be offline"):
        value.push_to_hub("me/value")
    assert not hub.root.exists()


@pytest.mark.parametrize("name", ["a/b/c", "no spaces", "", "-x"])
def test_a_name_that_is_none(hub, value, name):
    with pytest.raises(HFValidationError):
        value.push_to_hub(name)
    assert hub.calls == []


def test_what_cannot_be_saved_makes_no_repository(hub):
    broken = rc.ValueFunction(6, (8,), provenance={"when": torch.ones(1)})
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.push_to_hub("me/value")
    assert hub.calls == []


def test_offline(value):
    """With the real client: the tests run with HF_HUB_OFFLINE."""
    with pytest.raises(OSError, match="could not push to 'me/value'"):
        value.push_to_hub("me/value", token="hf_none")


def test_the_base_model_is_checked_after_the_way_over_the_hub(hub):
    model, other = llama(), llama(seed=1)
    value = rc.ValueFunction(model.config.hidden_size, (8,), provenance={"base_model": model_fingerprint(model)})
    value.push_to_hub("me/value")
    again = rc.ValueFunction.from_pretrained("me/value")
    with rc.Controller(again).attach(model):
        pass
    with pytest.raises(ValueError, match=r"the value function was trained for another model.*attach it anyway with allow_other_model=True"):
        rc.Controller(again).attach(other)
    with rc.Controller(again, allow_other_model=True).attach(other):
        pass
