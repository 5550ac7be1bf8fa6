"""Two processes that collect into one folder, as torchrun or accelerate launch start them."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recontrol.data.collect import collect
from recontrol.data.rollouts import Rollouts

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "movie_reviews"
PROMPTS = ["a film", "it was", "the actors are good", "one", "two of them", "the end", "what a day", "I saw"]
SAMPLING = {"max_new_tokens": 4, "batch_size": 1, "do_sample": True, "seed": 5, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")

# Importing takes most of the time, so one process does that and then forks those that are meant.
CHILD = """
import os, signal, sys, traceback
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_collect_processes import SAMPLING, PROMPTS, lengths_of, model_and_tokenizer
from recontrol.data.collect import collect
from recontrol.data.relabel import relabel

def work(rank, port, dying):
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
    calls = 0

    def score(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == 3 and dying:
            os.kill(os.getpid(), signal.SIGKILL)
        return lengths_of(prompts, responses)

    score.__qualname__, score.identity = "lengths_of", "lengths"
    try:
        rollouts = collect(*model_and_tokenizer(), PROMPTS, score, sys.argv[2], **SAMPLING)
        collected = calls
        copy = relabel(rollouts, score, sys.argv[2] + "-copy", progress=False)
        # In one piece, since both write to the same pipe.
        os.write(1, f"rank {rank}: {len(rollouts)} responses, {collected} calls, {calls - collected} to relabel {len(copy)}\\n".encode())
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

children = []
for rank in range(2):
    child = os.fork()
    if not child:
        work(rank, sys.argv[3], sys.argv[4] == str(rank))
    children.append(child)
for child in children:
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def lengths_of(prompts, responses):
    return [float(len(response)) for response in responses]


# Functions that score alike, whatever else they do, say so.
lengths_of.identity = "lengths"


def model_and_tokenizer():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64))
    return model.eval(), AutoTokenizer.from_pretrained(EXAMPLE / "lm")


def launch(folder, dying=None):
    """Run two processes, the one of rank `dying` to be killed at its third shard; returns their exit statuses, what they printed, and their errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-c", CHILD, str(ROOT / "tests"), str(folder), port, str(dying)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240, check=False)
    lines = done.stdout.splitlines()
    statuses = [int(line.split()[1]) for line in lines if line.startswith("status")]
    return statuses, sorted(line for line in lines if line.startswith("rank")), done.stderr


def test_a_process_that_dies_leaves_the_others_shards_and_the_same_call_goes_on_and_relabels(tmp_path):
    whole = collect(*model_and_tokenizer(), PROMPTS, lengths_of, tmp_path / "whole", **SAMPLING)
    wanted = {path.name: path.read_bytes() for path in whole.path.iterdir()}
    folder = tmp_path / "r"

    statuses, printed, errors = launch(folder, dying=1)
    # The other one does its share, is told at the meeting point, and does not claim that the folder is complete.
    assert statuses == [1, -signal.SIGKILL] and not printed and "RuntimeError" in errors, errors
    left = {path.name for path in folder.glob("shard-*.safetensors")}
    assert left == {f"shard-{number:05d}.safetensors" for number in (0, 1, 2, 3, 4, 6)}
    with pytest.raises(ValueError, match="found 6 of 8 shards"):
        Rollouts(folder)
    Rollouts(folder, allow_partial=True).verify()

    statuses, printed, errors = launch(folder)
    # Each made one of the two that were missing, and both return when all is there.
    assert statuses == [0, 0] and printed == [f"rank {rank}: 8 responses, 1 calls, 4 to relabel 8" for rank in range(2)], errors
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == whole.manifest
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    # They shared the shards of the copy too.
    copy = Rollouts(tmp_path / "r-copy")
    copy.verify()
    assert torch.equal(copy.rewards, whole.rewards) and copy.manifest["version"] == 3
