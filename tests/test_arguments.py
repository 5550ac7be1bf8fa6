"""What an ascent refuses, with which error and which words; and that the check in C++ and the one in Python refuse the same."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import RUNNING

import recontrol as rc
from recontrol.ascent.arguments import AscentArguments

SIZE, ROWS = 5, 4
NAN, INF = math.nan, math.inf
FLOATS = "float32, bfloat16, float16, float64"


@pytest.fixture
def hidden():
    return torch.randn(ROWS, SIZE)


@pytest.fixture
def value():
    return rc.ValueFunction(SIZE, (7,))


@pytest.fixture(params=["auto", *RUNNING, "oracle"])
def climb(request):
    """The ascent of each backend, and the public oracle, which promises the same errors."""
    if request.param == "oracle":
        return rc.oracle.ascend
    return lambda *arguments, **keywords: rc.ascend(*arguments, **{"backend": request.param, **keywords})


def entries(dtype=torch.float32, **places: float):
    """(ROWS,), all ones but for the places that are named: entries(_2=-1)."""
    tensor = torch.ones(ROWS, dtype=dtype)
    for place, number in places.items():
        tensor[int(place[1:])] = number
    return tensor


BAD_VALUES = [
    ({"step_size": -0.5}, "step_size must be finite and 0 or more, found -0.5 in rows 0, 1, 2, 3"),
    ({"step_size": NAN}, "step_size must be finite and 0 or more, found nan in rows 0, 1, 2, 3"),
    ({"step_size": INF}, "step_size must be finite and 0 or more, found inf in rows 0, 1, 2, 3"),
    ({"step_size": -1}, "step_size must be finite and 0 or more, found -1.0 in rows 0, 1, 2, 3"),
    ({"step_size": 1e39}, "step_size must be a number that float32 can hold, found 1e+39"),
    ({"step_size": entries(_2=-1)}, "step_size must be finite and 0 or more, found -1.0 in row 2"),
    ({"step_size": entries(_1=NAN)}, "step_size must be finite and 0 or more, found nan in row 1"),
    ({"step_size": entries(_1=INF, _3=-2)}, "step_size must be finite and 0 or more, found inf in rows 1, 3"),
    # Too large only once it is rounded to float32.
    ({"step_size": entries(torch.float64, _0=1e39)}, "step_size must be finite and 0 or more, found inf in row 0"),
    ({"steps": -1}, "steps must be 0 or more, found -1 in rows 0, 1, 2, 3"),
    ({"steps": 2**63}, "steps must be a number that int64 can hold, found 9223372036854775808"),
    ({"steps": -(2**70)}, "steps must be a number that int64 can hold, found -1180591620717411303424"),
    ({"steps": entries(torch.int32, _3=-7)}, "steps must be 0 or more, found -7 in row 3"),
    ({"radius": -0.5}, "radius must be finite and 0 or more, found -0.5 in rows 0, 1, 2, 3"),
    ({"radius": NAN}, "radius must be finite and 0 or more, found nan in rows 0, 1, 2, 3"),
    ({"radius": INF}, "radius must be finite and 0 or more, found inf in rows 0, 1, 2, 3"),
    ({"radius": entries(_0=-1)}, "radius must be finite and 0 or more, found -1.0 in row 0"),
    ({"radius": entries(_2=NAN)}, "radius must be finite and 0 or more, found nan in row 2"),
    ({"target": NAN}, "target must be finite, found nan in rows 0, 1, 2, 3"),
    ({"target": -INF}, "target must be finite, found -inf in rows 0, 1, 2, 3"),
    ({"target": entries(_3=NAN)}, "target must be finite, found nan in row 3"),
    ({"head_weights": torch.tensor([NAN])}, "head_weights must be finite, found nan in head 0"),
    ({"head_weights": [INF]}, "head_weights must be finite, found inf in head 0"),
    # A masked row's own numbers must still be numbers.
    ({"step_size": entries(_2=NAN), "mask": entries(_2=0) > 0}, "step_size must be finite and 0 or more, found nan in row 2"),
]

BAD_SHAPES = [
    *[
        ({name: torch.ones(3, dtype=dtype)}, f"{name} must be a scalar or have shape (4,), one entry a row, found (3,)")
        for name, dtype in (("step_size", torch.float32), ("steps", torch.int64), ("mask", torch.bool), ("radius", torch.float32), ("target", torch.float32))
    ],
    ({"step_size": torch.ones(ROWS, 1)}, "step_size must be a scalar or have shape (4,), one entry a row, found (4, 1)"),
    ({"steps": torch.ones(0, dtype=torch.int64)}, "steps must be a scalar or have shape (4,), one entry a row, found (0,)"),
    ({"head_weights": torch.ones(2)}, "head_weights must have shape (1,), found (2,)"),
    ({"head_weights": torch.ones(1, 1)}, "head_weights must have shape (1,), found (1, 1)"),
    ({"head_weights": 1.0}, "head_weights must have shape (1,), found ()"),
    ({"head_weights": []}, "head_weights must have shape (1,), found (0,)"),
    *[
        ({name: torch.ones(shape, dtype=dtype, device="meta")}, f"{name} is on meta, hidden on cpu; move one of them")
        for name, dtype in (("step_size", torch.float32), ("steps", torch.int64), ("mask", torch.bool), ("radius", torch.float32), ("target", torch.float32))
        for shape in ((ROWS,), ())
    ],
    ({"head_weights": torch.ones(1, device="meta")}, "head_weights is on meta, hidden on cpu; move one of them"),
]

BAD_TYPES = [
    *[
        ({name: wrong}, f"{name} must be a number or a tensor, found {kind}")
        for name in ("step_size", "radius", "target")
        for wrong, kind in (("0.5", "str"), ([0.5] * ROWS, "list"), (True, "bool"), (1j, "complex"), (np.ones(ROWS), "ndarray"))
    ],
    *[
        ({name: torch.ones(ROWS, dtype=dtype)}, f"{name} must be a number or a tensor of real numbers, found {dtype}")
        for name in ("step_size", "radius", "target")
        for dtype in (torch.bool, torch.complex64)
    ],
    ({"step_size": None}, "step_size must be a number or a tensor, found NoneType"),
    ({"steps": None}, "steps must be a number or a tensor, found NoneType"),
    ({"steps": "3"}, "steps must be a number or a tensor, found str"),
    ({"steps": [3] * ROWS}, "steps must be a number or a tensor, found list"),
    ({"steps": 3.0}, "steps must be an integer or an integer tensor, found 3.0"),
    ({"steps": True}, "steps must be an integer or an integer tensor, found True"),
    ({"steps": torch.ones(ROWS)}, "steps must be an integer or an integer tensor, found torch.float32"),
    ({"steps": torch.ones(ROWS, dtype=torch.bool)}, "steps must be an integer or an integer tensor, found torch.bool"),
    ({"steps": torch.ones(ROWS, dtype=torch.complex64)}, "steps must be a number or a tensor of real numbers, found torch.complex64"),
    ({"mask": torch.ones(ROWS)}, "mask must be a bool tensor, found torch.float32"),
    ({"mask": torch.ones(ROWS, dtype=torch.uint8)}, "mask must be a bool tensor, found torch.uint8"),
    ({"mask": [True] * ROWS}, "mask must be a bool tensor, found list"),
    ({"mask": True}, "mask must be a bool tensor, found bool"),
    ({"head_weights": "one"}, "head_weights must be a tensor or a list of 1 numbers, found 'one'"),
    ({"head_weights": [None]}, "head_weights must be a tensor or a list of 1 numbers, found [None]"),
    ({"head_weights": [[1.0], [1.0, 2.0]]}, "head_weights must be a tensor or a list of 1 numbers, found [[1.0], [1.0, 2.0]]"),
    ({"head_weights": torch.tensor([True])}, "head_weights must be real numbers, found torch.bool"),
    ({"head_weights": [1j]}, "head_weights must be real numbers, found torch.complex64"),
]


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def named(cases):
    return [pytest.param(keywords, message, id=message[:60]) for keywords, message in cases]


class TestOptions:
    @pytest.mark.parametrize("keywords,message", named(BAD_VALUES))
    def test_a_value_that_cannot_be_meant(self, climb, hidden, value, keywords, message):
        with refused(ValueError, message):
            climb(hidden, value, **keywords)

    @pytest.mark.parametrize("keywords,message", named(BAD_SHAPES))
    def test_a_wrong_shape_or_device(self, climb, hidden, value, keywords, message):
        with refused(ValueError, message):
            climb(hidden, value, **keywords)

    @pytest.mark.parametrize("keywords,message", named(BAD_TYPES))
    def test_a_wrong_type(self, climb, hidden, value, keywords, message):
        with refused(TypeError, message):
            climb(hidden, value, **keywords)

    @pytest.mark.parametrize("wrong", ["gpu", "", "CPU", "torch ", None, ["cpu"], 3])
    def test_an_unknown_backend(self, hidden, value, wrong):
        with refused(ValueError, f"unknown backend {wrong!r}; choose one of 'auto', 'cpu', 'torch', 'cuda', 'triton', 'oracle'"):
            rc.ascend(hidden, value, backend=wrong)

    def test_several_heads_need_weights(self, climb, hidden):
        value = rc.ValueFunction(SIZE, (7,), num_heads=3)
        with refused(ValueError, "the value function has 3 heads: give head_weights, a tensor of 3 weights"):
            climb(hidden, value)
        with refused(ValueError, "head_weights must have shape (3,), found (1,)"):
            climb(hidden, value, head_weights=torch.ones(1))
        with refused(ValueError, "head_weights must be finite, found nan in heads 1, 2"):
            climb(hidden, value, head_weights=[1.0, NAN, INF])

    def test_an_error_leaves_the_inputs_alone(self, climb, hidden, value):
        before = hidden.clone()
        with pytest.raises(ValueError, match="radius"):
            climb(hidden, value, radius=-1.0)
        assert torch.equal(hidden, before)


class TestHiddenStates:
    @pytest.mark.parametrize("wrong", [NAN, INF, -INF])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rows_that_are_not_finite_are_named(self, climb, hidden, value, wrong, dtype):
        hidden = hidden.to(dtype)
        hidden[2, SIZE - 1] = wrong
        with refused(ValueError, "hidden states must be finite; NaN or infinite values in row 2 of 4"):
            climb(hidden, value)
        hidden[0, 0] = wrong
        with refused(ValueError, "hidden states must be finite; NaN or infinite values in rows 0, 2 of 4"):
            climb(hidden, value)

    @pytest.mark.parametrize("count,rest", [(8, ""), (9, " and 1 more"), (12, " and 4 more")])
    def test_after_eight_rows_the_others_are_counted(self, climb, value, count, rest):
        hidden = torch.randn(13, SIZE)
        hidden[1 : 1 + count, 3] = NAN
        with refused(ValueError, f"hidden states must be finite; NaN or infinite values in rows 1, 2, 3, 4, 5, 6, 7, 8{rest} of 13"):
            climb(hidden, value)
        with refused(ValueError, f"steps must be 0 or more, found -2 in rows 0, 1, 2, 3, 4, 5, 6, 7{' and 5 more'}"):
            climb(hidden, value, steps=-2)

    def test_every_place_is_looked_at(self, climb):
        """Also behind the last full vector of the processor, and in the rows of a larger buffer."""
        value = rc.ValueFunction(37, (7,))
        buffer = torch.randn(2, 64)
        hidden = buffer[:, 5:42]
        # What lies beside the states is nobody's business.
        buffer[:, 42:] = NAN
        buffer[:, :5] = INF
        climb(hidden, value, steps=1)
        for place in range(37):
            spoilt = buffer.clone()[:, 5:42]
            spoilt[1, place] = NAN
            with refused(ValueError, "hidden states must be finite; NaN or infinite values in row 1 of 2"):
                climb(spoilt, value, steps=1)

    def test_rows_that_do_not_move_may_hold_anything(self, climb, value):
        hidden = torch.randn(ROWS, SIZE)
        hidden[1], hidden[3, 2] = NAN, INF
        mask, steps = torch.tensor([True, False, True, False]), torch.tensor([3, 0, 3, 0])
        for keywords in ({"mask": mask}, {"steps": steps}, {"mask": torch.zeros(ROWS, dtype=torch.bool)}, {"steps": 0}):
            edited = climb(hidden, value, **keywords)
            assert torch.equal(edited[[1, 3]].view(torch.int32), hidden[[1, 3]].view(torch.int32))
        # And the others move as if it were not there.
        clean = torch.where(torch.isfinite(hidden), hidden, 0)
        edited, wanted = climb(hidden, value, steps=steps), climb(clean, value, steps=steps)
        assert torch.equal(edited[[0, 2]], wanted[[0, 2]]) and not torch.equal(edited[[0, 2]], hidden[[0, 2]])
        # One of them moves: it alone is named.
        with refused(ValueError, "hidden states must be finite; NaN or infinite values in row 3 of 4"):
            climb(hidden, value, mask=torch.tensor([True, False, True, True]))

    @pytest.mark.parametrize("shape", [(ROWS, SIZE + 1), (ROWS, SIZE - 1), (SIZE,), (2, 2, SIZE), (), (SIZE, ROWS), (0,), (ROWS, 0)], ids=str)
    def test_a_wrong_shape(self, climb, value, shape):
        with refused(ValueError, f"hidden must have shape (rows, 5) for this value function, found {shape}"):
            climb(torch.zeros(shape), value)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
    def test_a_wrong_dtype(self, climb, value, dtype):
        with refused(TypeError, f"hidden must be a tensor of {FLOATS}, found {dtype}"):
            climb(torch.zeros(ROWS, SIZE).to(dtype), value)

    @pytest.mark.parametrize("wrong", [[[0.0] * SIZE], np.zeros((1, SIZE)), None, 1.0], ids=lambda wrong: type(wrong).__name__)
    def test_no_tensor(self, climb, value, wrong):
        with refused(TypeError, f"hidden must be a tensor of {FLOATS}, found {wrong.dtype if isinstance(wrong, np.ndarray) else type(wrong).__name__}"):
            climb(wrong, value)

    def test_another_device_than_the_weights(self, climb, hidden, value):
        with refused(ValueError, "hidden is on meta, the value function on cpu; move one of them"):
            climb(hidden.to("meta"), value)
        with refused(ValueError, "hidden is on cpu, the value function on meta; move one of them"):
            climb(hidden, rc.ValueFunction(SIZE, (7,)).to("meta"))
        value.layers[1].to("meta")
        with refused(ValueError, "hidden is on cpu, the value function on cpu, meta; move one of them"):
            climb(hidden, value)


class TestValueFunction:
    @pytest.mark.parametrize("wrong", [torch.nn.Linear(SIZE, 1), "value", None, lambda hidden: hidden.sum(1)], ids=["Linear", "str", "NoneType", "function"])
    def test_is_one_of_ours(self, climb, hidden, wrong):
        with refused(TypeError, f"value must be a recontrol.ValueFunction, found {type(wrong).__name__}"):
            climb(hidden, wrong)

    def test_float64_goes_with_float64_only(self, climb, hidden, value):
        with refused(TypeError, "float64 goes with float64 only: hidden is torch.float64, the value function is torch.float32"):
            climb(hidden.double(), value)
        for dtype in (torch.float32, torch.bfloat16):
            with refused(TypeError, f"float64 goes with float64 only: hidden is {dtype}, the value function is torch.float64"):
                climb(hidden.to(dtype), rc.ValueFunction(SIZE, (7,)).double())

    def test_weights_share_a_dtype(self, climb, hidden, value):
        value.layers[1].to(torch.bfloat16)
        with refused(TypeError, f"the weights of the value function must share one dtype of {FLOATS}, found ['torch.bfloat16', 'torch.float32']"):
            climb(hidden, value)
        value.float().layers[0].bias.data = torch.zeros(7, dtype=torch.float16)
        with refused(TypeError, f"the weights of the value function must share one dtype of {FLOATS}, found ['torch.float16', 'torch.float32']"):
            climb(hidden, value)

    def test_weights_are_of_a_dtype_that_can_be_computed_with(self, climb, hidden, value):
        with refused(TypeError, f"the weights of the value function must share one dtype of {FLOATS}, found ['torch.float8_e4m3fn']"):
            climb(hidden, value.to(torch.float8_e4m3fn))


def test_one_number_stands_for_all_rows(climb, hidden, value):
    """As a number, a tensor without dimensions, with one entry, of another dtype, or with an entry a row."""
    keywords = {"step_size": 0.25, "steps": 3, "radius": 0.5, "target": 2.0}
    wanted = climb(hidden, value, **keywords)
    for shape in ((), (1,), (ROWS,)):
        for floating, whole in ((torch.float32, torch.int64), (torch.float64, torch.int32), (torch.bfloat16, torch.uint8)):
            spread = {name: torch.full(shape, number, dtype=whole if name == "steps" else floating) for name, number in keywords.items()}
            assert torch.equal(climb(hidden, value, mask=torch.ones(shape, dtype=torch.bool), **spread), wanted)
        assert torch.equal(climb(hidden, value, mask=torch.zeros(shape, dtype=torch.bool), **keywords), hidden)
    assert torch.equal(climb(hidden, value, head_weights=[1], **keywords), wanted)
    # The numbers matter: others give another result.
    for name, number in (("step_size", 0.125), ("steps", 1), ("radius", 0.01), ("target", -2.0)):
        assert not torch.equal(climb(hidden, value, **{**keywords, name: number}), wanted)


NUMBERS = st.sampled_from([0.0, -0.0, 0.5, 3e38, 1e-45, -1e-45, -0.5, NAN, INF, -INF])
SOUND_NUMBERS = st.sampled_from([0.0, -0.0, 0.5, 3e38, 1e-45])


@st.composite
def ascents(draw) -> AscentArguments:
    """Arguments of which each may be unsound, though most are sound, so that an only culprit is seen too."""
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    culprits = draw(st.sets(st.sampled_from(["hidden", "step_size", "steps", "radius", "target", "head_weights"]), max_size=2))

    def numbers(name: str, count: int) -> torch.Tensor:
        return torch.tensor(draw(st.lists(NUMBERS if name in culprits else SOUND_NUMBERS, min_size=count, max_size=count)), dtype=torch.float32)

    hidden = torch.zeros(rows, columns + 3)[:, 1 : columns + 1]
    if rows and "hidden" in culprits:
        for row, column, wrong in draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1), NUMBERS), max_size=3)):
            hidden[row, column] = wrong
    steps = draw(st.lists(st.integers(-1 if "steps" in culprits else 0, 2), min_size=rows, max_size=rows))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows))
    return AscentArguments(
        # As a view of a wider buffer, now and then.
        hidden=hidden.to(dtype) if draw(st.booleans()) else hidden.contiguous().to(dtype),
        step_size=numbers("step_size", rows),
        steps=torch.tensor(steps, dtype=torch.int64),
        mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
        radius=numbers("radius", rows) if draw(st.booleans()) else None,
        target=numbers("target", rows) if draw(st.booleans()) else None,
        head_weights=numbers("head_weights", draw(st.integers(1, 3))),
    )


def sound(arguments: AscentArguments) -> bool:
    return torch.ops.recontrol_cpu.sound(
        arguments.hidden, arguments.step_size, arguments.steps, arguments.mask, arguments.radius, arguments.target, arguments.head_weights
    )


def refusal(arguments: AscentArguments) -> str | None:
    try:
        arguments.check()
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=300, deadline=None)
@given(arguments=ascents())
def test_both_checks_agree(arguments):
    assert sound(arguments) == (refusal(arguments) is None), refusal(arguments)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", ["hidden", "step_size", "steps", "radius", "target", "head_weights"])
def test_both_checks_see_a_single_culprit(name, place):
    fine = AscentArguments(torch.zeros(3, SIZE), torch.zeros(3), torch.ones(3, dtype=torch.int64), None, torch.zeros(3), torch.zeros(3), torch.zeros(3))
    assert sound(fine) and refusal(fine) is None
    for wrong in [-1] if name == "steps" else [NAN, INF, -INF] if name in ("hidden", "target", "head_weights") else [NAN, INF, -INF, -1e-45, -1]:
        spoilt = getattr(fine, name).clone()
        spoilt[place] = wrong
        arguments = fine._replace(**{name: spoilt})
        assert not sound(arguments) and refusal(arguments).startswith(name.split("_")[0])
        # A dead row's hidden state may be anything, its numbers may not.
        dead = arguments._replace(mask=torch.arange(3) != place)
        assert sound(dead) == (refusal(dead) is None) == (name == "hidden")
