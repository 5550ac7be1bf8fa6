"""What a method is to a comparison: nothing is added to, and nothing left on, the model that `generate_batch` alone would have."""

import contextlib

import pytest
import torch
from controlled import hooks_on, states_read
from generating import ENDING, NEW, PROMPTS, TOKENIZER, double_llama, value
from transformers import LogitsProcessor, LogitsProcessorList

import recontrol as rc
from recontrol.decoding.batches import generate_batch
from recontrol.methods.base import Method, Together, Training, Uncontrolled
from recontrol.methods.best_of_n import BestOfN
from recontrol.methods.control import ReControl

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "seed": 5, "eos_token_id": ENDING}


class Logging(LogitsProcessor):
    """Notes that it was called."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __call__(self, input_ids, scores):
        self.calls.append(self.name)
        return scores


class Marked(Method):
    """Writes a mark before the prompt, notes what is told to it, and has a processor that notes its calls."""

    kind = "marked"

    def __init__(self, mark, trained=None, calls=None):
        self.mark, self.trained, self.calls, self.told = mark, trained or Training(), calls, []

    @property
    def settings(self):
        return {self.mark: 0.25}

    @property
    def identity(self):
        return self.mark

    @property
    def training(self):
        return self.trained

    def write(self, prompt):
        return f"{self.mark} {prompt}"

    def applied(self, model, tokenizer, prompts, options):
        self.told.append((list(prompts), dict(options)))
        return contextlib.nullcontext([] if self.calls is None else [Logging(self.mark, self.calls)])


class Looking(Uncontrolled):
    """Keeps the states that are read, as the methods before it have left them."""

    @contextlib.contextmanager
    def applied(self, model, tokenizer, prompts, options):
        with states_read(model) as seen:
            object.__setattr__(self, "seen", seen)
            yield []


@pytest.fixture(scope="module")
def model():
    return double_llama()


def responses(method, model, **options):
    return method.respond(model, TOKENIZER, PROMPTS, **{**SAMPLING, **options}).responses


def test_the_uncontrolled_method_is_generation_as_it_is(model):
    assert responses(Uncontrolled(), model) == generate_batch(model, TOKENIZER, PROMPTS, **SAMPLING).responses
    assert Uncontrolled().training == Training(0, 0.0, 0) and Uncontrolled().divergence is None
    assert Uncontrolled().label == "uncontrolled" and Uncontrolled().edit(torch.ones(1, 4)) is None


@pytest.mark.parametrize("changes", [{}, {"radius": 1.0}, {"target": 0.5}], ids=["upward", "radius", "target"])
def test_recontrol_is_a_controller_around_generation(model, changes):
    method = ReControl(rc.Control(value(64), 3.0, 9, **changes))
    with rc.Controller(value(64), 3.0, 9, **changes).attach(model), states_read(model) as expected:
        by_hand = generate_batch(model, TOKENIZER, PROMPTS, **SAMPLING).responses
    # Looks at states where the method has put its hook already.
    looking = Together([method, Looking()])
    found = responses(looking, model)
    assert found == responses(method, model) == by_hand != responses(Uncontrolled(), model)
    # Also those of rows that had ended: the method knows the ends that were asked for.
    assert len(looking.methods[1].seen) == len(expected) and all(map(torch.equal, looking.methods[1].seen, expected))
    assert any(response.finish == "eos" and len(response.token_ids) < NEW for response in found)
    assert hooks_on(model) == []


def test_the_edit_of_recontrol_is_the_ascent():
    control = rc.Control(value(48, heads=2), 2.0, 5, head_weights=[1.0, -2.0], radius=0.7)
    states = torch.randn(3, 32, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert torch.equal(ReControl(control).edit(states), rc.ascend(states, control.value, 2.0, 5, head_weights=weights, radius=0.7))


def test_recontrol_says_what_it_is():
    method = ReControl(rc.Control(value(64), 0.5, 30, radius=2.0))
    assert method.settings == {"alpha": 0.5, "n": 30, "radius": 2.0} and method.label == "RE-Control (alpha 0.5, n 30, radius 2)"
    assert method.training.parameters == 32 * 64 + 64 + 64 + 1 and method.training.seconds is None
    with pytest.raises(TypeError, match=r"control must be a recontrol.Control, found ValueFunction"):
        ReControl(value(64))
    with pytest.raises(ValueError, match="unknown backend"):
        ReControl(rc.Control(value(64)), backend="abacus")


def test_texts_are_written_by_the_last_method_first():
    assert Together([Marked("one"), Marked("two")]).write("prompt") == "one two prompt"


def test_logits_go_through_the_methods_in_order_and_then_through_the_callers_processors(model):
    calls = []
    method = Together([Marked("1", calls=calls), Uncontrolled(), Marked("2", calls=calls)])
    before = [Logging("mine", calls)]
    responses(method, model, logits_processor=before)
    assert calls[:3] == ["1", "2", "mine"] and calls == calls[:3] * (len(calls) // 3)
    assert len(before) == 1


def test_methods_are_told_the_prompts_as_they_were_given_and_respond_to_them_as_written(model):
    method = Marked("!")
    found = responses(method, model, logits_processor=LogitsProcessorList())
    assert method.told == [(PROMPTS, {"do_sample": True, "top_k": 0, "eos_token_id": ENDING})]
    assert found == generate_batch(model, TOKENIZER, [f"! {prompt}" for prompt in PROMPTS], **SAMPLING).responses
    assert found != responses(Uncontrolled(), model)


def test_a_prompt_and_control_together_are_both(model):
    control = rc.Control(value(64), 3.0, 9)
    together = Together([Marked("!"), ReControl(control)])
    with rc.Controller(value(64), 3.0, 9).attach(model):
        by_hand = generate_batch(model, TOKENIZER, [f"! {prompt}" for prompt in PROMPTS], **SAMPLING).responses
    assert responses(together, model) == by_hand
    states = torch.randn(2, 32, dtype=torch.float64)
    assert torch.equal(together.edit(states), ReControl(control).edit(states))
    assert together.label == "marked (! 0.25) + RE-Control (alpha 3, n 9)"


def test_what_methods_together_say_of_themselves():
    parts = [Marked("a", Training(3, 2.5, 100)), Marked("b", Training(4, 1.0, 300))]
    assert Together(parts).training == Training(7, 3.5, 300)
    assert Together([*parts, Marked("c", Training(1, None, None))]).training == Training(8, None, None)
    assert Together([Uncontrolled()]).training == Training()
    assert Together(parts).settings == {"a": 0.25, "b": 0.25} and Together(parts).identity == ["a", "b"]
    assert Together(parts).edit(torch.ones(1, 2)) is None


def test_what_cannot_be_put_together_is_refused(model):
    with pytest.raises(ValueError, match="found no methods to put together"):
        Together([])
    with pytest.raises(ValueError, match=r"best-of-n \(samples 2\) chooses between responses on its own"):
        Together([Uncontrolled(), BestOfN(2, len)])
    control = ReControl(rc.Control(value(64)))
    with pytest.raises(RuntimeError, match="attached to this LlamaForCausalLM already"):
        responses(Together([control, control]), model)
    assert hooks_on(model) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_return_sequences": 2}, "found 2 responses to 1 prompts"),
        ({"max_length": 9}, "max_length=9 is not taken here"),
        ({"stop_strings": [""]}, "stop_strings must be texts that are not empty"),
    ],
)
def test_errors_of_generation_come_through_and_leave_the_model_as_it_was(model, changes, message):
    method = ReControl(rc.Control(value(64)))
    with pytest.raises(ValueError, match=message):
        method.respond(model, TOKENIZER, ["or"], **{**SAMPLING, **changes})
    with pytest.raises(ValueError, match="there are no prompts"):
        method.respond(model, TOKENIZER, [])
    assert hooks_on(model) == []
