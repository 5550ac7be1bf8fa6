"""What the tests in a real vLLM share: the model, the engine's settings, controls, and asking the engine."""

import json
from pathlib import Path

import recontrol as rc

MODEL = Path(__file__).resolve().parents[2] / "examples" / "movie_reviews" / "lm"
HIDDEN = 256
MAX_TOKENS = 12
# float32, so that tokens can be compared; nothing is compiled, so that it starts sooner.
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 6, "kv_cache_memory_bytes": 1 << 26}
# So few tokens a step that prompts are read in pieces, and so few blocks of 32 tokens (6 layers, 2 heads, 64 wide) that requests lose theirs.
CROWDED = {"max_num_batched_tokens": 8, "block_size": 32, "kv_cache_memory_bytes": 7 * 32 * 6 * 2 * 2 * 64 * 4, "enable_prefix_caching": False}
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
