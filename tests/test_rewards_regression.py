"""UltraRM's architecture, on a tiny random checkpoint with the names of the published one's weights."""

import pytest
import torch
from safetensors.torch import save_file
from test_rewards import REWARD
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from recontrol.data.rewards import RewardModel, reward_name

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "Human: {prompt}\nAssistant: {response}"


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=8192, initializer_range=0.5, **sizes)).eval(), torch.randn(1, 16)


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """Written by hand, so that it does not follow from the class under test."""
    folder = tmp_path_factory.mktemp("ultra")
    body, head = parts
    tensors = {f"model.{name}": tensor.clone() for name, tensor in body.state_dict().items()}
    save_file({**tensors, "regression_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    config = body.config.to_dict() | {"architectures": ["LlamaRewardModel"], "model_type": "llama"}
    LlamaConfig.from_dict(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(REWARD).save_pretrained(folder)
    return folder


def by_hand(parts, ids):
    body, head = parts
    with torch.no_grad():
        return float(body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ head[0])


PAIRS = [("Who are you?", " A model."), ("Tell me a story about a film", " It begins in the rain and ends there too, years later."), ("Hi", " Hi")]


def test_the_reward_is_the_head_on_the_last_token(parts, checkpoint):
    reward = RewardModel.from_pretrained(checkpoint, batch_size=3)
    texts = [TEMPLATE.format(prompt=prompt, response=response.strip()) for prompt, response in PAIRS]
    wanted = [by_hand(parts, reward.tokenizer(text).input_ids) for text in texts]
    found = reward(*map(list, zip(*PAIRS, strict=True)))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert len(set(found)) == 3


def test_padding_on_either_side_does_not_change_it(parts, checkpoint):
    reward = RewardModel.from_pretrained(checkpoint)
    ids = reward.tokenizer("A model.").input_ids
    # A reward model leaves the config of a model without padding token as it is.
    assert reward.model.config.pad_token_id is None
    reward.model.config.pad_token_id = 0
    for padded, mask in (([0, 0, *ids], [0, 0] + [1] * len(ids)), ([*ids, 0, 0, 0], [1] * len(ids) + [0] * 3)):
        with torch.no_grad():
            found = reward.model(input_ids=torch.tensor([padded]), attention_mask=torch.tensor([mask])).logits
        assert found.shape == (1, 1) and float(found) == pytest.approx(by_hand(parts, ids), rel=1e-4, abs=1e-4)


def test_dtype_and_template_are_the_callers(checkpoint):
    reward = RewardModel.from_pretrained(checkpoint, dtype=torch.bfloat16, template="{prompt}{response}")
    assert reward.model.dtype == torch.bfloat16 and isinstance(reward(["Hi"], [" Hi"])[0], float)
    plain = RewardModel.from_pretrained(checkpoint, template="{prompt}{response}")
    assert plain(["Hi"], [" there"]) != RewardModel.from_pretrained(checkpoint)(["Hi"], [" there"])


def test_it_is_one_head(checkpoint):
    assert reward_name(RewardModel.from_pretrained(checkpoint)) == f"{checkpoint}, template {TEMPLATE!r}"


def test_a_checkpoint_that_lacks_part_of_the_body(parts, checkpoint, tmp_path):
    body, head = parts
    tensors = {f"model.{name}": tensor.clone() for name, tensor in body.state_dict().items() if "layers.1.mlp" not in name}
    save_file({**tensors, "regression_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match=r"is no reward model: its checkpoint has no weights for model\.layers\.1\.mlp"):
        RewardModel.from_pretrained(tmp_path)
