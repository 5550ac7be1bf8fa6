"""What a caller has set in torch leaks into no ascent, no training and nothing that is kept; the model's own forward runs under it, in every thread."""

import contextlib
import copy
import io
import pickle
import threading
from types import SimpleNamespace

import pytest
import test_generation
import torch
from controlled import llama
from generating import HAS_CONTINUOUS, PROMPTS
from oracle import RUNNING, edit_error

import recontrol as rc
from recontrol import ambient
from recontrol.decoding.recording import record_hidden_states
from recontrol.generation import trial
from recontrol.methods import PrefixScorer, ReControl, mean_difference, reward_direction
from recontrol.training.diagnosis import diagnose

SIZE = 64
pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def setting(change, given, before):
    change(given)
    try:
        yield
    finally:
        change(before)


def by_default(dtype):
    return lambda: setting(torch.set_default_dtype, dtype, torch.float32)


# What a caller may have set; new contexts by name.
STATES = {
    "nothing": contextlib.nullcontext,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "default float64": by_default(torch.float64),
    "default float16": by_default(torch.float16),
    "default bfloat16": by_default(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "default device of the thread": lambda: setting(torch.set_default_device, "meta", None),
    "float32 products in bfloat16": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomaly": torch.autograd.detect_anomaly,
    "saved tensors packed": lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor),
}
in_every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)
filterwarnings = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")


def exact(hidden, value, step_size, steps, head_weights=(1.0,)):
    """u <- u + alpha * grad V(h + u) in float64, the gradient by the chain rule."""
    layers = [(layer.weight.detach().double(), layer.bias.detach().double()) for layer in value.layers]
    state = hidden.double()
    for _ in range(steps):
        activations, active = state, []
        for weight, bias in layers[:-1]:
            activations = activations @ weight.T + bias
            active.append(activations > 0)
            activations = activations.clamp(min=0)
        gradient = torch.tensor(head_weights, dtype=torch.float64) @ layers[-1][0]
        for (weight, _), on in zip(reversed(layers[:-1]), reversed(active), strict=True):
            gradient = (on * gradient) @ weight
        state = state + step_size * gradient
    return state


def value_function(*hidden_dims, heads=1, size=SIZE, dtype=torch.float32):
    torch.manual_seed(1)
    value = rc.ValueFunction(size, hidden_dims, heads)
    with torch.no_grad():
        for layer in value.layers:
            layer.weight.mul_(3)
    return value.to(dtype)


class TestAscent:
    @filterwarnings
    @in_every_state
    @pytest.mark.parametrize("backend", ["auto", *RUNNING])
    def test_is_exact_and_leaves_nothing_behind(self, state, backend):
        hidden = torch.randn(5, SIZE)
        # Triton's interpreter is slow.
        for dims in ((128,), (48, 32)) if backend != "triton" else ((24,),):
            value = value_function(*dims, heads=2)
            wanted = exact(hidden, value, 0.5, 20, (0.3, -0.7))
            warm = copy.deepcopy(value)
            rc.ascend(hidden, warm, 0.5, 20, head_weights=[0.3, -0.7], backend=backend)
            found = []
            with state():
                for each in (value, warm):
                    found.append(rc.ascend(hidden, each, 0.5, 20, head_weights=[0.3, -0.7], backend=backend))
            found.append(rc.ascend(hidden, value, 0.5, 20, head_weights=[0.3, -0.7], backend=backend))
            for edited in found:
                assert edited.dtype == torch.float32 and edit_error(edited, wanted, hidden).max() < 2e-5
            assert all(torch.equal(edited, found[0]) for edited in found)
            assert not any(tensor.is_inference() for tensor in vars(value.prepared()).values() if isinstance(tensor, torch.Tensor))

    @filterwarnings
    @in_every_state
    def test_oracle(self, state):
        hidden, value = torch.randn(5, SIZE), value_function(48, 32)
        with state():
            edited, trace = rc.oracle.ascend(hidden, value, 0.5, 20, return_trace=True)
        assert edited.dtype == trace.dtype == torch.float32
        assert edit_error(edited, exact(hidden, value, 0.5, 20), hidden).max() < 2e-5
        assert torch.allclose(trace[:, 0], value(hidden)[:, 0], rtol=1e-4, atol=1e-4)

    @in_every_state
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_other_dtypes_do_as_they_do_in_no_state(self, state, dtype):
        hidden, value = torch.randn(5, SIZE, dtype=dtype), value_function(48, heads=2, dtype=dtype)
        options = {"head_weights": [0.1, 0.2], "radius": 0.7, "target": 1.5, "return_trace": True}
        wanted = rc.ascend(hidden, copy.deepcopy(value), **options)
        with state():
            found = rc.ascend(hidden, value, **options)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))

    def test_weights_of_heads_are_not_rounded_on_their_way(self):
        hidden, value = torch.randn(5, SIZE, dtype=torch.float64), value_function(48, heads=2, dtype=torch.float64)
        edited = rc.ascend(hidden, value, 0.5, 20, head_weights=[0.1, 0.2])
        assert edit_error(edited, exact(hidden, value, 0.5, 20, (0.1, 0.2)), hidden).max() < 1e-13

    @pytest.mark.parametrize("backend", [name for name in RUNNING if name != "triton"])
    def test_threads_that_want_exact_products_do_not_disturb_the_setting(self, backend):
        hidden, value = torch.randn(3, SIZE), value_function(128)
        wanted = exact(hidden, value, 0.5, 20)
        barrier, errors = threading.Barrier(4, timeout=60), []

        def climb():
            barrier.wait()
            for _ in range(3):
                errors.append(float(edit_error(rc.ascend(hidden, value, 0.5, 20, backend=backend), wanted, hidden).max()))

        with STATES["float32 products in bfloat16"]():
            threads = [threading.Thread(target=climb) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert torch.get_float32_matmul_precision() == "medium"
        assert len(errors) == 12 and max(errors) < 2e-5

    @pytest.mark.parametrize("backend", RUNNING)
    def test_states_and_weights_of_any_layout(self, backend):
        value = value_function(16 if backend == "triton" else 128)
        layouts = {
            "columns of a buffer": torch.randn(5, 2 * SIZE)[:, ::2],
            "transposed": torch.randn(SIZE, 5).T,
            "rows turned around": torch.randn(5, SIZE).flip(0),
            "one row": torch.randn(1, SIZE).expand(5, SIZE),
            "one column": torch.randn(5, 1).expand(5, SIZE),
            "one number": torch.randn(()).expand(5, SIZE),
            "diagonals": torch.randn(5 * (SIZE + 3)).as_strided((5, SIZE), (3, 5)),
        }
        strided = copy.deepcopy(value)
        with torch.no_grad():
            for layer in strided.layers:
                layer.weight.data, layer.bias.data = layer.weight.T.contiguous().T, layer.bias.repeat_interleave(2)[::2]
        numbers = torch.full((10,), 0.5)[::2], torch.full((1,), 20).expand(5), torch.ones(10, dtype=torch.bool)[::2]
        for hidden in layouts.values():
            wanted = exact(hidden, value, 0.5, 20)
            for each in (value, strided):
                assert edit_error(rc.ascend(hidden, each, 0.5, 20, backend=backend), wanted, hidden).max() < 2e-5
                edited = rc.ascend(hidden, each, numbers[0], numbers[1], mask=numbers[2], backend=backend)
                assert edit_error(edited, wanted, hidden).max() < 2e-5
                weights, biases = ([tensor.detach() for tensor in tensors] for tensors in each.parameters_by_kind)
                arguments = (numbers[0], numbers[1], numbers[2], None, None, torch.ones(2)[::2], each._cache.key, backend, 0)
                edited, _ = torch.ops.recontrol.ascend(hidden, weights, biases, *arguments)
                assert edit_error(edited, wanted, hidden).max() < 2e-5


class TestValueFunction:
    @in_every_state
    def test_is_the_same_made_summed_copied_saved_and_loaded_anywhere(self, state, tmp_path):
        wanted, hidden = value_function(48), torch.randn(5, SIZE)
        wanted.save_pretrained(tmp_path)
        with state():
            loaded = rc.ValueFunction.from_pretrained(tmp_path)
            total = 0.1 * loaded + 0.7 * wanted
            kept = [loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), total, total.double()]
        read = io.BytesIO()
        torch.save(total.float(), read)
        read.seek(0)
        for value in (*kept, torch.load(read, weights_only=False)):
            scale = 1.0 if value in kept[:3] else 0.8
            assert value.device.type == "cpu" and not any(parameter.is_inference() for parameter in value.parameters())
            assert torch.allclose(value(hidden).float(), scale * wanted(hidden), atol=1e-4)
            value(hidden).sum().backward()
        assert torch.equal(loaded.layers[0].weight, wanted.layers[0].weight)

    @in_every_state
    def test_computes_in_the_dtype_of_its_weights(self, state):
        value, hidden = value_function(48), torch.randn(5, SIZE)
        with torch.no_grad():
            wanted = value(hidden)
        with state():
            found = value(hidden)
        assert found.dtype == torch.float32 and torch.allclose(found, wanted, atol=0.1)
        if "products" not in str(state):
            assert not isinstance(state(), torch.autocast) or torch.equal(found, wanted)

    @pytest.mark.parametrize("state", ["default float64", "default float16", "default bfloat16", "autocast bfloat16", "inference_mode"])
    def test_is_drawn_as_float32(self, state):
        torch.manual_seed(0)
        wanted = rc.ValueFunction(SIZE, (48,))
        torch.manual_seed(0)
        with STATES[state]():
            found = rc.ValueFunction(SIZE, (48,))
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))

    def test_compiles_whole_and_respects_no_autocast_there(self):
        value, hidden = value_function(48), torch.randn(5, SIZE)
        torch._dynamo.reset()
        compiled = torch.compile(lambda states: value(states), backend="eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(hidden), value(hidden)) and compiled(hidden).dtype == torch.float32


@pytest.fixture
def rollouts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 24, generator=generator) for _ in range(24)]
    return rc.Rollouts.write(tmp_path / "rollouts", states, [float(each[:, 0].mean()) for each in states], groups=[index // 2 for index in range(24)])


class TestPipelines:
    @filterwarnings
    @in_every_state
    @pytest.mark.parametrize("settings", [{"kernel": "torch"}, {"kernel": "closed-form"}, {"objective": "preference"}, {"ema_decay": 0.9}], ids=str)
    def test_training(self, state, settings, rollouts, tmp_path):
        options = {"hidden_dims": (16,), "epochs": 2, "learning_rate": 1e-2, "progress": False, "device": "cpu", **settings}
        wanted, history = rc.train(rollouts, **options)
        with state():
            opened = rc.Rollouts(rollouts.path)
            found, same = rc.train(opened, out=tmp_path / "run", **options)
            again, _ = rc.train(opened, out=tmp_path / "run", **options)
        assert same == history
        for value in (found, again):
            assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(value.parameters(), wanted.parameters(), strict=True))
            assert not any(parameter.is_inference() for parameter in value.parameters())
        # What was read in one state can be trained on in another.
        later, _ = rc.train(opened, **options)
        assert all(torch.equal(a, b) for a, b in zip(later.parameters(), wanted.parameters(), strict=True))

    @in_every_state
    def test_what_is_found_in_rollouts(self, state, rollouts, tmp_path):
        value = value_function(16, size=24)

        def everything(path):
            written = rc.Rollouts.write(path, [torch.ones(1, 1, device="cpu"), torch.zeros(2, 1, device="cpu")], [0.1, 0.2])
            opened = rc.Rollouts(rollouts.path)
            about = diagnose(value, opened), reward_direction(opened).vector, mean_difference(opened).vector
            return *about, torch.cat([written.rewards, written.batch([0, 1]).states]), opened.batch([3, 1]).states, opened.token_ids([2])

        wanted = everything(tmp_path / "outside")
        with state():
            found = everything(tmp_path / "inside")
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(found, wanted, strict=True))


class Watching:
    """The dtypes in which a layer of the model computes, and whether under inference_mode and autocast; and what its head reads."""

    def __init__(self, model):
        self.seen, self.read = set(), []
        layer, head = model.model.layers[0].self_attn.q_proj, model.get_output_embeddings()
        self.hooks = [
            layer.register_forward_hook(self.note),
            head.register_forward_hook(lambda module, args, output: self.read.append(args[0].detach().clone())),
        ]

    def note(self, module, args, output):
        self.seen.add((output.dtype, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()


class Letters(test_generation.Letters):
    def __call__(self, texts):
        found = super().__call__([texts] if isinstance(texts, str) else texts).input_ids
        return SimpleNamespace(input_ids=found[0] if isinstance(texts, str) else found)

    def get_vocab(self):
        return {chr(token): token for token in range(98)}


TOKENIZER = Letters()
OPTIONS = {"max_new_tokens": 3, "do_sample": False}


def collected(model, value, path):
    return rc.collect(model, TOKENIZER, PROMPTS[:3], lambda prompts, responses: [float(len(text)) for text in responses], path, progress=False, **OPTIONS)


def trained_online(model, value, path):
    online = rc.OnlineRollouts(model, TOKENIZER, PROMPTS[:3], lambda prompts, responses: [float(len(text)) for text in responses], **OPTIONS)
    return rc.train(online, hidden_dims=(8,), epochs=1, progress=False, device="cpu")[0]


def under_a_controller(model, value, path):
    with rc.Controller(value, 0.5, 5).attach(model):
        return model.generate(torch.tensor([[5, 6, 7]], device="cpu"), **OPTIONS)


def evaluated(model, value, path):
    reward = lambda prompts, responses: [float(len(text)) for text in responses]  # noqa: E731
    methods = [PrefixScorer(value, 1.0, 3), ReControl(rc.Control(value, 0.5, 5))]
    return rc.evaluate(model, TOKENIZER, PROMPTS[:3], value=value, methods=methods, reward=reward, progress=False, **OPTIONS)


DOORS = {
    "Controller": under_a_controller,
    "StaticDecoder": lambda model, value, path: rc.StaticDecoder(model, 1, 16).generate(torch.tensor([[5, 6, 7]], device="cpu"), **OPTIONS),
    "static": lambda model, value, path: rc.generate(model, TOKENIZER, PROMPTS[:3], rc.Control(value, 0.5, 5), batching="static", trace=True, **OPTIONS),
    "auto": lambda model, value, path: rc.generate(model, TOKENIZER, PROMPTS[:3], rc.Control(value, 0.5, 5), **OPTIONS),
    "stream": lambda model, value, path: list(rc.generate(model, TOKENIZER, PROMPTS[:3], rc.Control(value, 0.5, 5), stream=True, **OPTIONS)),
    "collect": collected,
    "train on what is sampled": trained_online,
    "evaluate": evaluated,
}
OF_MODELS = ["nothing", "autocast bfloat16", "autocast float16", "no_grad", "inference_mode", "default float64", "default bfloat16"]


class TestDoors:
    @pytest.mark.parametrize("state", OF_MODELS)
    @pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
    def test_the_model_runs_under_what_the_caller_has_set(self, door, state, tmp_path):
        model, value = llama(vocab_size=98, eos_token_id=2, pad_token_id=0), value_function(48, size=32)
        with STATES[state](), Watching(model) as watching:
            door(model, value, tmp_path)
        dtype = {"autocast bfloat16": torch.bfloat16, "autocast float16": torch.float16}.get(state, torch.float32)
        assert {dtype for dtype, *_ in watching.seen} == {dtype} and {on for *_, on in watching.seen} == {"autocast" in state}
        # The static decoder leaves it, since its cache is written in any mode.
        if state == "inference_mode" and not door.__qualname__.startswith("<lambda>"):
            assert {inside for _, inside, _ in watching.seen} == {True}

    @pytest.mark.parametrize("state", OF_MODELS)
    @pytest.mark.parametrize("batching", ["Controller", "static", "auto"])
    def test_edits_are_exact(self, batching, state):
        model, value, prompt = llama(vocab_size=98, eos_token_id=2, pad_token_id=0), value_function(48, size=32), [5, 6, 7]
        plain = []
        spy = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: plain.append(args[0].detach().clone()))
        with STATES[state](), Watching(model) as watching:
            if batching == "Controller":
                with rc.Controller(value, 0.5, 20, self_check=False).attach(model):
                    model.generate(torch.tensor([prompt]), **OPTIONS)
            else:
                rc.generate(model, TOKENIZER, [prompt], rc.Control(value, 0.5, 20), batching=batching, **OPTIONS)
        spy.remove()
        for before, after in list(zip(plain, watching.read, strict=True))[-3:]:
            before, after = before[0, -1:], after[0, -1:]
            wanted = exact(before, value, 0.5, 20)
            rounding = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}[after.dtype]
            assert edit_error(after, wanted, before).max() < rounding

    @pytest.mark.skipif(not HAS_CONTINUOUS, reason="this release of transformers has no continuous batching of the kind that is known here")
    def test_the_trial_of_continuous_batches_is_one_for_each_autocast(self):
        model = llama(vocab_size=98, eos_token_id=2, pad_token_id=0)
        assert trial.why_not(model) is None
        with torch.autocast("cpu", torch.bfloat16):
            # The paged cache is of the model's own dtype.
            if trial.why_not(model) is not None:
                with pytest.raises(ValueError, match="continuous"):
                    rc.generate(model, TOKENIZER, PROMPTS[:3], None, batching="continuous", **OPTIONS)
        assert trial.why_not(model) is None

    @pytest.mark.skipif(not HAS_CONTINUOUS, reason="this release of transformers has no continuous batching of the kind that is known here")
    @pytest.mark.parametrize("state", ["nothing", "autocast bfloat16", "inference_mode"])
    def test_continuous_batches_run_under_what_the_caller_has_set(self, state):
        model = llama(vocab_size=98, eos_token_id=2, pad_token_id=0).bfloat16()
        control = rc.Control(value_function(48, size=32), 0.5, 5)
        with STATES[state](), Watching(model) as watching:
            rc.generate(model, TOKENIZER, PROMPTS[:3], control, batching="continuous", **OPTIONS)
        assert watching.seen == {(torch.bfloat16, state == "inference_mode", state.startswith("autocast"))}

    def test_a_static_decoder_goes_in_and_out_of_autocast(self):
        model, ids = llama(num_hidden_layers=1), torch.tensor([[5, 6, 7]])
        decoder = rc.StaticDecoder(model, 1, 16)
        wanted = decoder.generate(ids, **OPTIONS)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decoder.generate(ids, **OPTIONS), model.generate(ids, **OPTIONS))
            cache = decoder.cache
            decoder.generate(ids, **OPTIONS)
            assert decoder.cache is cache
        assert torch.equal(decoder.generate(ids, **OPTIONS), wanted)

    def test_recorded_states_can_be_trained_on(self):
        model, value = llama(), value_function(48, size=32)
        with torch.inference_mode(), record_hidden_states(model) as recorder:
            model.generate(torch.tensor([[5, 6, 7]]), **OPTIONS)
        value(recorder.steps[0]).sum().backward()
        assert value.layers[0].weight.grad.any()


class TestCarried:
    @pytest.mark.parametrize("state", STATES.values(), ids=STATES)
    def test_another_thread_has_what_was_set_here(self, state):
        def look():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            return product.dtype, product.device, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), product.is_inference()

        found = []
        with state():
            wanted = look()
            carried = ambient.carried(look)
            thread = threading.Thread(target=lambda: found.append(carried()))
        # What belongs to all threads is not carried.
        with state() if "default" in str(wanted[0]) else contextlib.nullcontext():
            thread.start()
            thread.join()
        assert found[0][1:] == wanted[1:] and (found[0][0] == wanted[0] or state not in list(STATES.values())[:6])

    def test_the_stream_of_the_caller_is_the_stream_of_the_thread(self, monkeypatch):
        streams = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or contextlib.nullcontext())
        ambient.carried(lambda: streams.append("inside"))()
        assert streams == ["the caller's", "inside"]

    def test_the_settings_of_the_thread_come_back_after_an_error(self):
        def fail():
            raise ValueError

        with torch.autocast("cpu", torch.bfloat16):
            failing = ambient.carried(fail)
        for context in (ambient.shielded(), contextlib.nullcontext()):
            with pytest.raises(ValueError), context:
                failing()
            assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
