"""What collecting needs: torch, numpy, safetensors and transformers; the rest is asked for where it is used."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKED = ("datasets", "accelerate", "matplotlib", "jinja2", "psutil", "openai", "pandas")
CODE = """
import importlib.machinery

# Nothing finds the packages, as if they were not installed.
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in {blocked!r} else find(name, *rest))
"""


def run(code):
    """A process in which some packages are missing."""
    lines = [sys.executable, "-c", CODE.format(blocked=set(BLOCKED)) + textwrap.dedent(code)]
    return subprocess.run(lines, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_collecting_and_relabelling_work_without_the_optional_packages(tmp_path):
    done = run(
        f"""
        import torch
        torch.set_num_threads(1)
        import recontrol.data.collect, recontrol.data.prompts, recontrol.data.online, recontrol.data.rewards.loading
        import recontrol as rc
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        sizes = dict(vocab_size=8192, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        model, tokenizer = LlamaForCausalLM(LlamaConfig(**sizes)), AutoTokenizer.from_pretrained("examples/movie_reviews/lm")
        length = lambda prompts, responses: [float(len(response)) for response in responses]
        rollouts = rc.collect(model, tokenizer, ["a film"], length, {str(tmp_path / "r")!r}, max_new_tokens=3, progress=False)
        print(len(rc.relabel(rollouts, {{"again": length}}, add=True, progress=False)), rollouts.num_heads)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 1\n"


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from recontrol.data.prompts import load_prompts; load_prompts('nobody/none')", "train"),
        ("from recontrol.data.rewards import Judge; Judge('m')", "judge"),
        ("from recontrol.data.prompts import render_prompt; render_prompt(None, 'a')", "report"),
    ],
    ids=["datasets", "openai", "jinja2"],
)
def test_the_extra_is_named(code, extra):
    done = run(code)
    assert done.returncode == 1 and f"pip install 'recontrol[{extra}]'" in done.stderr.splitlines()[-1], done.stderr
