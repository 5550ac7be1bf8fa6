"""The seam for edits: a subclass says where and how, and gets hooks, pause, proof and removal."""

import pytest
import torch
from controlled import hooks_on, llama, unchanged
from test_controller_models import PROMPT, logits_of
from torch import nn

from recontrol.decoding.editing import Editing
from recontrol.decoding.hooks import EditSite, attachments

pytestmark = pytest.mark.usefixtures("one_thread")


class Shift(Editing):
    """Adds 1 to the states that a layer reads, but for those of tokens that `rows` says."""

    def __init__(self, model, layer=None):
        super().__init__(model)
        self.seen = []
        if layer is not None:
            self.site = EditSite(self.owner.model.layers[layer])
        self.attach()

    def rows(self, given):
        return given["input_ids"] == 8

    def edit(self, hidden, rows):
        self.seen.append(rows)
        return torch.where(rows[..., None], hidden, hidden + 1)


def shifted(model, layer):
    """What a plain hook does."""
    module = model.lm_head if layer is None else model.model.layers[layer]
    keep = (PROMPT == 8)[..., None]
    hook = module.register_forward_pre_hook(lambda module, args: (torch.where(keep, args[0], args[0] + 1), *args[1:]))
    try:
        return logits_of(model, input_ids=PROMPT)
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_states_are_edited_at_the_site(layer):
    model = llama()
    assert (PROMPT == 8).any() and not (PROMPT == 8).all()
    expected = shifted(model, layer)
    with unchanged(model), Shift(model, layer) as editing:
        # The probes of the proof are not edited.
        assert editing.seen == []
        for given in ({"input_ids": PROMPT}, {"input_ids": PROMPT, "use_cache": False}):
            assert torch.equal(logits_of(model, **given), expected)
        with torch.no_grad():
            assert torch.equal(model(PROMPT).logits, expected)
        with editing.pause():
            assert not torch.equal(logits_of(model, input_ids=PROMPT), expected)
        assert len(editing.seen) == 3 and all(torch.equal(rows, PROMPT == 8) for rows in editing.seen)


@pytest.mark.parametrize(("first", "second"), [(None, 1), (0, None), (0, 1)])
def test_a_model_is_edited_once_wherever_the_site_is(first, second):
    model = llama()
    with Shift(model, first), pytest.raises(RuntimeError, match="what else edits states, is attached to this LlamaForCausalLM already"):
        Shift(model, second)
    assert hooks_on(model) == [] and attachments(model) == []


def test_a_site_is_found_by_position_or_by_name():
    site = EditSite(nn.Identity(), position=1)
    states, other = torch.zeros(2), torch.ones(2)
    assert site.states(("head", states), {}) is site.states(("head",), {"hidden_states": states}) is states
    assert site.replaced(("head", states, 3), {"x": 1}, other) == (("head", other, 3), {"x": 1})
    assert site.replaced(("head",), {"hidden_states": states, "x": 1}, other) == (("head",), {"hidden_states": other, "x": 1})
