"""`recontrol serve` and the official client."""

import json

import pytest
from served import ABSENT, CONTROLS, ENGINE, MAX_TOKENS, PROMPTS, serving

DEFAULT = CONTROLS[1]


@pytest.fixture(scope="module")
def client(environment, bank, tmp_path_factory):
    from openai import OpenAI

    with serving(tmp_path_factory.mktemp("server"), bank, DEFAULT, "--kv-cache-memory-bytes", ENGINE["kv_cache_memory_bytes"]) as (_, port):
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def carrying(control):
    if control == ABSENT:
        return {}
    return {"vllm_xargs": {"recontrol": control if isinstance(control, str) else json.dumps(control)}}


def complete(client, control, **options):
    extra = {**carrying(control), **options.pop("extra_body", {})}
    return client.completions.create(model="reviews", prompt=PROMPTS[0], max_tokens=MAX_TOKENS, temperature=0, extra_body=extra, **options)


def text(client, control):
    return complete(client, control).choices[0].text


def test_each_request_gets_its_control_and_the_default_where_it_has_none(client):
    default, none = text(client, ABSENT), text(client, None)
    assert default == text(client, DEFAULT) != none
    found = [text(client, control) for control in CONTROLS[1:-1]]
    assert len({none, *found}) > len(CONTROLS) // 2
    # Off is as good as no steps.
    assert none == text(client, {**DEFAULT, "steps": 0})


def test_streams_and_chats_are_steered(client):
    for control in CONTROLS[1:4]:
        pieces = [chunk.choices[0].text for chunk in complete(client, control, stream=True)]
        assert len(pieces) > 1 and "".join(pieces) == text(client, control)
        messages = [{"role": "user", "content": PROMPTS[0]}]
        chat = client.chat.completions.create(
            model="reviews", messages=messages, max_tokens=MAX_TOKENS, temperature=0, extra_body={"add_special_tokens": True, **carrying(control)}
        )
        assert chat.choices[0].message.content == text(client, control)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"value": "../up"}, "value must name a value function of this server, one of 'both', 'deep', 'other', 'up'; found '../up'"),
        ({"value": "up", "step_size": -1}, "step_size must be finite and 0 or more, found -1"),
        ("{", "a control must be JSON"),
    ],
)
def test_a_malformed_control_is_answered_with_400(client, control, message, stream):
    from openai import BadRequestError

    with pytest.raises(BadRequestError) as refused:
        complete(client, control, stream=stream)
    assert refused.value.status_code == 400 and message in refused.value.message
    with pytest.raises(BadRequestError, match=r"a control must be JSON|value must name|step_size must be"):
        messages = [{"role": "user", "content": PROMPTS[0]}]
        client.chat.completions.create(model="reviews", messages=messages, stream=stream, extra_body=carrying(control))


def test_beam_search_does_not_lose_a_control(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="beam search carries no control of a request"):
        complete(client, CONTROLS[1], n=2, extra_body={"use_beam_search": True})
