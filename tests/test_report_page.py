"""The report of a study: what its page, table and lines say is what was found."""

import csv
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from results import result

from recontrol.evaluation.metrics import bootstrap_difference
from recontrol.evaluation.response_files import read_responses
from recontrol.evaluation.results import by_prompt
from recontrol.evaluation.win_rate import win_rate
from recontrol.reports.comparison import Findings, Row, equal_kl, kl_levels, make_rows, not_told_apart
from recontrol.reports.report_files import save_findings
from recontrol.reports.table import COST, DASH, QUALITY, interval_digits

NASTY = "<script>alert('a')</script> & \"b\" </section>\u2028"
# Elements of HTML that have no end tag.
VOID = {"meta", "br", "hr", "img", "link", "input"}
STUDY = {
    "model": {"name": "some/model", "dtype": "float32", "revision": None},
    "prompts": {"test": {"source": "file.jsonl", "split": "train", "limit": 30}, "validation": {"source": "some/data", "split": "test", "limit": None}},
    "reward": {"names": ["some/reward"], "head_weights": None},
    "wins": {"judge": "judge:some-judge"},
    "generation": {"max_new_tokens": 16, "options": {"do_sample": True}},
    "choose": "paper",
    "methods": [{"method": "re-control", "alpha": [0.25, 0.5], "n": 30}],
}


class Page(HTMLParser):
    """Tags that are open, tables as texts and as numbers, and everything that points somewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.texts = [], [], [], [], []
        self.tables, self.titles, self.images, self.svg_texts = {}, [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.titles += [given["title"]] if "title" in given else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset")]
        if tag == "svg":
            self.images.append(given)
        if tag == "table":
            self.tables[given["id"]] = []
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append({"text": "", "numbers": [], "best": False, "tag": tag, "scope": given.get("scope")})
        if tag == "data" and "td" in self.open:
            self.table[-1][-1]["numbers"].append(float(given["value"]))
        if tag == "strong" and "td" in self.open:
            self.table[-1][-1]["best"] = True
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} in line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "svg" in self.open:
            self.svg_texts.append(data)
        if {"td", "th"} & set(self.open):
            self.table[-1][-1]["text"] += data

    @property
    def table(self):
        return list(self.tables.values())[-1]

    @property
    def text(self):
        return "".join(self.texts)


def noisy(mean, count=30, seed=0):
    return list(np.random.default_rng(seed).normal(mean, 1, count))


def other(kind, setting, number, rewards, **changes):
    """A method beside RE-Control."""
    return result(number, 30, rewards, kind=kind, method=f"{kind} ({setting} {number:g})", settings={setting: number}, **changes)


@pytest.fixture(scope="module")
def findings():
    base = result(0.0, 0, noisy(0.0), seeds=2)
    control = result(0.5, 30, [reward + 1 + index / 100 for index, reward in enumerate(base.rewards)], seeds=2)
    control.responses[0] = control.answers[0].text = NASTY
    control.answers[1].pieces = ["<b>", "&", ""]
    base.answers[0].values, base.answers[0].pieces = [1.0, -2.0, 0.5], [" One", " two", "\nthree"]
    args = other("ARGS", "w", 1.0, [reward + 0.9 for reward in control.rewards], seeds=2, kl=None, kl_interval=None, kls=[], value_end=None, coherence=None)
    prompts = [f"prompt {index} <i>" for index in range(15)]
    validation = [result(0.0, 0, noisy(0.0, 15)), *(result(size, 30, noisy(size, 15, 1)) for size in (0.25, 0.5, 1.0, 5.0))]
    validation += [other("ARGS", "w", size, noisy(size, 15, 2)) for size in (0.5, 1.0)]
    wins = [None, *(win_rate(prompts * 2, each.responses, base.responses, lambda prompts, one, two: [1, 0.5] * 15) for each in (control, args))]
    groups = {"RE-Control": [1, 2, 3, 4], "ARGS": [5, 6]}
    return Findings(
        [base, control, args], ["uncontrolled", "RE-Control", "ARGS"], prompts, validation, groups, [control.method, args.method], wins, "uncontrolled"
    )


@pytest.fixture(scope="module")
def folder(findings, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new"
    save_findings(path, findings, STUDY, command="make <report>")
    return path


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_small_and_needs_nothing_beside_it(folder, page):
    assert sorted(path.name for path in folder.iterdir()) == ["report.csv", "report.html", "report.json", "responses.jsonl"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert page.links and all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import|<script", text) and "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    # What is pointed at is there.
    pointed = {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert pointed <= set(page.ids)


def test_figures_say_in_words_what_they_show(page):
    # Cost, divergence, two sweeps, three of the calibration.
    assert len(page.images) == 7
    assert all(image["role"] == "img" and len(image["aria-label"]) > 40 and "width" not in image for image in page.images)
    assert "RE-Control along alpha. alpha 0.25: reward" in page.images[2]["aria-label"]


@pytest.mark.parametrize(("name", "columns"), [("quality", QUALITY), ("costs", COST)])
def test_every_number_of_a_table_is_the_results(page, findings, name, columns):
    rows = make_rows(findings)
    head, *body = page.tables[name]
    assert all(cell["tag"] == "th" and cell["scope"] == "col" for cell in head) and len(body) == 3
    assert len(head) == 1 + len(columns)
    for line, row in zip(body, rows, strict=True):
        assert line[0]["tag"] == "th" and line[0]["scope"] == "row" and line[0]["text"].startswith(row.name)
        for cell, column in zip(line[1:], columns, strict=True):
            number = column.number(row)
            assert cell["numbers"] == ([] if number is None else [number]), column.key
            assert (DASH in cell["text"]) == (number is None)
            assert ("[" in cell["text"]) == (column.interval(row) is not None)
    by_key = {column.key: [line[1 + place] for line in body] for place, column in enumerate(columns)}
    if name == "quality":
        assert [cell["numbers"] for cell in by_key["reward"]] == [[each.reward] for each in findings.results]
        assert [cell["numbers"] for cell in by_key["win_rate"]] == [[], [0.75], [0.75]]
        assert by_key["gain"][1]["numbers"] == [findings.results[1].reward - findings.results[0].reward]
        assert [cell["numbers"] for cell in by_key["kl"]] == [[findings.results[0].kl], [findings.results[1].kl], []]
    else:
        assert [cell["numbers"] for cell in by_key["added_ms_per_token"]] == [[0.0], [0.5], [1.0]]
        assert [cell["numbers"] for cell in by_key["training_peak_mib"]] == [[0.0], [2.0], [2.0]]


def test_only_what_is_really_better_is_marked(page, findings):
    marked = [[cell["best"] for cell in line[1:]] for line in page.tables["quality"][1:]]
    # ARGS beats the others in reward; no win rate, diversity or coherence does.
    assert marked[2][0] and sum(map(sum, marked)) == 1
    assert not any(cell["best"] for line in page.tables["costs"] + page.tables["settings"] for cell in line)
    close = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert not_told_apart([close, [number + 0.1 for number in close], [number - 3 for number in close]], 1) == (1, [])
    assert not_told_apart([close, [number + 0.1 * (-1) ** number for number in close], None, [-9.0] * 6], 1) == (0, [1])
    assert not_told_apart([close, None], 1) is None


def test_texts_stay_texts(folder, page):
    assert NASTY in page.text and "prompt 0 <i>" in page.text and "make <report>" in page.text
    assert "b" not in page.tags
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text and "<i>" not in text.replace('<i class="', "")


def test_names_stay_texts_in_tables_and_figures(tmp_path):
    name = 'a <b>$x^2$ & "b"'
    rows = [result(0.0, 0, noisy(0.0, 6)), result(0.5, 30, noisy(1.0, 6))]
    save_findings(tmp_path, Findings(rows, ["uncontrolled", name], list("abcdef")))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tables["quality"][2][0]["text"].startswith(name) and "b" not in page.tags
    # The legends of cost and divergence, and of V along responses.
    assert page.svg_texts.count(name) == 3 and name in page.images[0]["aria-label"]


def test_tokens_have_the_colour_and_the_number_of_their_v(folder, page, findings):
    text = (folder / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r"<span(?: class=\"([pm])(\d)\")? title=\"V (-?[\d.]+)\">([^<]*)</span>", text)
    assert [(float(value), piece) for *_, value, piece in shown[:3]] == [(1.0, " One"), (-2.0, " two"), (0.5, "\nthree")]
    middle = findings.results[0].reward
    for side, _, value, _ in shown:
        assert side == ("p" if float(value) > middle else "m")
    # The further from the middle, the stronger.
    strengths = {float(value): int(shade) for _, shade, value, _ in shown}
    assert strengths[-2.0] == 8 and 0 < strengths[0.5] < strengths[1.0] < 8
    # A token without a text of its own is not shown.
    assert all(piece for *_, piece in shown) and ("&lt;b&gt;" in [piece for *_, piece in shown])


def test_gains_are_paired_by_prompt(findings):
    base, control = findings.results[:2]
    row = make_rows(findings)[1]
    assert row.gain_interval == bootstrap_difference(by_prompt(np.array(control.rewards), 2), by_prompt(np.array(base.rewards), 2))
    # Each prompt's rewards differ by about as much, so far less than the prompts among themselves.
    assert row.gain_interval[1] - row.gain_interval[0] < 0.1 < 2 * np.std(base.rewards) / math.sqrt(15)


def test_rows_at_equal_divergence(page, findings):
    found = equal_kl(findings)
    head, *body = page.tables["equal"]
    assert [float(re.match(r"[\d.]+", cell["text"])[0]) for cell in head[1:-1]] == found.levels == [0.2, 0.5, 1.0, 2.0]
    for line in body:
        entries = found.rewards[line[0]["text"]]
        assert [cell["numbers"] for cell in line[1:-1]] == [[] if entry.reward is None else [entry.reward] for entry in entries]
        best = max((findings.validation[place] for place in findings.groups[line[0]["text"]]), key=lambda each: each.reward)
        assert line[-1]["numbers"] == [best.reward] and f"{best.kl:.3g} nats" in line[-1]["text"]


def test_levels_of_divergence_go_from_the_row_that_goes_least_far_to_the_second_furthest():
    assert kl_levels([30.0, 12.0, 8.0]) == [1.0, 2.0, 5.0, 10.0] and kl_levels([0.3]) == [0.02, 0.05, 0.1, 0.2] and kl_levels([0.0]) == []
    assert kl_levels([385.0, 11.6, 23.0, 55.0, 1.2, 0.16, 0.8]) == [0.1, 0.5, 1.0, 5.0, 10.0, 50.0]
    assert kl_levels([385.0, 55.0, 1e-9])[0] == 0.05


def test_a_row_that_has_more_at_a_smaller_divergence_is_not_passed_over(tmp_path):
    base, count = result(0.0, 0, noisy(0.0, 8)), 8
    shown = {"kls": [1.0] * count, "kl": 1.0}
    near = other("best-of-n", "samples", 8.0, noisy(5.0, count), **shown)
    far = [other(kind, "w", 1.0, noisy(mean, count), kls=[9.0] * count, kl=9.0) for kind, mean in (("ARGS", 1.0), ("prefix scorer", 4.0))]
    found = Findings([base, near, *far], ["uncontrolled", "best-of-n", "ARGS", "prefix scorer"], list("abcdefgh"))
    equal = equal_kl(found)
    assert equal.levels == [0.5, 1.0, 2.0, 5.0] and equal.better_before(1) == [] and equal.better_before(3) == ["best-of-n"]
    save_findings(tmp_path, found)
    lines = Page((tmp_path / "report.html").read_text(encoding="utf-8")).tables["equal"][1:]
    assert [[cell["best"] for cell in line[1:-1]] for line in lines] == [[True, True, False, False], [False] * 4, [False] * 4]


def test_the_settings_that_were_tried_and_the_chosen_ones(page, findings):
    lines = page.tables["settings"][1:]
    assert [line[0]["text"].split("chosen")[0].strip() for line in lines] == [
        *("uncontrolled", "RE-Controlalpha 0.25, n 30", "RE-Controlalpha 0.5, n 30", "RE-Controlalpha 1, n 30", "RE-Controlalpha 5, n 30"),
        *("ARGSw 0.5", "ARGSw 1"),
    ]
    assert ["chosen" in line[0]["text"] for line in lines] == [False, False, True, False, False, False, True]
    sums = [line[-1]["numbers"][0] for line in lines]
    assert sums == pytest.approx([each.coherence + each.diversity + each.reward for each in findings.validation])


def test_the_table_for_spreadsheets_has_every_digit(folder, findings):
    with open(folder / "report.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == findings.names and [line["setting"] for line in lines] == [Row("", each).setting for each in findings.results]
    for line, row in zip(lines, make_rows(findings), strict=True):
        for column in (*QUALITY, *COST):
            number, interval = column.number(row), column.interval(row)
            assert line[column.key] == ("" if number is None else str(number))
            if interval is not None:
                assert (float(line[f"{column.key}_low"]), float(line[f"{column.key}_high"])) == interval
        assert line["seeds"] == "2" and line["prompts"] == "15"
    assert lines[1]["wins"] == "15" and lines[0]["wins"] == ""


def test_the_file_for_programs(folder, findings):
    def refuse(name):
        raise AssertionError(f"the file has {name}")

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["format"] == "recontrol.report" and report["study"] == STUDY and report["command"] == "make <report>"
    assert [row["name"] for row in report["results"]] == findings.names and len(report["validation"]) == 7
    assert report["results"][1]["reward"] == findings.results[1].reward and report["results"][1]["win_rate"]["rate"] == 0.75
    assert report["groups"] == findings.groups and report["equal_kl"]["levels"] == [0.2, 0.5, 1.0, 2.0]
    assert report["calibration"]["responses"] == 30 and "torch" in report["versions"]
    assert not any("responses" in row or "rewards" in row for row in report["results"])


def test_the_responses_can_be_judged(folder, findings):
    lines = read_responses(folder / "responses.jsonl", "RE-Control")
    assert len(lines) == 30 and {line.seed for line in lines} == {0, 1}
    assert [line.response for line in lines] == findings.results[1].responses and lines[0].response == NASTY
    assert [line.prompt for line in lines] == findings.prompts * 2


def test_the_page_says_what_was_compared(page):
    for text in (
        "some/model, weights in float32",
        "file.jsonl, the first 30, 15 prompts, 2 seeds",
        "judged by judge:some-judge, against uncontrolled",
        "do_sample True",
    ):
        assert text in page.text
    assert "on some/data, split test, the largest coherence + diversity + reward" in page.text
    assert "method: re-control" in page.text and "revision" not in page.text


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_row_and_nothing_but_its_reward(tmp_path, seeds):
    bare = {"kl": None, "kl_interval": None, "kls": [], "coherence": None, "value_end": None, "nll": None, "perplexity": None, "edit_norm": None}
    only = result(0.0, 0, [1.0] * 2 * seeds, seeds=seeds, answers=[], **bare)
    save_findings(tmp_path, Findings([only], ["uncontrolled"], ["a", "b"]))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [cell["text"] for cell in page.tables["quality"][0]] == ["Method", "Reward", "Diversity", "Lengthtokens"]
    assert set(page.tables) == {"quality", "costs"}
    assert len(page.images) == 1 and all(link[1:] in page.ids for link in page.links)
    assert json.loads((tmp_path / "report.json").read_text())["validation"] is None
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 2 * seeds


def test_without_a_choice_the_settings_of_the_test_are_drawn(tmp_path):
    results = [result(0.0, 0, noisy(0.0, 6)), *(result(size, 30, noisy(size, 6)) for size in (0.25, 0.5, 1.0))]
    save_findings(tmp_path, Findings(results, [each.method for each in results], list("abcdef")))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "RE-Control along alpha" in page.images[2]["aria-label"] and "settings" not in page.tables
    assert [line[0]["text"] for line in page.tables["equal"][1:]] == ["RE-Control"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["uncontrolled"]}, "found 3 results, 1 names and 3 win rates"),
        ({"prompts": ["a", "b"]}, "uncontrolled has 30 responses to 2 prompts with 2 seeds, wanted 4"),
        ({"results": [], "names": [], "wins": []}, "found 0 results"),
    ],
)
def test_what_does_not_fit_is_named_before_a_file_is_written(findings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_findings(tmp_path / "new", dataclasses.replace(findings, **changes))
    assert not (tmp_path / "new").exists()


def test_numbers_have_the_digits_that_their_intervals_are_worth():
    assert interval_digits([(0.0, 2.0), (0.0, 0.5), (0.0, 3.0)]) == 1 and interval_digits([(0.0, 0.5)]) == 2
    assert interval_digits([(10.0, 90.0)]) == 0 and interval_digits([(0.0, 1e-9)]) == 5 and interval_digits([(1.0, 1.0)]) is None


def test_an_error_leaves_the_old_report(findings, tmp_path, monkeypatch):
    save_findings(tmp_path, findings, STUDY)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, *arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match=r"could not write .*responses\.jsonl"):
        save_findings(tmp_path, findings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_seeds_are_numbered_and_their_gains_are_paired(tmp_path):
    rows = [result(0.0, 0, [-1.0, 0.0, 0.5, 1.0, 2.0, 4.0], seeds=2), result(0.5, 30, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], seeds=2)]
    prompts = ["one", "two", "three"]
    save_findings(tmp_path, Findings(rows, [row.method for row in rows], prompts))
    lines = read_responses(tmp_path / "responses.jsonl", "RE-Control (alpha 0.5, n 30)")
    assert [(line.seed, line.prompt, line.response) for line in lines] == [
        (seed, prompt, f"réponse {3 * seed + index}") for seed in range(2) for index, prompt in enumerate(prompts)
    ]
    base, gained = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["results"]
    # Over three prompts whose seeds are averaged, not over six responses.
    assert gained["reward_gain_interval"] == list(bootstrap_difference([1.5, 2.5, 3.5], [0.0, 1.0, 2.25]))
    assert gained["reward_gain_interval"] != list(bootstrap_difference(rows[1].rewards, rows[0].rewards))
    assert base["values"] == rows[0].values[:3] and "reward_gain" not in base and gained["reward_gain"] == rows[1].reward - rows[0].reward


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    rows = [result(0.0, 0, [1.0, 2.0, 3.0]), result(0.5, 30, [1.0, 2.0, 3.0], perplexity=math.inf, settings={"radius": math.nan})]
    save_findings(tmp_path, Findings(rows, [row.method for row in rows], ["one", "two", "three"]))

    def refuse(name):
        raise AssertionError(f"the file has {name}")

    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert report["results"][1]["perplexity"] is None and report["results"][1]["settings"] == {"radius": None}
    assert report["results"][0]["perplexity"] == 70.0
