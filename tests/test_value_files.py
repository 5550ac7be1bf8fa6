"""Reading a value function: folders, the hub, state dicts of the released code, and everything that may be wrong with them."""

import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_value import DTYPES, PROVENANCE, assert_same, spoil_config

import recontrol as rc


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder that `save_pretrained` wrote, to be spoilt."""
    rc.ValueFunction(6, (8,), provenance=PROVENANCE).save_pretrained(tmp_path / "value")
    return tmp_path / "value"


class TestBadFolders:
    @pytest.mark.parametrize(
        "name,reason",
        [
            ("/no/such/folder", "the hub did not answer with one"),
            ("nobody/no-such-value-function", r"the hub is not asked \(HF_HUB_OFFLINE is set\) and its cache on this machine has none"),
            ("a/b/c", "the hub did not answer with one"),
            ("no spaces please", "the hub did not answer with one"),
        ],
    )
    def test_neither_a_folder_nor_on_the_hub(self, name, reason, monkeypatch):
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match=f"it is no local folder, and {reason}") as caught:
            rc.ValueFunction.from_pretrained(name)
        assert repr(name) in str(caught.value)

    def test_a_revision_that_the_hub_does_not_have(self, monkeypatch):
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match=r"no value function at 'nobody/nothing', revision 'v1'"):
            rc.ValueFunction.from_pretrained("nobody/nothing", revision="v1")

    def test_a_folder_has_no_revision(self, saved):
        with pytest.raises(ValueError, match="is a local folder and has no revision 'v1'"):
            rc.ValueFunction.from_pretrained(saved, revision="v1")

    def test_revision_and_token_reach_the_hub(self, saved, monkeypatch):
        import huggingface_hub

        asked = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(saved))
        value = rc.ValueFunction.from_pretrained("somebody/value", revision="v1", token="secret")
        assert_same(value, rc.ValueFunction.from_pretrained(saved))
        assert [(name, options["revision"], options["token"]) for name, options in asked] == [("somebody/value", "v1", "secret")]

    def test_path_is_a_file(self, saved):
        with pytest.raises(ValueError, match=r"model.safetensors is a file; a value function is a folder.*use from_released"):
            rc.ValueFunction.from_pretrained(saved / "model.safetensors")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_file_is_missing(self, saved, name):
        (saved / name).unlink()
        with pytest.raises(ValueError, match=f"is no value function: {name} is missing"):
            rc.ValueFunction.from_pretrained(saved)

    @pytest.mark.parametrize(
        "changes,message",
        [
            ({"format": "someone.else"}, "found format 'someone.else', wanted 'recontrol.value_function'"),
            ({"format": "absent", "model_type": "llama"}, "found format 'llama', wanted"),
            ({"format": "absent"}, "found format None, wanted"),
            ({"format_version": 2}, "has format version 2, this release reads up to 1; upgrade recontrol"),
            ({"format_version": "2"}, "has format version '2'"),
            ({"format_version": "absent"}, "has format version None"),
            ({"activation": "gelu"}, "only ReLU MLPs are supported, found architecture 'mlp' with activation 'gelu'"),
            ({"activation": "absent"}, "only ReLU MLPs are supported"),
            ({"architecture": "transformer"}, "only ReLU MLPs are supported, found architecture 'transformer'"),
            ({"hidden_size": "absent", "num_heads": "absent"}, r"config\.json: .*must be positive integers, found hidden_size=None, .*num_heads=None"),
            ({"hidden_size": -6}, r"config\.json: .*must be positive integers, found hidden_size=-6"),
            ({"hidden_dims": 8}, r"config\.json: .*must be positive integers, found .*hidden_dims=8"),
            ({"hidden_dims": ["8"]}, r"config\.json: .*must be positive integers"),
            ({"num_heads": None}, r"config\.json: .*must be positive integers, found .*num_heads=None"),
            ({"provenance": "a film"}, "provenance must be an object, found 'a film'"),
            ({"hidden_size": 7}, r"model.safetensors does not hold the weights its config describes: found .*\(8, 6\).*wanted .*\(8, 7\)"),
            ({"hidden_dims": [9]}, r"found .*\(8, 6\).*wanted .*\(9, 6\)"),
            ({"hidden_dims": [8, 8]}, r"does not hold the weights its config describes.*layers\.2"),
            ({"num_heads": 2}, "does not hold the weights its config describes"),
            ({"hidden_dims": [10**12]}, "does not hold the weights its config describes"),
        ],
        ids=lambda entry: str(entry) if isinstance(entry, dict) else "",
    )
    def test_config_that_is_not_ours_or_disagrees(self, saved, changes, message):
        spoil_config(saved, **changes)
        with pytest.raises(ValueError, match=message):
            rc.ValueFunction.from_pretrained(saved)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b"{'format': 1}", b"null"], ids=str)
    def test_config_that_is_no_json_object(self, saved, content):
        (saved / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json is not"):
            rc.ValueFunction.from_pretrained(saved)

    def test_safetensors_cut_anywhere(self, saved):
        whole = (saved / "model.safetensors").read_bytes()
        for length in (0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1):
            (saved / "model.safetensors").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
                rc.ValueFunction.from_pretrained(saved)

    def test_safetensors_of_another_format(self, saved):
        for content in (b"PK\x03\x04 this is a zip", b"\x80\x04K\x01.", b"\xff" * 4000, (saved / "model.safetensors").read_bytes() + b"more"):
            (saved / "model.safetensors").write_bytes(content)
            with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
                rc.ValueFunction.from_pretrained(saved)

    def test_foreign_safetensors(self, saved):
        weights = load_file(saved / "model.safetensors")
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        foreign = [
            {"model.embed_tokens.weight": torch.zeros(3, 6)},
            {},
            {**weights, "extra": torch.zeros(1)},
            {name: tensor for name, tensor in weights.items() if name != "layers.1.bias"},
            {**weights, "layers.0.weight": torch.zeros(6, 8)},
            {**weights, "layers.0.bias": torch.zeros(8, 1)},
        ]
        for tensors in foreign:
            save_file(tensors, saved / "model.safetensors")
            with pytest.raises(ValueError, match=r"model\.safetensors does not hold the weights its config describes: found .*, wanted "):
                rc.ValueFunction.from_pretrained(saved)
        for tensors in ({**weights, "layers.0.bias": torch.zeros(8).half()}, {name: tensor.int() for name, tensor in weights.items()}):
            save_file(tensors, saved / "model.safetensors")
            with pytest.raises(ValueError, match=r"must hold weights of one floating-point dtype, found "):
                rc.ValueFunction.from_pretrained(saved)


def released_state(layers: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A state dict as the released code saves it: fc1 and fc3, with fc2 between them for three layers."""
    linears = {"fc1": torch.nn.Linear(6, 8), "fc2": torch.nn.Linear(8, 5), "fc3": torch.nn.Linear(5 if layers == 3 else 8, 2)}
    return {
        f"{name}.{part}": tensor.to(dtype) for name, linear in linears.items() if name != "fc2" or layers == 3 for part, tensor in linear.state_dict().items()
    }


class TestReleasedFiles:
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layers", [2, 3])
    def test_two_and_three_layers(self, tmp_path, layers, dtype, legacy):
        state = released_state(layers, dtype)
        torch.save(state, tmp_path / "value_model.pth", _use_new_zipfile_serialization=not legacy)
        value = rc.ValueFunction.from_released(tmp_path / "value_model.pth", provenance={"data": "HH"})
        assert (value.hidden_size, value.hidden_dims, value.num_heads, value.dtype) == (6, (8,) if layers == 2 else (8, 5), 2, dtype)
        assert value.provenance == {"source": "value_model.pth", "data": "HH"}
        hidden = torch.randn(4, 6).to(dtype)
        wanted = hidden
        for name in ("fc1", "fc2")[: layers - 1]:
            wanted = torch.relu(torch.nn.functional.linear(wanted, state[f"{name}.weight"], state[f"{name}.bias"]))
        assert torch.equal(value(hidden), torch.nn.functional.linear(wanted, state["fc3.weight"], state["fc3.bias"]))
        value.save_pretrained(tmp_path / "ours")
        assert_same(rc.ValueFunction.from_pretrained(tmp_path / "ours"), value)

    def test_the_name_of_earlier_releases(self, tmp_path):
        torch.save(released_state(2), tmp_path / "value_model.pth")
        with pytest.warns(DeprecationWarning, match="from_reference is now ValueFunction.from_released"):
            value = rc.ValueFunction.from_reference(tmp_path / "value_model.pth", provenance={"data": "HH"})
        assert_same(value, rc.ValueFunction.from_released(tmp_path / "value_model.pth", provenance={"data": "HH"}))

    def test_tensors_that_require_grad(self, tmp_path):
        torch.save({name: torch.nn.Parameter(tensor) for name, tensor in released_state(2).items()}, tmp_path / "value_model.pth")
        assert rc.ValueFunction.from_released(str(tmp_path / "value_model.pth")).hidden_dims == (8,)

    @pytest.mark.parametrize(
        "change,message",
        [
            ({"fc4.weight": torch.ones(1)}, r"found keys .*fc4\.weight.*wanted fc1, fc3 and optionally fc2"),
            ({"fc1.bias": None}, "found keys"),
            ({"fc2.bias": torch.ones(1)}, "found keys"),
            ({"fc1.weight": 3}, "found .*'int'.*wanted matrices as weights"),
            ({"fc1.weight": torch.ones(6)}, r"found .*\(6,\).*wanted matrices as weights"),
            ({"fc1.weight": torch.ones(0, 6)}, r"found .*\(0, 6\)"),
            ({"fc3.weight": torch.ones(2, 9)}, r"found .*\(2, 9\).*wanted"),
            ({"fc3.bias": torch.ones(2).half()}, "must hold weights of one floating-point dtype, found .*float16"),
        ],
        ids=["extra", "missing", "half-a-layer", "number", "vector", "empty", "sizes", "dtypes"],
    )
    def test_foreign_state_dicts(self, tmp_path, change, message):
        state = {name: tensor for name, tensor in {**released_state(2), **change}.items() if tensor is not None}
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=rf"x\.pth .*{message}"):
            rc.ValueFunction.from_released(tmp_path / "x.pth")

    @pytest.mark.parametrize(
        "content", [[1, 2], torch.ones(3), {}, {"model": {"fc1.weight": torch.ones(2, 2)}}, {1: 2}], ids=["list", "tensor", "empty", "nested", "numbers"]
    )
    def test_files_that_hold_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"x\.pth is no value function of the released code: found keys"):
            rc.ValueFunction.from_released(tmp_path / "x.pth")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_code_in_a_file_is_not_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "sprung",))

        for content in (pickle.dumps({"fc1.weight": Trap()}), pickle.dumps([Trap()], protocol=0)):
            (tmp_path / "x.pth").write_bytes(content)
            with pytest.raises(ValueError, match=r"x\.pth is no readable torch state dict"):
                rc.ValueFunction.from_released(tmp_path / "x.pth")
        torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
        with pytest.raises(ValueError, match="or holds other things than tensors"):
            rc.ValueFunction.from_released(tmp_path / "x.pth")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_cut_anywhere(self, tmp_path, legacy):
        path = tmp_path / "x.pth"
        torch.save(released_state(3), path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for length in [0, 1, 2, 5, 20, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)]:
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"x\.pth is no"):
                rc.ValueFunction.from_released(path)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_damaged_bytes_raise_nothing_but_value_errors(self, tmp_path, legacy):
        """Damage within the numbers cannot be seen; anywhere else it is refused."""
        path = tmp_path / "x.pth"
        torch.save(released_state(2), path, _use_new_zipfile_serialization=not legacy)
        whole, chance, refused = path.read_bytes(), random.Random(0), 0
        for _ in range(80):
            damaged = bytearray(whole)
            for _ in range(chance.randrange(1, 6)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            path.write_bytes(damaged)
            try:
                rc.ValueFunction.from_released(path)
            except ValueError:
                refused += 1
        assert refused > 20

    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="value_model"):
            rc.ValueFunction.from_released(tmp_path / "value_model.pth")
        with pytest.raises(ValueError, match=r"is a folder; the released code writes a \.pth file"):
            rc.ValueFunction.from_released(tmp_path)
