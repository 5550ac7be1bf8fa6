"""The value function: what it computes, and saving it."""

import copy
import io
import json
import pickle
import resource
from pathlib import Path

import pytest
import torch

import recontrol as rc

DIMS = [(), (7,), (7, 5), (4, 1, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PROVENANCE = {"base_model": {"name": "tiny", "samples": {"a": [0.5, -1e-8]}}, "data": "films, 'quoted' ü", "epochs": 3, "best": None}


def assert_same(one: rc.ValueFunction, other: rc.ValueFunction) -> None:
    assert (one.hidden_size, one.hidden_dims, one.num_heads, one.dtype) == (other.hidden_size, other.hidden_dims, other.num_heads, other.dtype)
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)), name


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder that `save_pretrained` wrote, to be spoilt."""
    rc.ValueFunction(6, (8,), provenance=PROVENANCE).save_pretrained(tmp_path / "value")
    return tmp_path / "value"


def spoil_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({name: entry for name, entry in config.items() if entry != "absent"}))


class TestForward:
    @pytest.mark.parametrize("dims", DIMS, ids=str)
    def test_is_the_formula(self, dims):
        """V(h) = W_L relu(... relu(W_1 h + b_1) ...) + b_L, unit by unit, in float64."""
        value = rc.ValueFunction(6, dims, num_heads=2).double()
        hidden = torch.randn(3, 6, dtype=torch.float64)
        wanted = []
        for row in hidden.tolist():
            units = row
            for depth, layer in enumerate(value.layers):
                sums = [
                    sum(w * x for w, x in zip(weights, units, strict=True)) + b for weights, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
                ]
                units = sums if depth == len(dims) else [max(x, 0.0) for x in sums]
            wanted.append(units)
        torch.testing.assert_close(value(hidden), torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("heads", [1, 3])
    @pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
    def test_shapes(self, heads, shape):
        assert rc.ValueFunction(6, (8,), heads)(torch.randn(*shape, 6)).shape == (*shape, heads)

    def test_computes_in_the_dtype_of_the_weights(self):
        value = rc.ValueFunction(6, (8,)).bfloat16()
        assert value.dtype == torch.bfloat16 and value.device == torch.device("cpu")
        assert value(torch.randn(2, 6)).dtype == torch.bfloat16

    def test_is_differentiable(self):
        hidden = torch.randn(2, 6, requires_grad=True)
        rc.ValueFunction(6, (8,))(hidden).sum().backward()
        assert hidden.grad.abs().sum() > 0

    def test_linear(self):
        value = rc.ValueFunction(6, (), 2)
        hidden = torch.randn(4, 6)
        assert torch.equal(value(hidden), torch.nn.functional.linear(hidden, value.layers[0].weight, value.layers[0].bias))

    def test_default_is_two_linear_layers(self):
        with torch.device("meta"):
            value = rc.ValueFunction(16)
        assert value.hidden_dims == (4096,) and value.num_heads == 1 and len(value.layers) == 2

    @pytest.mark.parametrize(
        "sizes",
        [(0,), (-3,), (6.0,), ("6",), (True,), (None,), (6, (0,)), (6, (8, -1)), (6, (8.0,)), (6, 8), (6, None), (6, "8"), (6, (8,), 0), (6, (8,), 1.0)],
        ids=str,
    )
    def test_sizes_must_be_positive_integers(self, sizes):
        with pytest.raises(ValueError, match="must be positive integers, found hidden_size="):
            rc.ValueFunction(*sizes)

    def test_repr_names_the_sizes(self):
        assert "hidden_size=6, hidden_dims=(8,), num_heads=2" in repr(rc.ValueFunction(6, (8,), 2))


class TestRewardStatistics:
    VALUES = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)

    def test_to_reward_is_the_formula_and_from_reward_its_inverse(self):
        value = rc.ValueFunction(6, (8,), 2, reward_mean=(10.0, -1.0), reward_std=(2.0, 0.5))
        assert torch.equal(value.to_reward(self.VALUES), torch.tensor([[12.0, 0.0], [4.0, -0.75]], dtype=torch.float64))
        assert torch.equal(value.from_reward(value.to_reward(self.VALUES)), self.VALUES)
        assert value.to_reward(self.VALUES.bfloat16()).dtype == torch.bfloat16
        assert value.to_reward(self.VALUES[0]).shape == (2,) and value.to_reward(self.VALUES[None]).shape == (1, 2, 2)

    def test_without_statistics_nothing_changes(self):
        value = rc.ValueFunction(6, (8,), 2)
        assert value.reward_mean is None and value.reward_std is None
        assert torch.equal(value.to_reward(self.VALUES), self.VALUES) and torch.equal(value.from_reward(self.VALUES), self.VALUES)

    def test_v_itself_stays_in_its_own_unit(self):
        plain = rc.ValueFunction(6, (8,))
        standardised = rc.ValueFunction(6, (8,), reward_mean=[5.0], reward_std=[3.0])
        standardised.load_state_dict(plain.state_dict())
        hidden = torch.randn(4, 6)
        assert torch.equal(standardised(hidden), plain(hidden))

    @pytest.mark.parametrize(
        "given", [([1.5, -2.0], [0.1, 3.0]), (torch.tensor([1.5, -2.0]), torch.tensor([0.5, 3.0])), (None, None)], ids=["list", "tensor", "none"]
    )
    def test_saved_and_loaded(self, tmp_path, given):
        value = rc.ValueFunction(6, (8,), 2, reward_mean=given[0], reward_std=given[1])
        value.save_pretrained(tmp_path)
        again = rc.ValueFunction.from_pretrained(tmp_path)
        assert (again.reward_mean, again.reward_std) == (value.reward_mean, value.reward_std)
        assert value.reward_mean is None or value.reward_mean == (1.5, -2.0)

    def test_files_from_before_there_were_statistics(self, saved):
        spoil_config(saved, reward_mean="absent", reward_std="absent")
        value = rc.ValueFunction.from_pretrained(saved)
        assert value.reward_mean is None and torch.equal(value.to_reward(self.VALUES[:, :1]), self.VALUES[:, :1])

    @pytest.mark.parametrize(
        "mean,std,message",
        [
            ([0.0, 0.0], None, "reward_mean and reward_std go together"),
            (None, [1.0, 1.0], "reward_mean and reward_std go together"),
            ([0.0], [1.0, 1.0], r"reward_mean must be 2 finite numbers, one a head, found \[0.0\]"),
            ([0.0, 0.0], [1.0, 0.0], r"reward_std must be 2 finite numbers above 0, one a head, found \[1.0, 0.0\]"),
            ([0.0, 0.0], [1.0, -1.0], "reward_std must be 2 finite numbers above 0"),
            ([0.0, float("nan")], [1.0, 1.0], "reward_mean must be 2 finite numbers"),
            ([0.0, 0.0], [1.0, float("inf")], "reward_std must be 2 finite numbers"),
            (0.0, [1.0, 1.0], "reward_mean must be numbers, one a head, found 0.0"),
            ([0.0, "high"], [1.0, 1.0], "reward_mean must be numbers"),
        ],
    )
    def test_statistics_that_are_none(self, tmp_path, mean, std, message):
        with pytest.raises(ValueError, match=message):
            rc.ValueFunction(6, (8,), 2, reward_mean=mean, reward_std=std)
        rc.ValueFunction(6, (8,), 2).save_pretrained(tmp_path)
        spoil_config(tmp_path, reward_mean=mean, reward_std=std)
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            rc.ValueFunction.from_pretrained(tmp_path)

    @pytest.mark.parametrize("statistics", [{}, {"reward_mean": (0.0, 0.0), "reward_std": (1.0, 1.0)}], ids=["plain", "standardised"])
    def test_values_of_another_number_of_heads(self, statistics):
        value = rc.ValueFunction(6, (8,), 2, **statistics)
        for wrong in (torch.zeros(2, 1), torch.zeros(3), torch.zeros(())):
            with pytest.raises(ValueError, match=r"the last dimension must be the 2 heads, found shape \("):
                value.to_reward(wrong)
            with pytest.raises(ValueError, match="the last dimension must be the 2 heads"):
                value.from_reward(wrong)


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_is_equal_and_has_its_own_cache(self, how):
        value = rc.ValueFunction(6, (8,), provenance=PROVENANCE)
        hidden = torch.randn(3, 6)
        before = rc.ascend(hidden, value)
        if how == "deepcopy":
            twin = copy.deepcopy(value)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(value))
        else:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        assert_same(twin, value)
        assert twin.provenance == PROVENANCE
        assert twin._cache is not value._cache and twin._cache.key != value._cache.key
        with torch.no_grad():
            twin.layers[0].weight.neg_()
        assert not torch.equal(rc.ascend(hidden, twin), before)
        assert torch.equal(rc.ascend(hidden, value), before)

    def test_provenance_is_not_shared_with_the_caller(self):
        given = {"data": "a"}
        value = rc.ValueFunction(6, (8,), provenance=given)
        value.provenance["data"] = "b"
        assert given == {"data": "a"} and rc.ValueFunction(6, (8,)).provenance == {}


class TestSaving:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dims", DIMS, ids=str)
    def test_round_trip_to_the_bit(self, tmp_path, dims, dtype):
        value = rc.ValueFunction(6, dims, 2, provenance=PROVENANCE).to(dtype)
        with torch.no_grad():
            value.layers[0].weight[0, :4] = torch.tensor([-0.0, 6e-8, 1 / 3, -65504.0])
        value.save_pretrained(tmp_path / "a" / "b")
        again = rc.ValueFunction.from_pretrained(tmp_path / "a" / "b")
        assert_same(again, value)
        assert again.provenance == PROVENANCE and again.config == value.config
        assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
        assert all(parameter.requires_grad for parameter in again.parameters())

    def test_path_may_be_a_string_and_dtype_is_converted_on_request(self, saved):
        assert rc.ValueFunction.from_pretrained(str(saved)).dtype == torch.float32
        converted = rc.ValueFunction.from_pretrained(str(saved), dtype=torch.bfloat16, device="cpu")
        assert_same(converted, rc.ValueFunction.from_pretrained(saved).bfloat16())

    def test_loading_draws_no_random_numbers(self, saved):
        state = torch.get_rng_state()
        rc.ValueFunction.from_pretrained(saved)
        assert torch.equal(torch.get_rng_state(), state)

    def test_strided_weights_are_saved_as_they_read(self, tmp_path):
        value = rc.ValueFunction(6, (8,))
        value.layers[0].weight = torch.nn.Parameter(torch.randn(6, 8).T)
        value.save_pretrained(tmp_path)
        assert_same(rc.ValueFunction.from_pretrained(tmp_path), value)

    def test_saving_over_the_folder_it_was_loaded_from(self, saved):
        value = rc.ValueFunction.from_pretrained(saved)
        with torch.no_grad():
            value.layers[0].weight.mul_(2)
        value.save_pretrained(saved)
        assert_same(rc.ValueFunction.from_pretrained(saved), value)

    def test_loaded_under_inference_mode_its_weights_can_still_be_watched_and_trained(self, saved):
        with torch.inference_mode():
            value = rc.ValueFunction.from_pretrained(saved, dtype=torch.bfloat16)
            gram = value.prepared().gram
            assert value.prepared().gram is gram
        value(torch.randn(2, 6)).sum().backward()
        assert value.layers[0].weight.grad is not None

    def test_a_provenance_that_is_no_json_leaves_the_old_files(self, saved):
        old = rc.ValueFunction.from_pretrained(saved)
        with pytest.raises(TypeError, match="not JSON serializable"):
            rc.ValueFunction(6, (9,), provenance={"when": torch.ones(1)}).save_pretrained(saved)
        assert_same(rc.ValueFunction.from_pretrained(saved), old)
        assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]

    @pytest.mark.parametrize("target", ["save", "write_json"])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
    def test_an_exception_in_the_middle_leaves_the_old_files(self, saved, monkeypatch, target, error):
        old = rc.ValueFunction.from_pretrained(saved)

        def fail(*_, **__):
            raise error("cut")

        monkeypatch.setattr(f"recontrol.value.function.{target}", fail)
        with pytest.raises(error, match="cut"):
            rc.ValueFunction(6, (9,)).save_pretrained(saved)
        assert_same(rc.ValueFunction.from_pretrained(saved), old)
        assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]

    def test_a_full_disk_names_the_file_and_leaves_the_old_ones(self, saved):
        """A limit on the size of files stands for the disk: writing past it fails half-way."""
        old, new = rc.ValueFunction.from_pretrained(saved), rc.ValueFunction(6, (4000,))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(OSError, match=r"could not write .*model\.safetensors.*the previous file, if any, is untouched"):
                new.save_pretrained(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_same(rc.ValueFunction.from_pretrained(saved), old)
        assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "value").write_text("mine")
        with pytest.raises(OSError, match="value"):
            rc.ValueFunction(6, (8,)).save_pretrained(tmp_path / "value")
        assert (tmp_path / "value").read_text() == "mine"
