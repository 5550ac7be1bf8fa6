"""Judges of pairs: a chat model, against a server on this machine that answers as it is told, and a reward."""

import itertools
import math

import pytest
from test_judge import serve  # noqa: F401

from recontrol.data.rewards.chat import TRIES, Usage
from recontrol.evaluation.judges import CHOICES, INSTRUCTIONS, Judgement, PairwiseJudge, RewardJudge, choices

PROMPTS = ["\n\nHuman: Why?\n\nAssistant:", "Tell me {more}.", "Hi", "Bye"]
RESPONSES = [" one two three", "one {two}", "one", "one two"]
OTHERS = [" one two", "one two three", "two", " one two\n"]


def shown(text):
    """The two responses in a question, first and second."""
    return tuple(text.split(f"<response_{letter}>\n")[1].split(f"\n</response_{letter}>")[0] for letter in "ab")


def longer(text):
    """Prefers the response with more words."""
    first, second = (len(part.split()) for part in shown(text))
    return "A" if first > second else "B" if first < second else "C"


class TestPairwiseJudge:
    def test_each_pair_is_asked_in_both_orders(self, serve):  # noqa: F811
        server = serve(longer)
        judge = PairwiseJudge("tiny", base_url=server.url, api_key="secret")
        judgement = judge(PROMPTS, RESPONSES, OTHERS)
        assert list(judgement.verdicts) == [1.0, 0.0, 0.5, 0.5]
        asked = [request["messages"][0]["content"] for request in server.requests]
        # The last pair is equal beside the space around it.
        wanted = [
            (response.strip(), other.strip()) for pair in list(zip(RESPONSES, OTHERS, strict=True))[:3] for response, other in itertools.permutations(pair)
        ]
        assert sorted(map(shown, asked)) == sorted(wanted)
        assert sum("<dialogue>\nHuman: Why?\n\nAssistant:\n</dialogue>" in text for text in asked) == 2
        assert {request["model"] for request in server.requests} == {"tiny"} and {request["temperature"] for request in server.requests} == {0}
        assert judgement.position_bias == 0.0 and judgement.unreadable == 0 and set(server.keys) == {"Bearer secret"}
        assert judge.name == "judge tiny, pairwise"

    @pytest.mark.parametrize("letter,bias", [("A", 1.0), ("B", 1.0), ("C", 0.0)])
    def test_a_judge_that_goes_by_the_place_decides_nothing(self, serve, letter, bias):  # noqa: F811
        judgement = PairwiseJudge("m", base_url=serve(lambda text: letter).url)(PROMPTS, RESPONSES, OTHERS)
        assert list(judgement.verdicts) == [0.5] * 4 and judgement.position_bias == bias

    def test_position_bias_is_a_share_of_the_pairs_that_were_asked(self, serve):  # noqa: F811
        server = serve(lambda text: "A" if "Why?" in text else longer(text))
        judgement = PairwiseJudge("m", base_url=server.url)(PROMPTS, RESPONSES, OTHERS)
        assert list(judgement.verdicts) == [0.5, 0.0, 0.5, 0.5] and judgement.position_bias == pytest.approx(1 / 3)

    def test_a_win_and_a_tie_are_a_tie_that_the_place_did_not_decide(self, serve):  # noqa: F811
        server = serve(lambda text: "A" if shown(text)[0] == "x" else "C")
        judgement = PairwiseJudge("m", base_url=server.url)(["p", "q"], ["x", "y"], ["y", "x"])
        assert list(judgement.verdicts) == [0.5, 0.5] and judgement.position_bias == 0.0

    def test_equal_responses_are_not_asked_about(self, serve):  # noqa: F811
        server = serve(lambda text: "A")
        judgement = PairwiseJudge("m", base_url=server.url)(["p"], ["same "], ["same"])
        assert judgement == Judgement([0.5], None, 0, Usage(), None) and not server.requests

    def test_own_instructions_and_fields_of_the_request(self, serve):  # noqa: F811
        server = serve(lambda text: "A" if text == "p|x|y" else "B")
        judge = PairwiseJudge("m", base_url=server.url, instructions="{prompt}|{first}|{second}", request={"max_tokens": 4}, concurrency=1)
        assert list(judge(["p"], ["x"], ["y"]).verdicts) == [1.0]
        assert server.requests[0] == {"model": "m", "messages": [{"role": "user", "content": "p|x|y"}], "max_tokens": 4}
        assert judge.name.startswith("judge m, pairwise, instructions ")

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"instructions": "{prompt} {first}"}, r"must have \{first\} and \{prompt\} and \{second\} in it"),
            ({"price_per_million": (1.0,)}, "price_per_million must be two numbers"),
            ({"price_per_million": (1.0, -2.0)}, "price_per_million must be two numbers"),
            ({"price_per_million": (1.0, float("nan"))}, "price_per_million must be two numbers"),
            ({"unreadable": 1.5}, "unreadable is a share and must be from 0 to 1, found 1.5"),
            ({"concurrency": 0}, "concurrency must be at least 1, found 0"),
        ],
    )
    def test_settings_that_make_no_sense(self, options, message):
        pytest.importorskip("openai")
        with pytest.raises(ValueError, match=message):
            PairwiseJudge("m", base_url="http://127.0.0.1:9/v1", **options)


@pytest.mark.parametrize(
    "answer,choice",
    [
        ("A", "A"),
        (" b\n", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("**A**", "A"),
        ("Tie", "TIE"),
        ("Response B", "B"),
        ("**Answer:** B", "B"),
        ("The better response is A.", "A"),
        ("Response B is clearly better.", "B"),
        ("A\n\nIt is kinder, though B is longer.", "A"),
        ("A is longer, B is kinder.\nMy verdict: B", "B"),
        ("B says more: [[B]], since A is short.", "B"),
        ('{"better": "A"}', "A"),
        ('```json\n{"reason": "B is rude", "better": " a "}\n```', "A"),
        ("<think>A? No.\nB</think>\n\nC", "C"),
        ("the prompt opened this</think>B", "B"),
    ],
)
def test_answers_that_choose(answer, choice):
    assert choices(answer) == {choice} and choice in CHOICES


@pytest.mark.parametrize(
    "answer",
    [
        *("", "A or B", "D", "AB", "7", "A good answer", "The answer is a", "The worse response is A", "My answer is that the worse one is A"),
        *("A is not better", "Neither A nor B", "I cannot read this.", "better: A, B", '{"A": 1}', '{"x": A}}{'),
        *("." * 300, "." * 5000, "A" + " " * 5000 + "B"),
    ],
)
def test_answers_that_choose_nothing(answer):
    assert choices(answer) == set()


def test_answers_that_contradict_themselves():
    assert choices("A\nNo:\nB") == {"A", "B"} and choices('{"better": "A"}\nB') == {"A", "B"}


class TestFailures:
    @pytest.mark.parametrize("status", [429, 503])
    def test_failures_are_sent_again(self, serve, status):  # noqa: F811
        answers = iter([status, status, "A", status, "B"])
        server = serve(lambda text: next(answers))
        judgement = PairwiseJudge("m", base_url=server.url, concurrency=1)(["p"], ["x"], ["y"])
        assert list(judgement.verdicts) == [1.0] and len(server.requests) == 5 and judgement.usage.requests == 2

    def test_failures_that_stay(self, serve):  # noqa: F811
        server = serve(lambda text: 500)
        with pytest.raises(ConnectionError, match=r"the judge m at .* did not answer"):
            PairwiseJudge("m", base_url=server.url, concurrency=1, max_retries=1)(["p"] * 9, list("abcdefghi"), ["x"] * 9)
        assert len(server.requests) < 18

    def test_nonsense_is_asked_again_and_paid_for(self, serve):  # noqa: F811
        answers = iter(["Both are fine", "A", "B"])
        server = serve(lambda text: next(answers))
        server.usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        judgement = PairwiseJudge("m", base_url=server.url, concurrency=1)(["p"], ["x"], ["y"])
        assert list(judgement.verdicts) == [1.0] and judgement.usage == Usage(3, 30, 6)

    def test_a_few_refusals_are_ties_and_are_reported(self, serve, tmp_path, caplog):  # noqa: F811
        refused = {"x7"}
        server = serve(lambda text: "I will not read this." if refused & set(shown(text)) else longer(text))
        texts = [f"x{number}" for number in range(20)]
        settings = {"base_url": server.url, "cache": tmp_path / "answers.sqlite"}
        judgement = PairwiseJudge("m", **settings)(["p"] * 20, texts, ["one two"] * 20)
        assert list(judgement.verdicts) == [0.5 if text == "x7" else 0.0 for text in texts]
        assert judgement.unreadable == 1 and judgement.position_bias == 0.0 and judgement.usage.requests == 38 + 2 * TRIES
        assert "found 'I will not read this.' (3 times)" in caplog.text
        # What was given up is no answer to keep.
        refused.clear()
        again = PairwiseJudge("m", **settings)(["p"] * 20, texts, ["one two"] * 20)
        assert list(again.verdicts) == [0.0] * 20 and again.usage.requests == 2

    def test_many_refusals_are_an_error_before_all_is_asked(self, serve):  # noqa: F811
        server = serve(lambda text: "I will not read this.")
        texts = [f"x{number}" for number in range(20)]
        with pytest.raises(ValueError, match=rf"the judge m must answer with A, B or C alone, found 'I will not read this.' \({TRIES} times\)"):
            PairwiseJudge("m", base_url=server.url, concurrency=1)(["p"] * 20, texts, ["y"] * 20)
        # Two of forty questions may be given up; those that are under way at the third are still answered.
        assert 3 * TRIES <= len(server.requests) < 20
        lenient = PairwiseJudge("m", base_url=server.url, unreadable=1)(["p"] * 2, ["x", "y"], ["z", "z"])
        assert list(lenient.verdicts) == [0.5, 0.5] and lenient.unreadable == 2 and lenient.position_bias is None


class TestCache:
    def test_a_second_run_sends_nothing(self, serve, tmp_path):  # noqa: F811
        server = serve(longer)
        settings = {"base_url": server.url, "cache": tmp_path / "answers.sqlite"}
        first = PairwiseJudge("m", **settings)(PROMPTS, RESPONSES, OTHERS)
        second = PairwiseJudge("m", **settings)(PROMPTS, RESPONSES, OTHERS)
        assert len(server.requests) == 6 and second.verdicts == first.verdicts and second.usage == Usage(0, 0, 0)
        # The other way round the questions are the same.
        assert list(PairwiseJudge("m", **settings)(PROMPTS, OTHERS, RESPONSES).verdicts) == [0.0, 1.0, 0.5, 0.5] and len(server.requests) == 6

    @pytest.mark.parametrize("change", [{"model": "n"}, {"instructions": INSTRUCTIONS + " Be kind."}, {"request": {"temperature": 1}}], ids=str)
    def test_another_question_is_asked(self, serve, tmp_path, change):  # noqa: F811
        server = serve(longer)
        for settings in ({"model": "m"}, {"model": "m"} | change):
            PairwiseJudge(base_url=server.url, cache=tmp_path / "answers.sqlite", **settings)(["p"], ["x"], ["y"])
        assert len(server.requests) == 4

    def test_a_run_that_broke_off_goes_on(self, serve, tmp_path):  # noqa: F811
        broken = True
        server = serve(lambda text: 400 if broken and "bad" in text else longer(text))
        responses = ["one", "one two", "bad", "one two three"]
        settings = {"base_url": server.url, "cache": tmp_path / "answers.sqlite"}
        with pytest.raises(ConnectionError):
            PairwiseJudge("m", concurrency=1, **settings)(["p"] * 4, responses, ["x y"] * 4)
        answered = len(server.requests) - sum("bad" in shown(request["messages"][0]["content"]) for request in server.requests)
        broken = False
        before = len(server.requests)
        judgement = PairwiseJudge("m", **settings)(["p"] * 4, responses, ["x y"] * 4)
        assert list(judgement.verdicts) == [0.0, 0.5, 0.0, 1.0]
        assert answered >= 4 and len(server.requests) - before == judgement.usage.requests == 8 - answered


class TestCost:
    def test_tokens_are_those_of_the_server(self, serve):  # noqa: F811
        server = serve(longer)
        server.usage = {"prompt_tokens": 1000, "completion_tokens": 3, "total_tokens": 1003}
        judgement = PairwiseJudge("m", base_url=server.url, price_per_million=(2.5, 10))(PROMPTS, RESPONSES, OTHERS)
        assert judgement.usage == Usage(6, 6000, 18) and judgement.cost == pytest.approx((6000 * 2.5 + 18 * 10) / 1e6)
        assert PairwiseJudge("m", base_url=server.url)(PROMPTS, RESPONSES, OTHERS).cost is None

    def test_a_server_that_does_not_count(self, serve):  # noqa: F811
        judgement = PairwiseJudge("m", base_url=serve(longer).url, price_per_million=(1, 1))(PROMPTS, RESPONSES, OTHERS)
        assert judgement.usage == Usage(6, None, None) and judgement.cost is None

    def test_an_estimate_sends_nothing_and_is_right_about_the_requests(self, serve, tmp_path):  # noqa: F811
        server = serve(longer)
        judge = PairwiseJudge("m", base_url=server.url, cache=tmp_path / "answers.sqlite", price_per_million=(2.0, 100.0))
        estimate = judge.estimate(PROMPTS, RESPONSES, OTHERS, answer_tokens=5)
        assert not server.requests
        judge(PROMPTS, RESPONSES, OTHERS)
        asked = [request["messages"][0]["content"] for request in server.requests]
        assert estimate.requests == len(asked) == 6
        assert estimate.input_tokens == sum(math.ceil(len(text) / 4) for text in asked) and estimate.output_tokens == 30
        assert estimate.cost == pytest.approx((estimate.input_tokens * 2 + 30 * 100) / 1e6)
        assert judge.estimate(PROMPTS, RESPONSES, OTHERS).requests == 0
        further = judge.estimate([*PROMPTS, "p", "p"], [*RESPONSES, "x", "x"], [*OTHERS, "y", "y"])
        assert (further.requests, further.output_tokens) == (2, 8)

    def test_an_estimate_by_a_tokenizer(self, serve):  # noqa: F811
        class Words:
            def encode(self, text):
                return text.split()

        judge = PairwiseJudge("m", base_url=serve(longer).url, instructions="one two {prompt} {first} {second}")
        estimate = judge.estimate(["p"], ["x y"], ["z"], tokenizer=Words())
        assert estimate.input_tokens == 12 and estimate.cost is None


class TestRewardJudge:
    def test_the_higher_reward_wins(self):
        judge = RewardJudge(lambda prompts, responses: [len(text.split()) for text in responses])
        assert list(judge(PROMPTS, RESPONSES, OTHERS).verdicts) == [1.0, 0.0, 0.5, 0.5]
        assert judge(PROMPTS, RESPONSES, OTHERS) == Judgement([1.0, 0.0, 0.5, 0.5])

    def test_equal_responses_are_ties_whatever_the_noise(self):
        noise = itertools.count()
        judge = RewardJudge(lambda prompts, responses: [next(noise) for _ in responses])
        assert list(judge(["p", "p", "q"], ["x", "x", "x"], ["x", "y", "x"]).verdicts) == [0.5, 0.0, 0.5]

    def test_it_is_named_after_the_reward(self):
        def politeness(prompts, responses):
            return [0.0] * len(responses)

        assert "politeness" in RewardJudge(politeness).name and RewardJudge(politeness).name.startswith("reward ")

    def test_several_scores_are_refused(self):
        with pytest.raises(ValueError, match="must return one score a response, found 2"):
            RewardJudge(lambda prompts, responses: [[0.0, 1.0]] * len(responses))(["p"], ["x"], ["y"])
