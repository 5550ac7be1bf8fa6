"""What the tests in a real vLLM share: the model, the engine's settings, controls, and asking the engine."""

import http.client
import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import recontrol as rc

MODEL = Path(__file__).resolve().parents[2] / "examples" / "movie_reviews" / "lm"
HIDDEN = 256
MAX_TOKENS = 12
# float32, so that tokens can be compared; nothing is compiled, so that it starts sooner.
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 6, "kv_cache_memory_bytes": 1 << 26}
# A block of the key/value cache: tokens, and bytes of keys and values in 6 layers with 2 heads, 64 wide.
BLOCK = 32
BLOCK_BYTES = BLOCK * 6 * 2 * 2 * 64 * 4
# So few tokens a step that prompts are read in pieces, and so few blocks that requests lose theirs.
CROWDED = {"max_num_batched_tokens": 8, "block_size": BLOCK, "kv_cache_memory_bytes": 7 * BLOCK_BYTES, "enable_prefix_caching": False}
# Draft tokens that repeat what was said before.
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    # Two workers on a machine with one memory node cannot each have its own.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Log-probabilities are gathered by a function that would be compiled.
    "TORCHDYNAMO_DISABLE": "1",
    "NO_PROXY": "127.0.0.1",
}
# The last two are about as long as a block of the key/value cache.
PROMPTS = (
    "This film is",
    "I never",
    "The actors in it are good, but the story that they have to tell is one that we all have seen before in films that were",
    "I saw this film with a friend of mine who had read the book, and he told me that the end of it was not the one that",
)
# The tokenizer brings none.
TEMPLATE = "{{ messages[0].content }}"
ABSENT = "absent"
CONTROLS = (
    ABSENT,
    {"value": "up", "step_size": 5.0, "steps": 10},
    {"value": "other", "step_size": 5.0, "radius": 12.0},
    '{"value": "deep", "step_size": 20.0, "steps": 40}',
    {"value": "both", "step_size": 4.0, "head_weights": [1.0, -0.5]},
    {"value": "up", "step_size": 3.0, "target": 2.0},
    None,
)


def parameters(control, **options):
    from vllm import SamplingParams

    extra_args = None if control == ABSENT else {"recontrol": control}
    return SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, **options}, extra_args=extra_args)


def tokens(engine, prompts, controls, **options):
    """The new tokens of each prompt under its control, all asked for at once."""
    outputs = engine.generate(list(prompts), [parameters(control, **options) for control in controls], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def counted(engine, name):
    """A counter of an engine that was started with `disable_log_stats=False`."""
    return sum(metric.value for metric in engine.get_metrics() if metric.name == f"vllm:{name}")


def controller(bank, control):
    """The same control for `model.generate`."""
    given = json.loads(control) if isinstance(control, str) else dict(control)
    return rc.Controller(rc.ValueFunction.from_pretrained(bank / given.pop("value")), **given)


@contextmanager
def serving(folder, bank, default, *options):
    """Run `recontrol serve` with the control of requests that carry none and options of vLLM; the process and its port.

    Args:
        folder: for its chat template and its log.
        bank: the value functions.
        default: a control.
        options: of `vllm serve`, beside those that all servers here have.
    """
    port = free_port()
    (folder / "template.jinja").write_text(TEMPLATE)
    options = ["--port", port, "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", ENGINE["max_model_len"], *options]
    options += ["--chat-template", folder / "template.jinja", "--served-model-name", "reviews"]
    command = [sys.executable, "-m", "recontrol", "serve", "--model", MODEL, "--bank", bank, "--default", json.dumps(default), "--", *options]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
    try:
        while not healthy(port):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield server, port
    finally:
        server.terminate()
        server.wait(60)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def healthy(port):
    try:
        return read(port, "/health")[0] == 200
    except OSError:
        return False


def read(port, path, body=None):
    """The status and the text of an answer; to a POST of JSON if there is a body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()
