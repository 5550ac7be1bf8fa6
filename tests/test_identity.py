"""Fingerprints: the same for the same content, in any process and under any name, and others for other content."""

import copy
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recontrol.data.identity import fingerprint
from recontrol.data.rewards import CombinedReward, RewardModel

WORDS = ["good", "fine"]
REWARD = Path(__file__).parent.parent / "examples" / "movie_reviews" / "reward"


def made(source, name="score", **names):
    """What some source defines, in a module of its own."""
    module = {"__name__": "__main__", **names}
    exec(compile(source, "made", "exec"), module)
    return module[name]


ONE = "def score(p, r): return [1.0] * len(r)"
HELPED = "def helper(text): return len(text) * {}\ndef score(p, r): return [helper(each) for each in r]"
CLASS = """
class Score:
    {constant}
    def __init__(self, scale): self.scale, self.calls = scale, 0
    def __call__(self, p, r):
        self.calls += 1
        return [{body} * self.scale for each in r]
score = Score({scale})
"""


def of_class(scale=2, body="len(each)", constant="factor = 1"):
    return made(CLASS.format(scale=scale, body=body, constant=constant))


def test_code_is_what_counts_and_lines_are_not():
    assert fingerprint(made(ONE)) == fingerprint(made("\n\n# A comment.\n" + ONE))
    others = [
        made(ONE.replace("1.0", "2.0")),
        made(ONE.replace("[1.0] * len(r)", "[float(each) for each in map(len, r)]")),
        made(ONE.replace("p, r", "p, r, scale=3")),
        made(ONE.replace("p, r", "p, r, scale=4")),
        made(HELPED.format(1)),
        made(HELPED.format(2)),
        made("def score(p, r): return [min(map(len, r))] * len(r)"),
        made("def score(p, r): return [max(map(len, r))] * len(r)"),
        functools.partial(made("def score(scale, p, r): return [scale] * len(r)"), 1.0),
        functools.partial(made("def score(scale, p, r): return [scale] * len(r)"), 2.0),
    ]
    assert len({fingerprint(each) for each in [made(ONE), *others]}) == 11


def test_what_a_function_reads_counts_and_what_it_records_does_not():
    source = "def score(p, r):\n    seen.append(r)\n    return [sum(map(each.count, words)) for each in r]"
    known = fingerprint(made(source, words=["good"], seen=[]))
    assert fingerprint(made(source, words=["good"], seen=[1, 2])) == known != fingerprint(made(source, words=["bad"], seen=[]))

    def inside(scale, calls):
        def score(p, r):
            nonlocal calls
            calls += 1
            return [scale] * len(r)

        return score

    assert fingerprint(inside(1.0, 0)) == fingerprint(inside(1.0, 7)) != fingerprint(inside(2.0, 0))


def test_objects_count_by_class_and_settings():
    used = of_class()
    used([], ["a"])
    assert fingerprint(used) == fingerprint(of_class())
    others = [of_class(scale=3), of_class(body="len(each) + 1"), of_class(constant="factor = 2")]
    assert len({fingerprint(each) for each in [used, *others]}) == 4
    bound = [made(CLASS.format(scale=scale, body="1", constant="pass") + "score = score.__call__") for scale in (1, 2)]
    assert fingerprint(bound[0]) != fingerprint(bound[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), ("1", 1), ([1, 2], [2, 1]), ({"a": 1}, {"a": 2}), (torch.zeros(2), torch.zeros(3)), (np.zeros(2), np.ones(2)), (torch.zeros(2), torch.ones(2))],
)
def test_plain_content(one, other):
    assert fingerprint(one) == fingerprint(copy.deepcopy(one)) != fingerprint(other)


def test_sets_and_mappings_have_no_order():
    assert fingerprint({"b", "a", "c"}) == fingerprint({"c", "b", "a"}) and fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(made("def score(p, r): return [each in {'a', 'b', 'c'} for each in r]"))


def test_it_is_the_same_in_another_process():
    code = f"from test_identity import *\nprint(fingerprint([of_class(), made(HELPED.format(1)), {{'a', 'b'}}, RewardModel.from_pretrained({str(REWARD)!r})]))"
    wanted = fingerprint([of_class(), made(HELPED.format(1)), {"a", "b"}, RewardModel.from_pretrained(REWARD)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == wanted


def test_a_reward_model_is_its_weights_its_tokenizer_and_its_template():
    def loaded(**options):
        return RewardModel.from_pretrained(REWARD, **options)

    known = loaded()
    before = fingerprint(known)
    # Neither batches nor what was scored before count.
    known(["a"], [" word" * 600])
    assert fingerprint(known) == before == fingerprint(loaded(batch_size=3))
    changed = loaded()
    with torch.no_grad():
        next(iter(changed.model.score.parameters())).neg_()
    cut = loaded()
    cut.tokenizer.add_tokens(["good"])
    others = [changed, cut, loaded(template="{prompt} {response}"), loaded(max_length=9)]
    assert len({before, *map(fingerprint, others)}) == 5
    assert fingerprint(CombinedReward([known, changed])) != fingerprint(CombinedReward([known, known]))


def test_an_object_may_say_its_own_identity():
    one, other = made(ONE), made(ONE.replace("1.0", "2.0"))
    one.identity = other.identity = "version 3"
    assert fingerprint(one) == fingerprint(other) != fingerprint("version 3")
