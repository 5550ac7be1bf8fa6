"""The judge, against a server on this machine that answers as it is told."""

import json
import sqlite3
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from recontrol.data.rewards import Judge, as_reward, checked_rewards, reward_name
from recontrol.data.rewards.chat import TRIES


class Server(ThreadingHTTPServer):
    """Answers chat completions with `answer(prompt text)`: a text, or a status code and no text; says `usage` where it is told to."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.requests, self.running, self.most, self.lock = [], 0, 0, threading.Lock()
        self.keys = []
        self.usage = None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.keys.append(self.headers.get("Authorization"))
            server.running += 1
            server.most = max(server.most, server.running)
        answer = server.answer(request["messages"][-1]["content"])
        with server.lock:
            server.running -= 1
        status = answer if isinstance(answer, int) else 200
        message = {"role": "assistant", "content": answer}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        if server.usage is not None:
            body["usage"] = server.usage
        content = json.dumps(body if status == 200 else {"error": {"message": "told to fail"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        # The client waits as long as it is told before it tries again.
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    pytest.importorskip("openai")
    started = []

    def start(answer):
        server = Server(answer)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def by_length(text):
    """The number of words between the marks of the response."""
    return str(len(text.split("<response>")[1].split("</response>")[0].split()))


PROMPTS = ["Who are you?", "Tell me {more}.", "Hi"]
RESPONSES = ["A model.", "One two three four {five}", "Hello"]


def test_scores_in_the_order_of_the_responses(serve):
    server = serve(by_length)
    judge = Judge("tiny-judge", base_url=server.url, api_key="secret")
    assert judge(PROMPTS, RESPONSES) == [2.0, 5.0, 1.0]
    assert torch.equal(checked_rewards(judge, PROMPTS, RESPONSES), torch.tensor([[2.0], [5.0], [1.0]]))
    assert as_reward(judge) is judge and reward_name(judge) == "judge tiny-judge, 1 to 10"
    assert {request["model"] for request in server.requests} == {"tiny-judge"} and {request["temperature"] for request in server.requests} == {0}
    asked = {request["messages"][0]["content"] for request in server.requests}
    assert len(asked) == 3
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        assert any(prompt in text and response in text and "from 1 (worst) to 10 (best)" in text for text in asked)
    assert set(server.keys) == {"Bearer secret"}


def test_own_instructions_range_and_fields_of_the_request(serve):
    server = serve(lambda text: "-0.5")
    judge = Judge("m", base_url=server.url, instructions="{minimum} {maximum}|{prompt}|{response}", minimum=-1, maximum=1, request={"max_tokens": 4})
    assert judge(["p"], ["r"]) == [-0.5]
    assert server.requests == [{"model": "m", "messages": [{"role": "user", "content": "-1 1|p|r"}], "max_tokens": 4}]
    assert judge.name.startswith("judge m, -1 to 1, instructions ") and judge.name != Judge("m", base_url=server.url, minimum=-1, maximum=1).name


@pytest.mark.parametrize("answer,score", [("7", 7.0), (" 7\n", 7.0), ("7.5", 7.5), ("7.", 7.0), ("7/10", 7.0), ("+7", 7.0), ("10", 10.0), ("1", 1.0)])
def test_answers_that_are_a_score(serve, answer, score):
    assert Judge("m", base_url=serve(lambda text: answer).url)(["p"], ["r"]) == [score]


@pytest.mark.parametrize("answer", ["", "good", "11", "0.5", "-3", "7 or 8", "Score: 7", "nan", "inf", "1e1", "7/5", "\u0667", None, "x" * 900])
def test_answers_that_are_none(serve, answer):
    server = serve(lambda text: answer)
    with pytest.raises(ValueError, match=rf"the judge m must answer with a number from 1 to 10 alone, found .* \({TRIES} times\)") as caught:
        Judge("m", base_url=server.url)(["p"], ["r"])
    assert repr(answer)[:100] in str(caught.value) and len(str(caught.value)) < 400
    assert len(server.requests) == TRIES


@pytest.mark.parametrize("answer", ["<think>3 of 5, so 7.</think>\n\n7", "So 7.</think> 7", "<think></think>7/10"])
def test_thoughts_are_no_part_of_an_answer(serve, answer):
    assert Judge("m", base_url=serve(lambda text: answer).url)(["p"], ["r"]) == [7.0]


def test_thoughts_without_an_end_are_no_answer(serve):
    with pytest.raises(ValueError, match="alone, found '<think>I can't say. 7'".replace("'<", "[\"']<").replace("7'", "7[\"']")):
        Judge("m", base_url=serve(lambda text: "<think>I can't say. 7").url)(["p"], ["r"])


@pytest.mark.parametrize("answer", ["I'm sorry, I can't help with that.", "I cannot score this. Call 988.", "As an AI, I won\u2019t."])
def test_a_declined_answer_has_the_score_that_was_said(serve, answer, caplog):
    server = serve(lambda text: answer if "bomb" in text else "7")
    prompts, responses = ["p", "a bomb"], ["r", "s"]
    assert Judge("m", base_url=server.url)(prompts, responses) == [7.0, 5.5]
    assert len(server.requests) == 1 + TRIES and "gave no score for 1 of 2 responses: they get 5.5" in caplog.text
    assert Judge("m", base_url=server.url, declined=2)(prompts, responses) == [7.0, 2.0]
    with pytest.raises(ValueError, match="declined to score 1 of 2 responses"):
        Judge("m", base_url=server.url, declined=None)(prompts, responses)


def test_a_number_is_the_score_for_whatever_is_no_score(serve):
    server = serve(lambda text: "no idea")
    assert Judge("m", base_url=server.url, declined=0)(["p"], ["r"]) == [0.0]
    with pytest.raises(TypeError, match="declined must be a number, found 'lowest'"):
        Judge("m", base_url=server.url, declined="lowest")


def test_a_nonsense_answer_is_asked_again(serve):
    answers = iter(["I would say 7", "7"])
    server = serve(lambda text: next(answers))
    assert Judge("m", base_url=server.url)(["p"], ["r"]) == [7.0] and len(server.requests) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_are_sent_again(serve, status):
    answers = iter([status, status, "7"])
    server = serve(lambda text: next(answers))
    assert Judge("m", base_url=server.url)(["p"], ["r"]) == [7.0] and len(server.requests) == 3


@pytest.mark.parametrize("status,sent", [(500, 2), (401, 1), (400, 1)])
def test_failures_that_stay(serve, status, sent):
    server = serve(lambda text: status)
    with pytest.raises(ConnectionError, match=rf"the judge m at {server.url}/? did not answer: .*told to fail"):
        Judge("m", base_url=server.url, max_retries=1)(["p"], ["r"])
    assert len(server.requests) == sent


def test_no_server(serve):
    url = serve(by_length).url.replace("127.0.0.1", "localhost").rsplit(":", 1)[0] + ":9/v1"
    with pytest.raises(ConnectionError, match=r"the judge m at .* did not answer"):
        Judge("m", base_url=url, max_retries=0)(["p"], ["r"])


def test_requests_run_side_by_side_and_no_more_than_asked(serve):
    meeting = threading.Barrier(2, timeout=30)

    def wait_for_another(text):
        meeting.wait()
        return "5"

    server = serve(wait_for_another)
    texts = [str(number) for number in range(6)]
    assert Judge("m", base_url=server.url, concurrency=2)(texts, texts) == [5.0] * 6
    assert server.most == 2
    alone = serve(by_length)
    Judge("m", base_url=alone.url, concurrency=1)(texts, texts)
    assert alone.most == 1


def test_equal_requests_are_sent_once(serve):
    server = serve(by_length)
    assert Judge("m", base_url=server.url)(["p"] * 4, ["a b", "a b", "c", "a b"]) == [2.0, 2.0, 1.0, 2.0]
    assert len(server.requests) == 2


class TestCache:
    def test_nothing_is_asked_twice(self, serve, tmp_path):
        server = serve(by_length)
        path = tmp_path / "folder" / "answers.sqlite"
        first = Judge("m", base_url=server.url, cache=path)(PROMPTS, RESPONSES)
        assert Judge("m", base_url=server.url, cache=path)(PROMPTS[::-1], RESPONSES[::-1]) == first[::-1]
        assert len(server.requests) == 3

    @pytest.mark.parametrize(
        "change", [{"model": "n"}, {"maximum": 9}, {"instructions": "{prompt}<response>{response}</response>"}, {"request": {"temperature": 1}}], ids=str
    )
    def test_another_question_is_asked(self, serve, tmp_path, change):
        server = serve(by_length)
        for settings in ({"model": "m"}, {"model": "m"} | change):
            Judge(base_url=server.url, cache=tmp_path / "answers.sqlite", **settings)(["p"], ["r"])
        assert len(server.requests) == 2

    def test_what_was_answered_before_a_failure_is_kept(self, serve, tmp_path):
        broken = True
        server = serve(lambda text: 400 if broken and "bad" in text else by_length(text))
        judge = Judge("m", base_url=server.url, cache=tmp_path / "answers.sqlite", concurrency=1)
        responses = ["one", "one two", "bad", "one two three"]
        with pytest.raises(ConnectionError):
            judge(["p"] * 4, responses)
        before = len(server.requests)
        broken = False
        assert Judge("m", base_url=server.url, cache=tmp_path / "answers.sqlite")(["p"] * 4, responses) == [1.0, 2.0, 1.0, 3.0]
        assert before >= 3 and len(server.requests) - before == 4 - (before - 1)

    def test_nonsense_is_not_kept(self, serve, tmp_path):
        answers = iter(["no"] * TRIES + ["3"])
        server = serve(lambda text: next(answers))
        with pytest.raises(ValueError, match="must answer with a number"):
            Judge("m", base_url=server.url, cache=tmp_path / "answers.sqlite")(["p"], ["r"])
        assert Judge("m", base_url=server.url, cache=tmp_path / "answers.sqlite")(["p"], ["r"]) == [3.0]

    def test_a_file_of_another_kind(self, serve, tmp_path):
        (tmp_path / "notes.txt").write_text("mine\n" * 400)
        with pytest.raises(ValueError, match=r"notes\.txt is not a file of answers of a judge"):
            Judge("m", base_url=serve(by_length).url, cache=tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == "mine\n" * 400

    def test_a_disk_that_fails(self, serve, tmp_path):
        path = tmp_path / "answers.sqlite"
        judge = Judge("m", base_url=serve(by_length).url, cache=path)
        base = sqlite3.connect(path)
        base.execute("DROP TABLE answers")
        base.execute("CREATE VIEW answers AS SELECT '' AS request, '' AS answer")
        base.commit()
        with pytest.raises(OSError, match=r"could not write .*answers\.sqlite"):
            judge(["p"], ["r"])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"minimum": 5, "maximum": 5}, "the range of scores is empty: found minimum 5 and maximum 5"),
        ({"minimum": float("nan")}, "the range of scores is empty"),
        ({"concurrency": 0}, "concurrency must be at least 1, found 0"),
        ({"instructions": "Rate {response}."}, r"instructions of the judge must have \{prompt\} and \{response\} in it"),
        ({"instructions": "{prompt}{response}{context}"}, "and no other field"),
        ({"instructions": '{prompt}{response}{"score": 1}'}, "write other braces twice"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Judge("m", base_url="http://127.0.0.1:9/v1", **options)


def test_keys(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="the judge needs a key: set OPENAI_API_KEY"):
        Judge("m")
    server = serve(by_length)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    Judge("m")(["p"], ["r"])
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    Judge("m")(["p"], ["r"])
    assert server.keys[1] == "Bearer of the environment"


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'recontrol\[judge\]'"):
        Judge("m", base_url="http://127.0.0.1:9/v1")
