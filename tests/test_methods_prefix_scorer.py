"""The prefix scorer: every candidate's state is what a forward call over the whole text gives, and the generation notices nothing."""

import logging
import threading

import pytest
import torch
import transformers
from controlled import CACHE, hooks_on, llama, read_states
from generating import double_llama
from generating import value as value_function
from test_controller_models import MODELS
from test_generation import Letters
from transformers import DynamicCache

import recontrol as rc
from recontrol.decoding.recording import record_hidden_states
from recontrol.methods import ReControl, Together, Training, Uncontrolled
from recontrol.methods.reranking import CandidateStates, PrefixScorer

PROMPTS = ["To be", "or not", "to be, that is", "?"]
# In float64 "eager" attention turns what is padded into NaN: transformers computes its softmax in float32, where float64's lowest number is -inf.
EQUALLY_LONG = ["To be", "or no", "t, to", "e, th"]
TOKENIZER = Letters()
VOCABULARY, NEW, K = 98, 4, 5
EPS = torch.finfo(torch.float32).eps
SAMPLING = {"do_sample": True, "top_k": 0, "eos_token_id": None}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return double_llama()


@pytest.fixture(scope="module")
def scorer():
    return PrefixScorer(value_function(64), 3.0, K)


class Spy(transformers.LogitsProcessor):
    """Keeps what goes into the sampling."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append((input_ids.clone(), scores.clone()))
        return scores


def steps_of(method, model, prompts=PROMPTS, **options):
    """The batch, and each step's (input_ids, scores)."""
    spy = Spy()
    options = {"max_new_tokens": NEW, "seed": 3, **SAMPLING, **options}
    return method.respond(model, TOKENIZER, prompts, logits_processor=[spy], **options), spy.steps


def wanted_scores(model, method, text, normalised=False):
    """(vocabulary,) from forward calls over one text without padding and without a cache; where none is -inf, what is added up."""
    with torch.no_grad():
        logits = model(torch.tensor([text]), use_cache=False).logits[0, -1].double()
    logits = (logits.log_softmax(-1) if normalised else logits).float().double()
    top = logits.topk(method.k).indices
    states = torch.stack([read_states(model, input_ids=torch.tensor([[*text, int(token)]]), use_cache=False)[-1] for token in top])
    weights = torch.tensor(method.head_weights or [1.0], dtype=torch.float64)
    with torch.no_grad():
        bonus = method.strength * (method.value(states) @ weights)
    scores = torch.full_like(logits, -torch.inf)
    scores[top] = logits[top] + bonus
    # One rounding of the logit (above), one of the bonus and one of the sum, to float32.
    return scores, EPS * (logits.abs().max() + 2 * bonus.abs().max())


def assert_as_wanted(model, method, steps, prompts=PROMPTS, beams=1, tolerance=None):
    assert len(steps) == NEW
    for input_ids, scores in steps:
        width = max(map(len, prompts))
        for row, ids in enumerate(input_ids.tolist()):
            text = ids[width - len(prompts[row // beams]) :]
            wanted, rounding = wanted_scores(model, method, text, normalised=beams > 1)
            finite = wanted.isfinite()
            assert torch.equal(scores[row].isfinite(), finite)
            assert (scores[row].double() - wanted)[finite].abs().max() <= (tolerance or rounding)


def double_model(name, **changes):
    prefix, options = MODELS[name]
    kind = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{prefix}Config")(**{**options, "vocab_size": VOCABULARY, **changes}))
    # Larger weights than at the start of a training, else the states hardly know of what was read before.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model.double().eval()


# Grouped queries, learned positions, a bias in the attention, several queries to one key, states of another width; then what has no plain cache.
CACHED = ["llama", "gpt2", "qwen2", "gpt_neox", "falcon", "opt, projected states", "gemma2, soft-capped logits"]
ANEW = ["mistral", "mamba, recurrent"]


class TestStates:
    @pytest.mark.parametrize("name", CACHED + ANEW)
    def test_scores_are_those_of_whole_texts(self, name, caplog):
        # Gemma 2 has a sliding window in every other layer unless told otherwise.
        full = {"layer_types": ["full_attention"] * 2} if name.startswith("gemma2") else {}
        model = double_model(name, **full)
        torch.manual_seed(1)
        method = PrefixScorer(rc.ValueFunction(model.get_output_embeddings().in_features, (64,)).double(), 3.0, K)
        prompts = EQUALLY_LONG if model.config._attn_implementation == "eager" else PROMPTS
        with caplog.at_level(logging.WARNING, "recontrol"):
            _, steps = steps_of(method, model, prompts)
        assert_as_wanted(model, method, steps, prompts)
        assert ("costs a forward call over the whole text" in caplog.text) == (name in ANEW)
        if name in ANEW:
            assert {"mistral": "DynamicSlidingWindowLayer", "mamba, recurrent": "LinearAttentionLayer"}[name] in caplog.text

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["rows", "beams", "no cache"])
    def test_attention_and_ways_of_generating(self, scorer, attention, options):
        model = double_llama(attn_implementation=attention)
        prompts = EQUALLY_LONG if attention == "eager" else PROMPTS
        _, steps = steps_of(scorer, model, prompts, **options)
        assert_as_wanted(model, scorer, steps, prompts, options.get("num_beams", 1))

    def test_eager_attention_with_padding(self, caplog):
        """In float32; a candidate that saw padding, or stood in another place, would be off by far more."""
        model = llama(initializer_range=0.3, vocab_size=VOCABULARY, attn_implementation="eager")
        method = PrefixScorer(value_function(64).float(), 3.0, K)
        _, steps = steps_of(method, model)
        method.value.double()
        assert_as_wanted(model.double(), method, steps, tolerance=1e-4)
        assert "whole text" not in caplog.text

    @pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
    def test_other_attention_is_not_trusted(self, attention):
        """By its name: whether it can run on this machine does not matter."""
        model = double_llama()
        with CandidateStates(model) as asked:
            model(torch.tensor([[5, 6, 7]]), position_ids=torch.arange(3)[None], **{CACHE: DynamicCache()})
            assert asked._why_not(torch.tensor([[5, 6, 7]])) is None
            model.config._attn_implementation_internal = attention
            assert asked._why_not(torch.tensor([[5, 6, 7]])) == f"attention {attention!r} takes no mask of one's own"

    def test_the_generation_goes_on_as_if_nothing_had_been_asked(self, model):
        """To the bit, and a recorder sees one state a token."""
        with record_hidden_states(model) as free:
            plain, plain_steps = steps_of(Uncontrolled(), model)
        with record_hidden_states(model) as asked:
            batch, steps = steps_of(PrefixScorer(value_function(64), 0.0, VOCABULARY), model)
        assert batch.responses == plain.responses and len(asked.steps) == len(free.steps) == NEW
        assert all(torch.equal(one, other) for one, other in zip(asked.steps, free.steps, strict=True))
        assert all(torch.equal(one[1], other[1]) for one, other in zip(steps, plain_steps, strict=True))

    def test_what_is_wrong_beside_each_other_is_found_out(self, model, scorer, monkeypatch, caplog):
        """Candidates that attend to each other: the first step shows it, and the scores are right all the same."""
        eye = torch.eye
        monkeypatch.setattr(torch, "eye", lambda *args, **options: torch.ones_like(eye(*args, **options)))
        _, steps = steps_of(scorer, model)
        monkeypatch.undo()
        assert "LlamaModel gives other states beside each other than one by one" in caplog.text
        assert_as_wanted(model, scorer, steps)

    def test_in_half_precision_too(self, caplog):
        """The check of the first step takes rounding for rounding."""
        model = llama(initializer_range=0.3, vocab_size=VOCABULARY).bfloat16()
        batch, _ = steps_of(PrefixScorer(value_function(64).float(), 1.0, K), model)
        assert batch.steps == NEW and "whole text" not in caplog.text

    def test_calls_of_other_threads_are_not_taken_for_the_generation(self, model):
        with CandidateStates(model) as asked:
            model(torch.tensor([[5, 6, 7]]))
            state = asked.state
            other = threading.Thread(target=model, args=(torch.tensor([[8, 9]]),))
            other.start()
            other.join()
            assert asked.state is state and asked._call["input_ids"].tolist() == [[5, 6, 7]]

    def test_the_cache_stays_as_it_is(self, model):
        cache = DynamicCache()
        ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
        with CandidateStates(model) as asked:
            model(ids, position_ids=torch.arange(3).expand(2, 3), **{CACHE: cache})
            before = [(layer, layer.keys, layer.values) for layer in cache.layers]
            states = asked.states(ids, torch.tensor([[5, 6], [7, 7]]))
        assert asked.from_cache and states.shape == (2, 2, 32)
        assert all(layer is now and keys is now.keys and values is now.values for (layer, keys, values), now in zip(before, cache.layers, strict=True))


class TestScores:
    def test_strength_and_k(self, model):
        """One candidate is greedy decoding, whatever its value; the default strength is 1."""
        value = value_function(64)
        greedy = Uncontrolled().respond(model, TOKENIZER, PROMPTS, max_new_tokens=NEW)
        assert steps_of(PrefixScorer(value, 50.0, 1), model)[0].responses == greedy.responses
        default, none = PrefixScorer(value), PrefixScorer(value, 0.0)
        assert default.settings == {"strength": 1.0, "k": 10} and default.label == "prefix scorer (strength 1, k 10)"
        (ids, scores), (_, without) = steps_of(default, model)[1][0], steps_of(none, model)[1][0]
        assert not torch.equal(scores, without) and scores.isfinite().sum(1).tolist() == [10] * len(ids)

    def test_values_rise(self, model):
        """What is chosen greedily has a higher value than what is most likely."""
        value = value_function(64)

        def mean_value(method):
            with record_hidden_states(model) as recorder:
                method.respond(model, TOKENIZER, PROMPTS, max_new_tokens=8, eos_token_id=None)
            return value(torch.stack(recorder.steps[1:])).mean().item()

        assert mean_value(PrefixScorer(value, 100.0, 20)) > mean_value(PrefixScorer(value, 0.0, 20)) + 0.05

    def test_several_heads(self, model):
        method = PrefixScorer(value_function(64, heads=2), 3.0, K, head_weights=[1, -2])
        assert method.settings["weights"] == (1.0, -2.0)
        assert_as_wanted(model, method, steps_of(method, model)[1])

    def test_ending_is_worth_what_is_expected_without_it(self, model):
        """V was trained on no state after the end."""
        value = value_function(64)
        method = PrefixScorer(value, 3.0, VOCABULARY)
        with record_hidden_states(model) as recorder:
            _, steps = steps_of(method, model, eos_token_id=[40, 41], max_new_tokens=1)
        _, endless = steps_of(method, model, max_new_tokens=1)
        _, plain = steps_of(Uncontrolled(), model, max_new_tokens=1)
        bonus, free = steps[0][1] - plain[0][1], endless[0][1] - plain[0][1]
        now = 3.0 * value(recorder.steps[0])[:, 0]
        torch.testing.assert_close(bonus[:, [40, 41]].double(), now[:, None].expand(-1, 2), rtol=0, atol=float(4 * EPS * plain[0][1].abs().max()))
        others = [token for token in range(VOCABULARY) if token not in (40, 41)]
        assert torch.equal(bonus[:, others], free[:, others]) and not torch.equal(bonus, free)

    def test_ended_rows_do_no_harm(self, model, scorer):
        """Each row is what the prompt alone gets, also after another has ended."""
        options = {"max_new_tokens": 10, "eos_token_id": list(range(30, 70))}
        batch = scorer.respond(model, TOKENIZER, PROMPTS, **options)
        assert len({len(response.token_ids) for response in batch.responses}) > 1
        assert [scorer.respond(model, TOKENIZER, [prompt], **options).responses[0] for prompt in PROMPTS] == batch.responses

    @pytest.mark.parametrize("first", [True, False])
    def test_with_control(self, model, first):
        """Both at once, in any order: with no strength what is left is control."""
        value = value_function(64)
        control, scorer = ReControl(rc.Control(value, 2.0, 20)), PrefixScorer(value, 0.0, VOCABULARY)
        alone, _ = steps_of(control, model)
        both, _ = steps_of(Together([control, scorer] if first else [scorer, control]), model)
        assert both.responses == alone.responses != steps_of(Uncontrolled(), model)[0].responses


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"value": "V"}, TypeError, "value must be a recontrol.ValueFunction, found str"),
            ({"k": 0}, ValueError, "k must be an integer of at least 1, found 0"),
            ({"k": 2.5}, TypeError, "k must be an integer, found 2.5"),
            ({"strength": float("nan")}, ValueError, "strength must be finite, found nan"),
            ({"value": value_function(64, heads=2)}, ValueError, "has 2 heads: give head_weights, 2 numbers"),
            ({"head_weights": [1, 2]}, ValueError, "head_weights must be 1 numbers, one a head, found 2"),
        ],
    )
    def test_arguments(self, options, error, message):
        with pytest.raises(error, match=message):
            PrefixScorer(**{"value": value_function(64), **options})

    def test_value_functions_of_other_models(self, model):
        other = value_function(64)
        other.provenance["base_model"] = {"name": "another", "hidden_size": 33}
        for value, message in ((rc.ValueFunction(33).double(), "for hidden states of size 33"), (other, "trained for another model")):
            with pytest.raises(ValueError, match=message):
                steps_of(PrefixScorer(value), model)
            assert hooks_on(model) == []
        steps_of(PrefixScorer(other, allow_other_model=True), model)
        with pytest.raises(TypeError, match="float64 goes with float64 only"):
            steps_of(PrefixScorer(value_function(64).float()), model)

    def test_static_caches(self, model, scorer):
        with pytest.raises(ValueError, match=r"wanted an attention mask of shape \(4, 14\), found one of shape .*: static caches are not taken here"):
            steps_of(scorer, model, cache_implementation="static", disable_compile=True)
        assert hooks_on(model) == []

    def test_states_that_the_transformer_does_not_return(self, model):
        with CandidateStates(model) as asked:
            with pytest.raises(RuntimeError, match="LlamaForCausalLM made no forward call since it was attached to"):
                asked.states(torch.tensor([[5]]), torch.tensor([[6]]))
            scaling = model.model.register_forward_hook(lambda module, args, output: output.__setitem__("last_hidden_state", 2 * output[0]) or output)
            try:
                model(torch.tensor([[5]]))
                with pytest.raises(ValueError, match="reads other states than its LlamaModel returns"):
                    asked.states(torch.tensor([[5]]), torch.tensor([[6]]))
            finally:
                scaling.remove()
        assert hooks_on(model) == []

    def test_nothing_is_left_behind(self, model, scorer):
        """Neither after a batch nor after an error in it."""
        steps_of(scorer, model)
        with pytest.raises(ZeroDivisionError):
            scorer.respond(model, TOKENIZER, PROMPTS, logits_processor=[lambda ids, scores: 1 / 0])
        assert hooks_on(model) == []


def test_training_and_identity():
    method, again = PrefixScorer(value_function(64)), PrefixScorer(value_function(64), 2.0, trained=Training(5, 7.5, 9))
    assert method.training == Training(33 * 64 + 65, None, None) and again.training == Training(5, 7.5, 9)
    assert method.identity == again.identity != PrefixScorer(value_function(64, seed=2)).identity
