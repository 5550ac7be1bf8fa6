import copy
import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

import recontrol as rc
from recontrol.data import prompts as prompts_module
from recontrol.data.prompts import load_prompts, load_prompts_with_preferred

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
HH = [
    {
        "chosen": "\n\nHuman: Hi Human: what is an Assistant: ?\n\nAssistant: A helper.\n\nHuman: And more?\n\nAssistant: This is CHOSEN. Assistant: yes",
        "rejected": "\n\nHuman: Hi Human: what is an Assistant: ?\n\nAssistant: A helper.\n\nHuman: And more?\n\nAssistant: REJECTED",
    },
    {"chosen": "\n\nHuman: One\n\nHuman: two\n\nAssistant: CHOSEN\n\nHuman: trailing", "rejected": "\n\nHuman: One\n\nHuman: two\n\nAssistant: REJECTED"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "movie_reviews" / "lm")


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "movie_reviews" / "lm")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_lines(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json"])
def test_plain_prompts_are_taken_as_they_are(tmp_path, name):
    prompts = ["a", " b \n", "caf\u00e9 \u201c\u2026\u201d", "a"]
    assert load_prompts(write_lines(tmp_path / name, [{"prompt": prompt} for prompt in prompts])) == prompts


@pytest.mark.parametrize("name", ["p[ab].jsonl", "x[1].json", "a*b?.jsonl", "a::b.jsonl.gz", "p{1,2}.jsonl"])
def test_a_file_is_read_as_it_is_named(tmp_path, name):
    write_lines(tmp_path / "pa.jsonl", [{"prompt": "another"}])
    path = write_lines(tmp_path / name, [{"prompt": "this"}])
    assert load_prompts(path) == ["this"]
    # A file of the same age and name with other content is another.
    status = path.stat()
    write_lines(path, [{"prompt": "that"}])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_prompts(path) == ["that"]


def test_a_list_a_byte_order_mark_and_rows_with_other_keys_are_read(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"prompt": "a"}, {"prompt": "b", "y": 2}], indent=1).encode())
    assert load_prompts(tmp_path / "p.json") == ["a", "b"]


def test_the_prompts_of_the_example_model():
    prompts = load_prompts(ROOT / "examples" / "movie_reviews" / "prompts-train.jsonl", limit=3)
    assert prompts == ["I will keep this as short", "I saw this movie with my", "Wow, I can't believe people consider"]


def test_a_dialogue_ends_with_the_mark_of_its_last_turn(tmp_path):
    first, second = load_prompts(write_lines(tmp_path / "hh.jsonl", HH))
    assert first == "\n\nHuman: Hi Human: what is an Assistant: ?\n\nAssistant: A helper.\n\nHuman: And more?\n\nAssistant:"
    assert second == "\n\nHuman: One\n\nHuman: two\n\nAssistant:"


def test_the_name_of_the_user_is_changed_at_the_turns_only(tmp_path):
    first, _ = load_prompts(write_lines(tmp_path / "hh.jsonl", HH), human="User")
    assert first == "\n\nUser: Hi Human: what is an Assistant: ?\n\nAssistant: A helper.\n\nUser: And more?\n\nAssistant:"


def test_a_question_of_shp(tmp_path):
    path = write_lines(tmp_path / "shp.jsonl", [{"post_id": "x", "history": "Why?"}])
    assert load_prompts(path) == ["Human: Why?\nAssistant:"]
    assert load_prompts(path, human="User") == ["User: Why?\nAssistant:"]


def test_a_folder_is_read_as_the_hub_would_be(tmp_path):
    write_lines(tmp_path / "train.jsonl", HH)
    write_lines(tmp_path / "test.jsonl", HH[:1])
    assert len(load_prompts(tmp_path)) == 2
    assert len(load_prompts(tmp_path, "test")) == 1
    with pytest.raises(ValueError, match="validation"):
        load_prompts(tmp_path, "validation")


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    for name in ("pa", "p[ab]"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "train.jsonl", [{"prompt": name}])
    with pytest.raises(ValueError, match="takes for a pattern"):
        load_prompts(tmp_path / "p[ab]")
    assert load_prompts(tmp_path / "p[ab]" / "train.jsonl") == ["p[ab]"]


def test_names_go_to_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(HH if "hh" in name else [{"history": "Why?"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_prompts("Anthropic/hh-rlhf", "test")) == 2
    assert load_prompts("stanfordnlp/SHP") == ["Human: Why?\nAssistant:"]
    assert asked == [("Anthropic/hh-rlhf", "test"), ("stanfordnlp/SHP", "train")]


def test_a_hub_that_does_not_answer(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"'nobody/none'.*no network"):
        load_prompts("nobody/none")


def test_chat_templates_get_the_turns_as_messages(tmp_path, chat_tokenizer):
    first, second = load_prompts(write_lines(tmp_path / "hh.jsonl", HH), tokenizer=chat_tokenizer, chat_template=True, human="User")
    assert first == "[user]Hi Human: what is an Assistant: ?[end][assistant]A helper.[end][user]And more?[end][assistant]"
    assert second == "[user]One\n\ntwo[end][assistant]"
    # The template writes the beginning-of-sequence token and the tokenizer adds it: once is right.
    assert chat_tokenizer(first).input_ids.count(chat_tokenizer.bos_token_id) == 1
    shp = load_prompts(write_lines(tmp_path / "shp.jsonl", [{"history": "Why?"}]), tokenizer=chat_tokenizer, chat_template=True)
    plain = load_prompts(write_lines(tmp_path / "p.jsonl", [{"prompt": "Why?"}]), tokenizer=chat_tokenizer, chat_template=True)
    assert shp == plain == ["[user]Why?[end][assistant]"]


def test_a_template_keeps_its_first_token_where_the_tokenizer_adds_none(tmp_path, chat_tokenizer):
    bare = copy.deepcopy(chat_tokenizer)
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    assert bare("").input_ids == []
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "Why?"}])
    assert load_prompts(path, tokenizer=bare, chat_template=True) == ["<|bos|>[user]Why?[end][assistant]"]


def test_long_prompts_are_left_out(tmp_path, tokenizer, caplog):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "word " * count} for count in (3, 60, 4, 60, 5)])
    with caplog.at_level("WARNING"):
        kept = load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=20)
    assert kept == ["word " * count for count in (3, 4, 5)]
    assert "left out 2 prompts of 5 in" in caplog.text and "more than 20 tokens" in caplog.text
    assert load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=20, limit=2) == ["word " * 3, "word " * 4]
    exact = len(tokenizer("word " * 3).input_ids)
    assert load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=exact) == ["word " * 3]
    with pytest.raises(ValueError, match=r"no prompt of at most 2 tokens \(5 are longer\)"):
        load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "empty"),
        ("p.jsonl", "\n\n", "empty"),
        ("p.json", "", "empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b', "damaged"),
        ("p.jsonl", '{"text": "a"}\n', r"no column prompt, chosen or history; found \['text'\]"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "line 2 must have text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "line 2 must have text"),
        ("p.jsonl", '{"chosen": "no turns here"}\n', "line 1: a dialogue must have a turn of the assistant"),
        ("p.txt", "a\n", "prompts are read from"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_prompts(path)
    assert name in str(raised.value)


def test_an_empty_archive_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        load_prompts(write_lines(tmp_path / "p.jsonl.gz", []))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl")


def test_options_that_need_a_tokenizer_say_so(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}])
    for options in ({"chat_template": True}, {"max_prompt_tokens": 5}):
        with pytest.raises(ValueError, match="need the tokenizer"):
            load_prompts(path, **options)
    with pytest.raises(ValueError, match="no chat template"):
        load_prompts(path, tokenizer=tokenizer, chat_template=True)
    with pytest.raises(ValueError, match="limit must be at least 1, found 0"):
        load_prompts(path, limit=0)


SHP = [
    {"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No idea.", "labels": 1, "score_A": 9, "score_B": 2},
    {"history": "word " * 60, "human_ref_A": "long A", "human_ref_B": "long B", "labels": 1, "score_A": 4, "score_B": 3},
    {"history": "When?", "human_ref_A": "Then.", "human_ref_B": "Now.", "labels": 0, "score_A": 1, "score_B": 5},
]


class TestPreferred:
    def test_the_preferred_response_follows_the_last_mark_of_a_dialogue(self, tmp_path):
        path = write_lines(tmp_path / "hh.jsonl", HH[:1])
        prompts, preferred = load_prompts_with_preferred(path, human="User")
        assert prompts == load_prompts(path, human="User") and preferred == [" This is CHOSEN. Assistant: yes"]
        # Prompt and reference are the dialogue, whole.
        prompts, preferred = load_prompts_with_preferred(path)
        assert [prompt + reference for prompt, reference in zip(prompts, preferred, strict=True)] == [HH[0]["chosen"]]

    def test_the_answer_with_the_higher_score(self, tmp_path, tokenizer):
        path = write_lines(tmp_path / "shp.jsonl.gz", SHP)
        assert load_prompts_with_preferred(path) == (load_prompts(path), [" Because.", " long A", " Now."])
        # Responses are left out with their prompts, and no more are read than asked for.
        short = {"tokenizer": tokenizer, "max_prompt_tokens": 40}
        assert load_prompts_with_preferred(path, **short) == (["Human: Why?\nAssistant:", "Human: When?\nAssistant:"], [" Because.", " Now."])
        assert load_prompts_with_preferred(path, limit=1, **short) == (["Human: Why?\nAssistant:"], [" Because."])

    def test_the_old_name_warns(self, tmp_path):
        path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": " b"}])
        with pytest.warns(DeprecationWarning, match="load_prompts_with_references is now load_prompts_with_preferred"):
            assert prompts_module.load_prompts_with_references(path) == (["a"], [" b"])
        with pytest.warns(DeprecationWarning, match=r"load_prompts_with_references is now .*load_prompts_with_preferred"):
            assert rc.load_prompts_with_references is load_prompts_with_preferred

    def test_plain_pairs(self, tmp_path):
        path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}])
        assert load_prompts_with_preferred(path) == (["a"], [" b"])

    def test_chat_templates_leave_no_space_around_the_response(self, tmp_path, chat_tokenizer):
        for name, rows, reference in (("hh.jsonl", HH[:1], "This is CHOSEN. Assistant: yes"), ("shp.jsonl", SHP[:1], "Because.")):
            path = write_lines(tmp_path / name, rows)
            prompts, preferred = load_prompts_with_preferred(path, tokenizer=chat_tokenizer, chat_template=True)
            assert prompts == load_prompts(path, tokenizer=chat_tokenizer, chat_template=True) and preferred == [reference]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"prompt": "a"}], r"has no preferred responses: beside prompt it must have the columns chosen; found \['prompt'\]"),
            ([{"history": "a", "labels": 1}], "beside history it must have the columns human_ref_A, human_ref_B, labels"),
            ([SHP[0], {**SHP[0], "human_ref_B": None}], "line 2 must have text in its columns human_ref_B"),
            ([{**SHP[0], "labels": 3}], "line 1: labels must be 1, where human_ref_A is preferred, or 0, found 3"),
            ([{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": None}], "line 2 must have text in its columns chosen"),
        ],
    )
    def test_rows_that_prefer_nothing_are_refused(self, tmp_path, rows, message):
        with pytest.raises(ValueError, match=message):
            load_prompts_with_preferred(write_lines(tmp_path / "p.jsonl", rows))


@pytest.mark.shared
@pytest.mark.skipif(not (DATA / "hh-rlhf-harmless-test.jsonl.gz").exists(), reason="the real lines of HH-RLHF are not beside the checkout")
def test_real_lines_of_hh_rlhf(chat_tokenizer):
    path = DATA / "hh-rlhf-harmless-test.jsonl.gz"
    prompts = load_prompts(path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        chosen = [json.loads(line)["chosen"] for line in file]
    assert len(prompts) == len(chosen) == 2312
    for prompt, text in zip(prompts, chosen, strict=True):
        assert prompt.startswith("\n\nHuman:") and prompt.endswith("\n\nAssistant:")
        # The dialogue is prompt then response, and the prompt has nothing of the response.
        assert text.startswith(prompt) and "\n\nAssistant:" not in text[len(prompt) :]
    assert load_prompts_with_preferred(path) == (prompts, [text.removeprefix(prompt) for prompt, text in zip(prompts, chosen, strict=True)])
    rendered = load_prompts(path, tokenizer=chat_tokenizer, chat_template=True)
    assert all(text.startswith("[user]") and text.endswith("[end][assistant]") for text in rendered)
    assert load_prompts(path, human="User", limit=1)[0].startswith("\n\nUser:")


@pytest.mark.shared
@pytest.mark.skipif(not (DATA / "shp-test-prompts.jsonl").exists(), reason="the real lines of SHP are not beside the checkout")
def test_real_lines_of_shp():
    path = DATA / "shp-test-prompts.jsonl"
    prompts = load_prompts(path)
    with path.open(encoding="utf-8") as file:
        histories = [json.loads(line)["history"] for line in file]
    assert prompts == [f"Human: {history}\nAssistant:" for history in histories]
    assert len(prompts) == 1000
