import json

import pytest

from recontrol.evaluation.response_files import Line, pair_up, read_responses


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def line(prompt, response, **fields):
    return {"prompt": prompt, "response": response, **fields}


class TestReading:
    def test_prompt_and_response_are_enough(self, tmp_path):
        # U+2028 ends a line for some readers.
        path = write(tmp_path / "r.jsonl", [line("p", "caf\u00e9\u2028 x", reward=1.0), line("p", "y")])
        path.write_text(path.read_text() + "\n")
        assert read_responses(path) == [Line("p", "caf\u00e9\u2028 x"), Line("p", "y")]

    def test_one_method_of_several(self, tmp_path):
        path = write(tmp_path / "r.jsonl", [line("p", f"{method} {seed}", method=method, seed=seed, index=0) for method in ("one", "two") for seed in (0, 1)])
        assert read_responses(path, "two") == [Line("p", "two 0", 0), Line("p", "two 1", 1)]
        with pytest.raises(ValueError, match=r"responses of several methods, say which one: its methods are 'one', 'two'"):
            read_responses(path)
        with pytest.raises(ValueError, match=r"no responses of the method 'three': its methods are 'one', 'two'"):
            read_responses(path, "three")

    def test_the_only_method_need_not_be_named(self, tmp_path):
        path = write(tmp_path / "r.jsonl", [line("p", "x", method="one")])
        assert read_responses(path) == read_responses(path, "one") == [Line("p", "x")]

    @pytest.mark.parametrize(
        "content,message",
        [
            ("", "has no responses"),
            ('{"prompt": "p", "response": "x"}\n{"prompt": "p", "resp', "line 2 is damaged or not JSON"),
            ('{"prompt": "p"}\n', "line 1 must be an object with the texts prompt and response, found"),
            ('{"prompt": "p", "response": 3}\n', "line 1 must be an object with the texts"),
            ("[1]\n", "line 1 must be an object with the texts"),
        ],
    )
    def test_damaged_files(self, tmp_path, content, message):
        path = tmp_path / "r.jsonl"
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as raised:
            read_responses(path)
        assert "r.jsonl" in str(raised.value)

    def test_a_method_where_lines_name_none(self, tmp_path):
        with pytest.raises(ValueError, match="no responses of the method 'one': its lines name no method"):
            read_responses(write(tmp_path / "r.jsonl", [line("p", "x")]), "one")

    def test_several_settings_without_a_label(self, tmp_path):
        path = write(tmp_path / "r.jsonl", [line("p", "x", step_size=size, index=0) for size in (0.25, 0.5)])
        with pytest.raises(ValueError, match="lines 1 and 2 both have index 0 and seed None"):
            read_responses(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_responses(tmp_path / "none.jsonl")


class TestPairing:
    def test_by_prompt_in_any_order(self):
        others = [Line("q", "oq"), Line("p", "op"), Line("further", "of")]
        assert pair_up([Line("p", "x"), Line("q", "y")], others) == (["p", "q"], ["x", "y"], ["op", "oq"])

    def test_a_prompt_that_comes_twice(self):
        others = [Line("p", "first"), Line("q", "oq"), Line("p", "second")]
        assert pair_up([Line("p", "x"), Line("p", "y"), Line("q", "z")], others)[2] == ["first", "second", "oq"]

    def test_by_seed(self):
        others = [Line("p", "one", 1), Line("p", "zero", 0)]
        assert pair_up([Line("p", "x", 0), Line("p", "y", 1)], others)[2] == ["zero", "one"]
        with pytest.raises(ValueError, match="1 of 2 responses have no other one to the same prompt and seed 2: 1; found the prompt 'p'"):
            pair_up([Line("p", "x", 0), Line("p", "y", 2)], others)

    def test_references_serve_every_seed(self):
        lines = [Line("p", "x", 0), Line("p", "y", 0), Line("p", "z", 1), Line("p", "w", 1)]
        assert pair_up(lines, [Line("p", "first"), Line("p", "second")])[2] == ["first", "second", "first", "second"]

    def test_a_prompt_that_the_others_lack(self):
        with pytest.raises(
            ValueError, match=r"2 of 3 responses have no other one to the same prompt: 1, 2; found the prompt 'q', among others to prompts such as 'p'"
        ):
            pair_up([Line("p", "x"), Line("q", "y"), Line("p", "z")], [Line("p", "o")])
