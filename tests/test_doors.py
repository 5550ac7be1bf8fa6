"""What holds in every door to decoding under control: no step unedited in silence, devices of states, live rows, unknown tokens, overflow, early ends."""

import logging
from types import SimpleNamespace

import accelerate
import peft
import pytest
import torch
from controlled import hooks_on, llama, value_function
from generating import ENDING, PROMPTS, TOKENIZER, double_llama, generate, value
from test_controller_models import EOS, PROMPT, Substitution, controller, logits_of
from torch import nn

import recontrol as rc
from recontrol.decoding.batches import check_lengths
from recontrol.decoding.editing import states_device
from recontrol.decoding.fingerprint import difference, model_fingerprint
from recontrol.decoding.hooks import attachments, input_device
from recontrol.decoding.recording import record_hidden_states
from recontrol.evaluation.next_token import path_of_steps
from recontrol.generation import request_editing
from recontrol.generation.static import _Watcher
from recontrol.methods import ARGS, Direction, ReControl, StaticEditing

pytestmark = pytest.mark.usefixtures("one_thread")

REPLACED = {
    "resized": lambda model: (model.resize_token_embeddings(110, mean_resizing=False), model)[1],
    "modules to save": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    ).eval(),
    "an adapter on it": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    ).eval(),
}


@pytest.mark.parametrize("change", REPLACED)
@pytest.mark.parametrize("method", ["controller", "static editing"])
def test_an_output_embedding_that_was_replaced_is_an_error_until_attached_again(change, method):
    model, steering = llama(), value_function(32)
    made = controller(steering, backend="oracle") if method == "controller" else StaticEditing(Direction(torch.ones(32), "made up"), 0.5)
    handle = made.attach(model)
    changed = REPLACED[change](model)
    for run in (lambda: logits_of(changed, input_ids=PROMPT), lambda: changed.generate(input_ids=PROMPT, max_new_tokens=2)):
        with pytest.raises(RuntimeError, match=r"the output embedding of this LlamaForCausalLM was replaced after .* was attached"):
            run()
    with handle.pause():
        free = logits_of(changed, input_ids=PROMPT)
    handle.detach()
    assert torch.equal(logits_of(changed, input_ids=PROMPT), free)
    if method == "controller":
        with Substitution(changed, steering):
            expected = logits_of(changed, input_ids=PROMPT)
        # Copies that adapters made of the module edit nothing on their own.
        with made.attach(changed):
            assert torch.equal(logits_of(changed, input_ids=PROMPT), expected) and not torch.equal(expected, free)


def test_without_steps_a_replaced_output_embedding_is_nobodys_concern():
    model = llama()
    with rc.Controller(value_function(32), steps=0).attach(model):
        model.resize_token_embeddings(110, mean_resizing=False)
        assert logits_of(model, input_ids=PROMPT).shape[-1] == 110


class Bypassing(type(llama())):
    """Goes round its output embedding when it is told to."""

    bypass = False

    def forward(self, input_ids=None, **kwargs):
        if not self.bypass:
            return super().forward(input_ids=input_ids, **kwargs)
        states = self.model(input_ids).last_hidden_state
        return SimpleNamespace(logits=None if self.bypass == "a loss alone" else nn.functional.linear(states, self.lm_head.weight))


@pytest.mark.parametrize("compiled", [False, True])
def test_logits_without_an_edited_state_are_an_error(compiled):
    model = llama(kind=Bypassing)
    with controller(value_function(32), self_check=False).attach(model) as handle:
        run = torch.compile(model, backend="eager") if compiled else model
        logits_of(run, input_ids=PROMPT)
        model.bypass = True
        with pytest.raises(RuntimeError, match="this Bypassing made logits without its output embedding, and no state was edited"):
            logits_of(run, input_ids=PROMPT)
        # What makes no logits, or is not to be edited, is no step.
        with handle.pause():
            logits_of(model, input_ids=PROMPT)
        model.bypass = "a loss alone"
        assert logits_of(model, input_ids=PROMPT) is None
        model.model(PROMPT)
    torch.compiler.reset()


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_generate_refuses_tokens_from_states_that_were_not_edited(monkeypatch, batching):
    model = double_llama()
    monkeypatch.setattr(request_editing.RequestEditing, "rows", lambda self, given: None)
    with pytest.raises(RuntimeError, match=r"tokens of prompt 1 come from 0 edited states"):
        generate(model, ["a", "b"], [None, rc.Control(value(64), 3.0, 9)], batching=batching)
    assert hooks_on(model) == []
    assert len(generate(model, ["a", "b"], batching=batching)) == 2


def test_a_static_decoder_refuses_tokens_from_states_that_were_not_edited(monkeypatch):
    model = llama()
    decoder = rc.StaticDecoder(model, 3, 16)
    with controller(value_function(32)).attach(model) as handle:
        decoder.generate(PROMPT, max_new_tokens=3)
        monkeypatch.setattr(handle, "edit", lambda hidden, rows: None)
        with pytest.raises(RuntimeError, match="no state was edited"):
            decoder.generate(PROMPT, max_new_tokens=3)
        with handle.pause():
            decoder.generate(PROMPT, max_new_tokens=3)


# (token that is made to be sampled, options of generate): the row is live after it.
GOING_ON = {"padding": (0, {}), "an end that is ignored": (EOS, {"eos_token_id": -1}), "an end of the config": (EOS, {"eos_token_id": 50})}


@pytest.mark.parametrize("name", GOING_ON)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=["dynamic", "static", "none"])
def test_live_rows_are_edited_whatever_they_said(name, rows, cache):
    token, options = GOING_ON[name]
    model, steering = llama(), value_function(32)
    options = {"max_new_tokens": 4, "do_sample": False, "sequence_bias": {(token,): 1e4}, "attention_mask": torch.ones_like(PROMPT[:rows]), **options, **cache}
    with controller(steering, backend="oracle").attach(model) as handle:
        found = model.generate(PROMPT[:rows], output_logits=True, return_dict_in_generate=True, **options)
    with Substitution(model, steering):
        expected = model.generate(PROMPT[:rows], output_logits=True, return_dict_in_generate=True, **options)
    assert (found.sequences[:, 4:] == token).all() and handle.edited_rows == 4 * rows
    assert all(map(torch.equal, found.logits, expected.logits))


@pytest.mark.parametrize("name", GOING_ON)
@pytest.mark.parametrize("door", ["static", "continuous", "method"])
def test_live_rows_are_edited_in_every_door(name, door):
    token, options = GOING_ON[name]
    model, control = double_llama(), rc.Control(value(64), 3.0, 9)
    options = {"eos_token_id": EOS, "max_new_tokens": 4, **options}
    with torch.no_grad():
        # Where continuous batches take no bias, the output embedding has one.
        model.lm_head.bias = nn.Parameter(torch.zeros(98, dtype=torch.float64))
        model.lm_head.bias[token] = 1e4
    if door == "method":
        with record_hidden_states(model) as recorder:
            made = ReControl(control).respond(model, TOKENIZER, ["a", "b"], **options).responses
        assert len(recorder.steps) == 4
    else:
        made = rc.generate(model, TOKENIZER, ["a", "b"], control, batching=door, trace=True, **options)
        assert all(len(each.trace.edit_norm) == 4 and min(each.trace.edit_norm) > 0 for each in made)
    assert [each.token_ids for each in made] == [[token] * 4] * 2


def test_args_scores_live_rows_that_said_padding():
    model, scored = llama(initializer_range=0.5, vocab_size=98), []

    def reward(prompts, responses):
        scored.append(len(responses))
        return [0.0] * len(responses)

    ARGS(reward, 1.0, 3).respond(model, TOKENIZER, ["a", "b"], max_new_tokens=4, sequence_bias={(0,): 1e4}, eos_token_id=50)
    assert len(scored) == 4


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_accelerate_keeps_elsewhere(tmp_path, whole):
    model, steering = llama(initializer_range=0.5), value_function(32)
    steering.save_pretrained(tmp_path / "v")
    with controller(steering).attach(model):
        expected = logits_of(model, input_ids=PROMPT)
    if whole:
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model.lm_head, tmp_path / "disk", execution_device="cpu")
    assert model.lm_head.weight.is_meta
    from recontrol.decoding.loading import load_value_function

    loaded = load_value_function(str(tmp_path / "v"), model)
    assert loaded.device == input_device(model) == torch.device("cpu")
    with controller(loaded).attach(model) as handle:
        torch.testing.assert_close(logits_of(model, input_ids=PROMPT), expected)
        assert states_device(handle) == torch.device("cpu")
        with pytest.raises(ValueError, match="the value function is on meta, the output embedding on cpu"):
            controller(steering.to("meta")).attach(llama())
    made = rc.generate(model, Letters(), ["a", "b"], rc.Control(loaded, 0.5, 3), max_new_tokens=3)
    assert [len(each.token_ids) for each in made] == [3, 3]


class Letters(type(TOKENIZER)):
    """Its letters end no response."""

    eos_token_id = None


@pytest.mark.parametrize("token", [98, -1])
@pytest.mark.parametrize("door", ["generate", "respond", "collect", "texts", "evaluate", "static decoder"])
def test_tokens_that_the_model_does_not_have_are_named_before_any_work(tmp_path, token, door):
    model = double_llama()
    model.forward = None

    class Wider(type(TOKENIZER)):
        def __call__(self, texts, **options):
            return SimpleNamespace(input_ids=[[4, token] if text == "wide" else [4, 5] for text in texts])

        def get_vocab(self):
            return {}

    prompts, reward = ["a", "wide"], lambda prompts, responses: [0.0] * len(prompts)
    doors = {
        "generate": lambda: rc.generate(model, Wider(), prompts, max_new_tokens=2),
        "respond": lambda: ReControl(rc.Control(value(64), 3.0, 0)).respond(model, Wider(), prompts, max_new_tokens=2),
        "collect": lambda: rc.collect(model, Wider(), prompts, reward, tmp_path / "r", max_new_tokens=2, progress=False),
        "texts": lambda: rc.collect_texts(model, Wider(), ["a", "b"], prompts, tmp_path / "r", reward=reward, progress=False),
        "evaluate": lambda: check_lengths(model, Wider(), prompts, 2),
        "static decoder": lambda: rc.StaticDecoder(model, 2, 8).generate(torch.tensor([[4, 5], [4, token]]), max_new_tokens=2),
    }
    if door == "respond":
        del model.forward
    with pytest.raises(ValueError, match=rf"tokens that the model does not have, it knows 0 to 97: 1 \(token {token}\)"):
        doors[door]()


def test_overflow_leaves_states_as_they_are_in_every_door(caplog):
    model = llama(vocab_size=98).half()
    torch.manual_seed(1)
    steering = rc.ValueFunction(32, (64,))
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.mul_(300)
    control, free = rc.Control(steering, 100.0, 50), [each.token_ids for each in rc.generate(model, TOKENIZER, ["a", "b"], max_new_tokens=3)]
    static = StaticEditing(Direction(torch.full((32,), 6e4), "made up"), 3.0)
    doors = {
        "static": lambda: rc.generate(model, TOKENIZER, ["a", "b"], control, max_new_tokens=3, batching="static"),
        "continuous": lambda: rc.generate(model, TOKENIZER, ["a", "b"], control, max_new_tokens=3, batching="continuous"),
        "method": lambda: ReControl(control).respond(model, TOKENIZER, ["a", "b"], max_new_tokens=3).responses,
        "static editing": lambda: static.respond(model, TOKENIZER, ["a", "b"], max_new_tokens=3).responses,
    }
    for door, respond in doors.items():
        caplog.clear()
        assert [each.token_ids for each in respond()] == free, door
        assert [record.levelno for record in caplog.records if "states stay unedited" in record.message] == [logging.WARNING], door
    states = torch.randn(3, 32).half()
    assert torch.equal(ReControl(control).edit(states), states) and torch.equal(static.edit(states), states)
    assert path_of_steps(model, states, steering, 100.0, [50])[0].kl == 0


@pytest.mark.parametrize("stream", [False, True])
def test_responses_that_generate_ends_early_are_there(monkeypatch, caplog, stream):
    model, original = double_llama(), _Watcher.__call__
    whole = [each.token_ids for each in generate(model, batching="static", batch_size=3)]

    def ends(watcher, input_ids, scores, **kwargs):
        done = original(watcher, input_ids, scores, **kwargs)
        return torch.ones_like(done) if max(map(len, watcher._new)) == 4 else done

    monkeypatch.setattr(_Watcher, "__call__", ends)
    made = generate(model, batching="static", batch_size=3, stream=stream)
    responses = {token.index: token.response for token in made if token.response is not None} if stream else dict(enumerate(made))
    assert [responses[index].token_ids for index in range(len(PROMPTS))] == [ids[:4] for ids in whole] and max(map(len, whole)) > 4
    assert any("where model.generate ended early" in record.message for record in caplog.records)
    assert set(ENDING).isdisjoint(responses[index].token_ids[-1] for index in responses if responses[index].finish == "length")


def test_max_time_cuts_responses():
    made = rc.generate(double_llama(), TOKENIZER, ["a", "b", "c"], max_new_tokens=40, max_time=1e-9, batch_size=2, eos_token_id=-1)
    assert [(len(each.token_ids), each.finish) for each in made] == [(1, "length")] * 3


ADAPTERS = {
    "saved embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [5]},
    "DoRA": {"use_dora": True},
    "on the output embedding": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_is_known_under_adapters_that_rename_its_weights(kind, caplog):
    recorded = model_fingerprint(llama())

    def adapted(seed):
        config = {"target_modules": ["q_proj"], **ADAPTERS[kind]}
        model = peft.get_peft_model(llama(seed), peft.LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            # What the adapter has trained.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        return model

    assert difference(recorded, adapted(0)) is None and model_fingerprint(adapted(0)) == recorded
    assert "the weights differ" in difference(recorded, adapted(1))
    assert not caplog.records


class Packed(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().clone())


class Strange(torch.Tensor):
    """A tensor that cannot be indexed, as quantised ones cannot."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            raise NotImplementedError("no")
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("kind", ["packed", "strange"])
def test_weights_that_cannot_be_read_are_passed_over_and_named(kind, caplog):
    recorded = {**model_fingerprint(llama()), "name": kind}
    models = [llama(0), llama(1)]
    for model in models:
        for name, module in [each for each in model.named_modules() if isinstance(each[1], nn.Linear) and each[0] != "lm_head"]:
            if kind == "packed":
                model.set_submodule(name, Packed(module))
            else:
                module.weight = nn.Parameter(module.weight.detach().as_subclass(Strange), requires_grad=False)
    assert difference(recorded, models[0]) is None and difference(recorded, models[0]) is None
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"14 of 16 weights of {kind} cannot be read here and are not compared: model.layers.0.mlp.down_proj.weight")
    assert "the weights differ" in difference(recorded, models[1])
    assert set(model_fingerprint(models[0])["samples"]) == {"model.embed_tokens.weight", "output_embedding"}


def test_a_copy_of_the_output_embedding_alone_is_not_attached():
    import copy

    model = llama()
    with controller(value_function(32)).attach(model):
        head, whole = copy.deepcopy(model.lm_head), copy.deepcopy(model)
    assert attachments(head) == [] and len(attachments(whole.lm_head)) == 1
    states = torch.randn(2, 32)
    with torch.no_grad():
        assert torch.equal(head(states), model.lm_head(states)) and not torch.equal(whole.lm_head(states), head(states))
