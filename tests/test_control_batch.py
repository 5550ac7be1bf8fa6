"""The edit of a batch whose rows have controls of their own: what `rc.generate`, the plugin of vLLM and `Controller` have in common."""

import dataclasses
import re

import pytest
import torch
from controlled import Operations

import recontrol as rc
from recontrol.ascent.arguments import ROW_OPTIONS
from recontrol.ascent.ascend import ascend
from recontrol.decoding import control_batch
from recontrol.decoding.control import control_from_mapping
from recontrol.decoding.control_batch import ControlBatch

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN = 16
UNEDITED = "{} states stay unedited: they, or what the ascent makes of them, are not finite; a smaller step_size may help"


def value_function(seed, *hidden_dims, heads=1):
    torch.manual_seed(seed)
    return rc.ValueFunction(HIDDEN, hidden_dims or (24,), heads)


HELPFUL, HARMLESS, BOTH = value_function(1), value_function(2, 20, 12), value_function(3, heads=2)
CONTROLS = [
    rc.Control(HELPFUL, 0.5, 10),
    None,
    rc.Control(HARMLESS, 0.7, 5),
    rc.Control(HELPFUL, 1.0, 3),
    rc.Control(HELPFUL, 1.0, 30, radius=0.2),
    rc.Control(BOTH, 0.5, 8, head_weights=(1.0, -0.5)),
    rc.Control(BOTH, 0.5, 8, head_weights=(0.0, 1.0)),
    rc.Control(HELPFUL, 0.1, 20, target=0.4),
    rc.Control(HELPFUL, 0.5, 0),
    rc.Control(HELPFUL, 0.5, 30, radius=0.4),
]


def batch_of(controls, **options):
    batch = ControlBatch(**options)
    batch.assign(controls)
    return batch


def alone(states, control, **options):
    heads = None if control.head_weights is None else torch.tensor(control.head_weights, dtype=states.dtype)
    return rc.ascend(states, control.value, head_weights=heads, **{option.name: getattr(control, option.name) for option in ROW_OPTIONS}, **options)


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_each_row_is_edited_as_alone():
    hidden = torch.randn(len(CONTROLS), HIDDEN)
    before = hidden.clone()
    batch = batch_of(CONTROLS)
    edited = batch.edit(hidden)
    traced, trace = batch.edit_and_trace(hidden)
    assert torch.equal(hidden, before) and torch.equal(traced, edited) and batch.edited_rows == 2 * (len(CONTROLS) - 1)
    for row, control in enumerate(CONTROLS):
        state = hidden[row : row + 1]
        if control is None:
            assert torch.equal(edited[row], hidden[row]) and all(numbers[row] == 0 for numbers in trace)
            continue
        expected, path = alone(state, control, return_trace=True)
        assert torch.equal(edited[row : row + 1], expected)
        assert torch.equal(edited[row], hidden[row]) == (control.steps == 0)
        assert (trace.value_before[row], trace.value_after[row]) == (path[0, 0], path[0, -1])
        assert trace.edit_norm[row] == (expected - state).norm()


def test_one_control_is_for_however_many_rows_come():
    control = rc.Control(HELPFUL)
    batch = batch_of(control)
    for rows in (1, 4, 0):
        hidden = torch.randn(rows, HIDDEN)
        assert torch.equal(batch.edit(hidden), rc.ascend(hidden, HELPFUL))
    assert batch.edited_rows == 5


def test_a_batch_under_one_control_and_one_under_none():
    hidden = torch.randn(4, HIDDEN)
    control = rc.Control(HELPFUL)
    assert torch.equal(batch_of([control] * 4).edit(hidden), rc.ascend(hidden, HELPFUL))
    free = batch_of([None] * 4)
    assert free.edit(hidden).data_ptr() == hidden.data_ptr() and free.edited_rows == 0
    with pytest.raises(RuntimeError, match="4 states enter the logits, controls are known for 3"):
        batch_of([control] * 3).edit(hidden)


def test_rows_outside_of_the_mask_stay_as_they_are_and_do_not_count():
    hidden, mask = torch.randn(len(CONTROLS), HIDDEN), torch.arange(len(CONTROLS)) % 2 == 0
    batch = batch_of(CONTROLS)
    expected = batch.edit(hidden)
    edited = batch_of(CONTROLS).edit(hidden, mask)
    assert torch.equal(edited, torch.where(mask[:, None], expected, hidden)) and not torch.equal(edited, hidden)
    masked = batch_of(CONTROLS[0])
    masked.edit(hidden, mask)
    assert masked.edited_rows == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_numbers_that_are_not_finite_stay_as_they_are_and_are_told_once(dtype, caplog):
    control, far = rc.Control(HELPFUL, 0.5, 3), rc.Control(HELPFUL, 1e38, 30)
    hidden = torch.randn(4, HIDDEN).to(dtype)
    hidden[1, 3], hidden[2, 0] = float("nan"), float("inf")
    batch = batch_of([control, control, control, far])
    edited, trace = batch.edit_and_trace(hidden)
    assert torch.equal(edited[:1], rc.ascend(hidden[:1], HELPFUL, 0.5, 3))
    assert torch.equal(edited[1:].nan_to_num(), hidden[1:].nan_to_num())
    assert trace.value_after[3] == trace.value_before[3] and trace.edit_norm[3] == 0
    assert messages(caplog) == []
    assert batch.edited_rows == 1 and messages(caplog) == [UNEDITED.format(3)]
    batch.edit(hidden)
    batch.warn()
    assert len(messages(caplog)) == 1


def test_an_edit_beyond_the_range_of_half_precision_is_not_made(caplog):
    """It is finite in float32, in which it is computed."""
    hidden = torch.randn(3, HIDDEN).half()
    control = rc.Control(HELPFUL, 1e6, 1)
    assert torch.isfinite(alone(hidden.float(), control)).all() and not torch.isfinite(alone(hidden, control)).all(dim=1).any()
    batch = batch_of(control)
    assert torch.equal(batch.edit(hidden), hidden) and batch.edited_rows == 0
    assert messages(caplog) == [UNEDITED.format(3)]


def test_the_tensors_are_kept_while_the_controls_stay_the_same():
    batch = batch_of(list(CONTROLS))
    groups = batch._groups
    batch.assign(list(CONTROLS))
    assert batch._groups is groups
    batch.assign(CONTROLS[::-1])
    assert batch._groups is not groups


@pytest.mark.parametrize("controls", [CONTROLS, CONTROLS[4]], ids=["mixed", "one"])
def test_an_edit_neither_waits_for_the_device_nor_copies_from_the_host(controls):
    hidden, batch = torch.randn(len(CONTROLS), HIDDEN), batch_of(controls, backend="cpu")
    with Operations() as operations:
        batch.edit(hidden)
    assert operations.names.count("recontrol::ascend") >= 1
    # The values of the ascent's own arguments are looked at by the backend, not here.
    assert not {*Operations.UNCAPTURABLE} & {*operations.names}


def test_every_kind_of_control_is_tried_out_on_one_state(monkeypatch):
    rows = []
    monkeypatch.setattr(control_batch, "ascend", lambda hidden, *rest, **keywords: rows.append(len(hidden)) or ascend(hidden, *rest, **keywords))
    ControlBatch().try_out([control for control in CONTROLS if control is not None], torch.float32)
    assert rows == [1] * 6
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here"):
        ControlBatch("cpu").try_out([rc.Control(value_function(1, 8, 8, 8))], torch.float32)


@pytest.mark.parametrize("kind", [rc.Control, rc.Controller])
def test_settings_beyond_the_range_of_the_ascent_are_refused(kind):
    control = kind(HELPFUL, 0.5, 3, radius=1e39)
    control.check_range(torch.float64)
    with pytest.raises(ValueError, match=r"radius must be within the range of float32, found 1e\+39 in row 3"):
        control.check_range(torch.float32, " in row 3")


def test_a_mapping_has_the_fields_of_a_control():
    assert [each.name for each in dataclasses.fields(rc.Control)] == ["value", *(option.name for option in ROW_OPTIONS), "head_weights"]
    control = control_from_mapping({"value": "both", "steps": 3, "head_weights": [1, 0]}, {"both": BOTH}.get)
    assert (control.value, control.step_size, control.steps, control.head_weights) == (BOTH, 0.5, 3, (1.0, 0.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "here must be a mapping of names to settings, found int"),
        ({"value": "one", "alpha": 3}, "here: found alpha, wanted some of value, step_size, steps, radius, target, head_weights"),
        ({"value": "one", "steps": 3.5}, "here: steps must be int, found 3.5"),
        ({"value": "one", "radius": -1}, "here: radius must be finite and 0 or more, found -1.0"),
        ({"value": "none"}, "here: value must be ValueFunction, found None"),
    ],
    ids=str,
)
def test_a_mapping_that_is_no_control_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        control_from_mapping(given, {"one": HELPFUL}.get, "here")
