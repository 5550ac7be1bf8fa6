import json

import pytest
from test_judge import serve  # noqa: F401
from test_judges import OTHERS, PROMPTS, RESPONSES, longer

from recontrol.evaluation.judges import Judgement, PairwiseJudge
from recontrol.evaluation.metrics import bootstrap_interval
from recontrol.evaluation.win_rate import win_rate


class TestWinRate:
    def test_it_is_wins_and_half_of_the_ties(self):
        verdicts = [1.0, 1.0, 1.0, 0.5, 0.0]
        prompts = list("abcde")
        found = win_rate(prompts, prompts, prompts, lambda *_: verdicts)
        assert (found.wins, found.ties, found.losses) == (3, 1, 1) and found.rate == pytest.approx((3 + 1 / 2) / 5)
        assert found.interval == pytest.approx(bootstrap_interval(verdicts)) and found.interval[0] < found.rate < found.interval[1]
        assert found.verdicts == verdicts and found.position_bias is None and found.requests == 0 and found.input_tokens is None
        assert "requests" not in str(found) and "order" not in str(found)

    def test_the_interval_draws_prompts(self):
        """Pairs of the same prompt that agree say no more than one of them."""
        verdicts = [1.0, 1.0, 0.0, 1.0, 0.5, 0.0]
        prompts = list("abcdef")
        one = win_rate(prompts, prompts, prompts, lambda *_: verdicts)
        three = win_rate(prompts * 3, prompts * 3, prompts * 3, lambda *_: verdicts * 3)
        assert three.rate == pytest.approx(one.rate) and three.interval == pytest.approx(one.interval)
        assert bootstrap_interval(verdicts * 3)[0] > one.interval[0]
        uneven = win_rate(list("aaab"), list("aaab"), list("aaab"), lambda *_: [1.0, 1.0, 1.0, 0.0])
        assert uneven.rate == 0.75 and uneven.interval[0] < 0.75 < uneven.interval[1]

    def test_what_the_judge_tells_is_passed_on(self, serve):  # noqa: F811
        server = serve(lambda text: "A" if "Why?" in text else longer(text))
        server.usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        found = win_rate(PROMPTS, RESPONSES, OTHERS, PairwiseJudge("m", base_url=server.url, price_per_million=(10, 50)))
        assert (found.rate, found.wins, found.ties, found.losses) == (0.375, 0, 3, 1)
        assert (found.requests, found.input_tokens, found.output_tokens) == (6, 600, 6) and found.cost == pytest.approx(0.0063)
        assert found.position_bias == pytest.approx(1 / 3) and found.judge == "judge m, pairwise"
        text = str(found)
        assert "win rate 0.375" in text and "wins 0, ties 3, losses 1, by judge m, pairwise; the order decided 33.3% of the pairs" in text
        assert "6 requests, 600 tokens of questions and 6 of answers, cost 0.0063" in text
        assert json.loads(json.dumps(found.to_dict()))["verdicts"] == [0.5, 0.0, 0.5, 0.5]

    def test_pairs_without_an_answer_are_mentioned(self):
        texts = ["p", "q"]
        assert "no readable answer: 1 of the ties" in str(win_rate(texts, texts, texts, lambda *_: Judgement([0.5, 1.0], unreadable=1)))
        assert "readable" not in str(win_rate(texts, texts, texts, lambda *_: Judgement([0.5, 1.0])))

    @pytest.mark.parametrize(
        "columns,verdicts,message",
        [
            (([], [], []), [], "needs pairs: found 0 prompts"),
            ((["p"], ["x", "y"], ["z"]), [1.0], "found 1 prompts, 2 responses and 1 others"),
            ((["p", "q"], ["x", "y"], ["z", "z"]), [1.0], "for each of 2 pairs, found 1 verdicts"),
            ((["p"], ["x"], ["y"]), [0.7], r"among them \[0.7\]"),
            ((["p"], ["x"], ["y"]), [float("nan")], r"among them \[nan\]"),
        ],
    )
    def test_what_is_no_comparison_is_refused(self, columns, verdicts, message):
        with pytest.raises(ValueError, match=message):
            win_rate(*columns, lambda *_: verdicts)
