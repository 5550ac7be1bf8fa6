"""Mixed requests, what is right for each of them, and sending them all to a server."""

import asyncio
import json
import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from served import ABSENT, MODEL, PROMPTS, controller
from transformers import AutoModelForCausalLM, AutoTokenizer

MIX = {"answer": 300, "cancel": 80, "too long": 40, "malformed": 80}
LONGEST = 16
# So many tokens of an answer are those of no other control of the same prompt.
TELLING = 6
CONTROLS_A_PROMPT = 8
# The logits are of the order of 10: in float32, another order of summation changes them by some 1e-5. Where two tokens are closer than this,
# vLLM and `model.generate` might both be right and differ, and another control is drawn.
MARGIN = 1e-3
AT_ONCE = 64
# Seconds after which a request counts as lost.
LOST = 120


@dataclass(frozen=True)
class Raw:
    """What a request holds as `vllm_xargs`, where it is not a control as text."""

    xargs: Any


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        kind: of `MIX`.
        chat: through the endpoint for chats.
        stream: token by token.
        prompt: a text.
        control: as in `served.CONTROLS`, or `Raw`.
        max_tokens: length of the answer at most.
        wanted: the tokens of the answer, or a pattern of what is said in the refusal.
        leave_after: tokens after which the client of a stream leaves; None where it stays.
        patience: seconds after which a client that does not stream leaves; None where it stays.
    """

    kind: str
    chat: bool
    stream: bool
    prompt: str
    control: Any
    max_tokens: int
    wanted: Any
    leave_after: int | None = None
    patience: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        kind: "answered", "left" (by the client), "refused" or "lost".
        found: the tokens that came, or the refusal.
        status: of HTTP.
    """

    kind: str
    found: Any
    status: int = 200


def right_answers(bank, default, seed):
    """The tokens of each prompt under random controls, under none and under the default: [(prompt, control, tokens), ...].

    From `model.generate` under `Controller`, in this process.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)
    choose = random.Random(seed)
    answers = []
    for prompt in PROMPTS:
        seen = set()
        given = [ABSENT, None]
        while len(seen) < CONTROLS_A_PROMPT + 2:
            control = given.pop(0) if given else _random_control(choose)
            tokens, margin = _generated(model, tokenizer, bank, prompt, default if control == ABSENT else control)
            if margin > MARGIN and tokens[:TELLING] not in seen:
                seen.add(tokens[:TELLING])
                answers.append((prompt, control, tokens))
    return answers


def _random_control(choose):
    """A control that is strong enough to be heard, of any value function of the bank."""
    name = choose.choice(["up", "other", "deep", "both"])
    control = {"value": name, "step_size": choose.uniform(2, 20 if name == "deep" else 6), "steps": choose.randint(5, 40)}
    if choose.random() < 0.3:
        control["radius"] = choose.uniform(5, 30)
    if choose.random() < 0.3:
        control["target"] = choose.uniform(-3, 3)
    if name == "both":
        control["head_weights"] = [choose.uniform(-1, 1), choose.uniform(-1, 1)]
    return control


def _generated(model, tokenizer, bank, prompt, control):
    """The new tokens, and by how much, at the least, one was more likely than the next."""
    handle = None if control is None else controller(bank, control).attach(model)
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=LONGEST, do_sample=False, output_logits=True, return_dict_in_generate=True)
    if handle is not None:
        handle.detach()
    best, second = torch.stack(output.logits)[:, 0].topk(2).values.unbind(-1)
    return tuple(output.sequences[0, ids["input_ids"].shape[1] :].tolist()), (best - second).min().item()


def malformed_controls(bank):
    """Controls that cannot be meant, and what the refusal says; a valid value function is beside the bank and one is hidden in it."""
    names = ["unknown", "UP", "", ".", "..", ".hidden", "up/", "./up", "../outside", "up/../../outside", str(bank.parent / "outside"), str(bank / "up")]
    names += ["/etc/passwd", "file:///etc/passwd", "..\\outside", "..%2foutside", "up\0", "up\n", "up, other", "\ud800", None, 1, ["up"], {"up": "other"}]
    fields = [("alpha", 1), ("backend", "reference"), ("path", "/etc/passwd"), ("value ", "up"), ("\0", 1)]
    numbers = [
        ("step_size", -0.5),
        ("step_size", float("nan")),
        ("step_size", float("inf")),
        ("step_size", 1e39),
        ("step_size", 10**400),
        ("step_size", "0.5"),
        ("step_size", [0.5]),
        ("step_size", None),
        ("steps", -1),
        ("steps", 2.5),
        ("steps", 1001),
        ("steps", 10**30),
        ("steps", "30"),
        ("steps", True),
        ("radius", -1),
        ("radius", float("nan")),
        ("radius", 1e39),
        ("radius", {"value": "up"}),
        ("target", float("-inf")),
        ("target", -1e39),
        ("target", "high"),
        ("head_weights", [1.0, 2.0]),
        ("head_weights", "up"),
        ("head_weights", [float("nan")]),
        ("head_weights", [1e39]),
    ]
    found = [
        ({"value": name}, f"value must name a value function of this server, one of 'both', 'deep', 'other', 'up'; found {_shown(name)}")
        for name in names
        if name is not None
    ]
    found += [(each, "it is missing") for each in ({}, {"steps": 3}, {"value": None})]
    found += [({"value": "up", name: content}, f"control: found ({re.escape(name)}|.*<path>.*), wanted some of value, step_size, ") for name, content in fields]
    found += [({"value": "up", name: content}, f"{name} must be .*found ") for name, content in numbers]
    found += [({"value": "both"}, "the value function has 2 heads: give head_weights, 2 numbers")]
    found += [({"value": "both", "head_weights": weights}, f"must be 2 numbers, one a head, found {len(weights)}") for weights in ([1], [], [1, 2, 3])]
    found += [(text, "a control must be JSON such as .*found ") for text in ("", "{", "up", "{'value': 'up'}", '{"value": "up"} {}', "[" * 100_000)]
    found += [(text, f"control must be a mapping of names to settings, found {type(json.loads(text)).__name__}$") for text in ("3", '"up"', "[]", "true")]
    found += [(Raw({"recontrol": each}), f"control must be a mapping of names to settings, found {type(each).__name__}$") for each in (3.5, ["up"])]
    found += [(Raw(each), "vllm_xargs") for each in ("up", [1], {"recontrol": {"value": "up"}}, {"recontrol": None})]
    return found


def _shown(found):
    """vLLM shows no paths in what it answers."""
    return f"({re.escape(repr(found))}|'<path>')"


def mixed(answers, bank, seed):
    """The requests, in random order; the same for the same seed."""
    choose = random.Random(seed)
    malformed = malformed_controls(bank)
    choose.shuffle(malformed)
    asked = [_asked(kind, number, choose, answers, malformed) for kind, count in MIX.items() for number in range(count)]
    choose.shuffle(asked)
    return asked


def _asked(kind, number, choose, answers, malformed):
    prompt, control, tokens = answers[number % len(answers)]
    chat, stream = choose.random() < 0.5, choose.random() < 0.5
    if kind == "answer":
        most = choose.randint(TELLING, LONGEST)
        return Asked(kind, chat, stream, prompt, control, most, tokens[:most])
    if kind == "cancel":
        leaving = {"leave_after": choose.randint(1, 4)} if stream else {"patience": choose.uniform(0, 1)}
        return Asked(kind, chat, stream, prompt, control, LONGEST, tokens, **leaving)
    if kind == "malformed":
        control, message = malformed[number % len(malformed)]
        return Asked(kind, chat, stream, prompt, control, LONGEST, message)
    # By itself, or with what is asked for.
    prompt, most, message = choose.choice(
        [(" ".join([prompt] * 64), 1, "maximum context length is 128 tokens"), (prompt, 1000, "greater than max_model_len=128")]
    )
    return Asked(kind, chat, stream, prompt, control, most, message)


def fault(asked, outcome):
    """What is wrong with an outcome; None for nothing."""
    if asked.kind in ("too long", "malformed"):
        right = outcome.kind == "refused" and outcome.status == 400 and re.search(asked.wanted, outcome.found)
    elif outcome.kind == "answered":
        right = outcome.found == asked.wanted
    else:
        # The tokens that came before the client left.
        right = asked.kind == "cancel" and outcome.kind == "left" and outcome.found == asked.wanted[: len(outcome.found)]
    return None if right else f"{asked!s:.400} {outcome!s:.400}"


async def send_all(port, asked):
    """The outcome of each request, in order; `AT_ONCE` are under way."""
    from openai import AsyncOpenAI

    free = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=LOST) as client:

        async def sent(each):
            async with free:
                return await send(client, each)

        return await asyncio.gather(*map(sent, asked))


async def send(client, asked):
    """What becomes of one request; whatever it is, and however it ends."""
    from openai import APIStatusError

    found = []
    try:
        async with asyncio.timeout(LOST if asked.patience is None else asked.patience):
            answer = await _created(client, asked)
            if not asked.stream:
                return Outcome("answered", tuple(answer.choices[0].token_ids))
            async with answer:
                async for piece in answer:
                    found += getattr(piece.choices[0], "token_ids", None) or []
                    if asked.leave_after is not None and len(found) >= asked.leave_after:
                        return Outcome("left", tuple(found))
            return Outcome("answered", tuple(found))
    except APIStatusError as error:
        return Outcome("refused", error.message, error.status_code)
    except TimeoutError:
        return Outcome("lost" if asked.patience is None else "left", tuple(found))
    except Exception as error:
        return Outcome("lost", f"{type(error).__name__}: {error}")


def _created(client, asked):
    extra = {"return_token_ids": True}
    if isinstance(asked.control, Raw):
        extra["vllm_xargs"] = asked.control.xargs
    elif asked.control != ABSENT:
        extra["vllm_xargs"] = {"recontrol": asked.control if isinstance(asked.control, str) else json.dumps(asked.control)}
    options = {"model": "reviews", "max_tokens": asked.max_tokens, "temperature": 0, "stream": asked.stream}
    if not asked.chat:
        return client.completions.create(prompt=asked.prompt, extra_body=extra, **options)
    messages = [{"role": "user", "content": asked.prompt}]
    return client.chat.completions.create(messages=messages, extra_body={"add_special_tokens": True, **extra}, **options)
