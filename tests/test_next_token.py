"""The effect of control on the next token at given states."""

import pytest
import torch
from controlled import unchanged
from generating import double_llama, value
from test_generate_trace import scaled

import recontrol as rc
from recontrol.evaluation import next_token
from recontrol.evaluation.next_token import path_of_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded(count=20):
    torch.manual_seed(5)
    return torch.randn(count, 32, dtype=torch.float64)


@pytest.mark.parametrize("make, scale", [(double_llama, 1.0), (scaled, 0.25)], ids=["llama", "logits scaled after the output embedding"])
@pytest.mark.parametrize("options", [{}, {"radius": 1.0}, {"target": 1.5}])
def test_the_path_at_given_states(monkeypatch, make, scale, options):
    monkeypatch.setattr(next_token, "STATES_AT_ONCE", 7)
    model, climbed, states = make(), value(64), recorded()
    climbed.reward_mean, climbed.reward_std = (3.0,), (2.0,)
    points = path_of_steps(model, states, climbed, 0.4, [0, 3, 9], **options)
    assert [(point.step_size, point.steps) for point in points] == [(0.4, 0), (0.4, 3), (0.4, 9)]
    head = model.get_output_embeddings()
    for point in points:
        edited = rc.oracle.ascend(states, climbed, 0.4, point.steps, **options)
        with torch.no_grad():
            log_p, log_q = ((scale * head(each)).log_softmax(-1) for each in (edited, states))
            v = climbed(edited).mean()
        wanted = [v, 2 * v + 3, (edited - states).norm(dim=-1).mean(), (log_p.exp() * (log_p - log_q)).sum(-1).mean()]
        torch.testing.assert_close([point.value, point.reward, point.edit_norm, point.kl], [float(each) for each in wanted], rtol=1e-5, atol=1e-6)
    assert points[0].edit_norm == points[0].kl == 0 < points[1].kl < points[2].kl


def test_the_path_of_a_sum_of_heads_and_what_is_asked_wrongly():
    model, climbed, states = double_llama(), value(48, heads=2), recorded()
    with unchanged(model):
        (point,) = path_of_steps(model, states, climbed, 0.4, [5], head_weights=[1.0, -2.0])
        weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
        edited = rc.oracle.ascend(states, climbed, 0.4, 5, head_weights=weights)
        assert point.value == pytest.approx(float((climbed(edited).detach() @ weights).mean()))
        with pytest.raises(ValueError, match="the value function has 2 heads"):
            path_of_steps(model, states, climbed, 0.4)
        for given in (states[:0], states[0], states[:, :5], None):
            with pytest.raises(ValueError, match=r"states must be a tensor of shape \(states, 32\)"):
                path_of_steps(model, given, value(64), 0.4)
        with pytest.raises(ValueError, match="no numbers of steps"):
            path_of_steps(model, states, value(64), 0.4, [])
