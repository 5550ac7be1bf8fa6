"""From prompts to responses: padding, seeds, where a response ends, and that nothing of the caller's is changed."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recontrol.decoding.batches import REFUSED, check_lengths, check_options, eos_tokens, evaluation_mode, generate_batch, padding_token, seeded
from recontrol.decoding.responses import CONTEXT_TOKENS, StopStrings, decode_after, listed_stop_strings, make_response

EXAMPLE = Path(__file__).parent.parent / "examples" / "movie_reviews"
PAD, EOS, VOCABULARY = 0, 2, 98
BYTE_LEVEL = AutoTokenizer.from_pretrained(EXAMPLE / "lm")
PROMPTS = ["To be", "or not", "to be, that is the question:", "?"]


pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer of printable ASCII, one token a letter, after <pad>, <bos> and <eos>."""

    def __init__(self, pad_token_id=PAD, eos_token_id=EOS):
        self.pad_token_id, self.eos_token_id = pad_token_id, eos_token_id

    def __call__(self, texts):
        return SimpleNamespace(input_ids=[[ord(letter) - 32 + 3 for letter in text] for text in texts])

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        special = ["", "", ""] if skip_special_tokens else ["<pad>", "<bos>", "<eos>"]
        return "".join(special[token] if token < 3 else chr(token - 3 + 32) for token in ids)


class Bytes:
    """A tokenizer of bytes, so that a letter may be several tokens."""

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace")


def random_model(kind: str):
    """In float64, where padding cannot tip a greedy choice."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": False}
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        # With dropout, so that the mode can be seen in the result.
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, attention_dropout=0.5, **sizes, **common))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, **common))
    # Larger weights than at the start of a training, else every response is one letter again and again.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.4)
    return model.double().eval()


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


def greedy_by_hand(model, prompt: str, count: int) -> list[int]:
    """The greedy response to one prompt without a cache and without padding."""
    ids = Letters()([prompt]).input_ids[0]
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.fixture(scope="module")
def free(model):
    """What the model says to each prompt when nothing ends it: 9 tokens each."""
    rows = [greedy_by_hand(model, prompt, 9) for prompt in PROMPTS]
    # Not one response four times, and not one letter nine times.
    assert len({tuple(row) for row in rows}) == 4 and all(len(set(row)) > 4 for row in rows)
    return rows


def tokens(batch) -> list[list[int]]:
    return [response.token_ids for response in batch.responses]


class TestGenerateBatch:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_each_row_is_what_the_prompt_alone_gives(self, kind):
        """Rotary positions and learned ones. Without `do_sample` the model is greedy, whatever its own default."""
        model = random_model(kind)
        wanted = [greedy_by_hand(model, prompt, 9) for prompt in PROMPTS]
        model.generation_config.do_sample = True
        batch = generate_batch(model, Letters(), PROMPTS, max_new_tokens=9, eos_token_id=None)
        assert tokens(batch) == wanted and len({tuple(row) for row in wanted}) == len(PROMPTS)
        assert [response.finish for response in batch.responses] == ["length"] * 4 and batch.steps == 9 and batch.tokens == 36
        assert [response.text for response in batch.responses] == [Letters().decode(row, skip_special_tokens=True) for row in wanted]

    @pytest.mark.parametrize(
        "tokenizer", [Letters(), Letters(pad_token_id=None), Letters(None, None), Letters(pad_token_id=50)], ids=["pad", "eos", "none", "letter"]
    )
    def test_what_fills_the_rows_does_not_matter(self, model, free, tokenizer):
        """The pad token, the eos token or none of the tokenizer's, and a letter that the prompts hold too."""
        for options in ({}, {"pad_token_id": 40}):
            batch = generate_batch(model, tokenizer, PROMPTS, max_new_tokens=4, eos_token_id=None, **options)
            assert tokens(batch) == [row[:4] for row in free]

    @pytest.mark.parametrize("how", ["argument", "list", "own config", "own config without an end", "config of the model"])
    def test_the_end_of_sequence_is_kept_and_what_comes_after_it_is_not(self, model, free, how):
        # One token that ends some rows and another that ends some more, but not all.
        pairs = itertools.permutations({token for row in free for token in row}, 2)
        ended = {pair: [sum(not set(ends).isdisjoint(row) for row in free) for ends in (pair[:1], pair)] for pair in pairs}
        end, other = next(pair for pair, (by_one, by_both) in ended.items() if 0 < by_one < by_both < 4)
        options = {
            "argument": {"eos_token_id": end},
            "list": {"eos_token_id": [end, other]},
            "own config": {"generation_config": GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=PAD)},
            "own config without an end": {"generation_config": GenerationConfig(do_sample=False, pad_token_id=PAD)},
            "config of the model": {},
        }[how]
        before = model.generation_config.eos_token_id
        if how in ("config of the model", "own config without an end"):
            model.generation_config.eos_token_id = end
        try:
            batch = generate_batch(model, Letters(), PROMPTS, max_new_tokens=9, **options)
        finally:
            model.generation_config.eos_token_id = before
        ends = {end, other} if how == "list" else {end}
        cuts = [next((place for place, token in enumerate(row) if token in ends), None) for row in free]
        assert tokens(batch) == [row if cut is None else row[: cut + 1] for row, cut in zip(free, cuts, strict=True)]
        assert [response.finish for response in batch.responses] == ["length" if cut is None else "eos" for cut in cuts]
        assert len({response.finish for response in batch.responses}) == 2
        assert batch.steps == 9 and batch.tokens == sum(map(len, tokens(batch))) < 36

    def test_steps_are_those_of_the_longest_row(self, model, free):
        row = free[0]
        batch = generate_batch(model, Letters(), PROMPTS[:1], max_new_tokens=9, eos_token_id=row[3])
        assert batch.steps == row.index(row[3]) + 1 == len(batch.responses[0].token_ids)

    def test_a_seed_gives_one_result_whatever_was_drawn_before(self, model):
        options = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "eos_token_id": None}
        torch.manual_seed(1)
        first = tokens(generate_batch(model, Letters(), PROMPTS[:1] * 3, seed=5, **options))
        torch.rand(7)
        assert tokens(generate_batch(model, Letters(), PROMPTS[:1] * 3, seed=5, **options)) == first
        assert tokens(generate_batch(model, Letters(), PROMPTS[:1] * 3, seed=6, **options)) != first
        # Each row of a batch draws for itself, and no seed is seed 0.
        assert len({tuple(row) for row in first}) == 3
        assert tokens(generate_batch(model, Letters(), PROMPTS, **options)) == tokens(generate_batch(model, Letters(), PROMPTS, seed=0, **options))

    def test_a_generation_config_is_the_callers_own_word_on_sampling(self, model):
        config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=EOS, pad_token_id=PAD)
        rows = [tokens(generate_batch(model, Letters(), PROMPTS[:1], max_new_tokens=8, seed=seed, generation_config=config))[0] for seed in range(3)]
        assert len({tuple(row) for row in rows}) > 1

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt], ids=lambda error: error.__name__)
    def test_an_exception_leaves_the_generator_and_the_modes_as_they_were(self, model, error):
        calls = []

        def fail(*_):
            calls.append(model.training)
            if len(calls) == 3:
                raise error

        children = list(model.children())
        model.train()
        children[0].eval()
        state = torch.get_rng_state()
        hook = model.lm_head.register_forward_hook(fail)
        try:
            with pytest.raises(error):
                generate_batch(model, Letters(), PROMPTS, max_new_tokens=5, do_sample=True, eos_token_id=None)
            assert calls == [False] * 3
            assert model.training and not children[0].training and children[1].training
            assert torch.equal(torch.get_rng_state(), state)
        finally:
            hook.remove()
            model.eval()

    def test_it_does_not_train(self, model, free):
        """No dropout, no graph, though the model is in training mode."""
        model.train()
        seen = []
        hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
        try:
            batch = generate_batch(model, Letters(), PROMPTS, max_new_tokens=4, eos_token_id=None)
        finally:
            hook.remove()
            model.eval()
        assert tokens(batch) == [row[:4] for row in free] and seen == [False] * 4

    def test_the_tokenizer_and_the_model_are_left_alone(self, model):
        tokenizer, configs = Letters(), [model.config.to_dict(), model.generation_config.to_dict()]
        generate_batch(model, tokenizer, PROMPTS, max_new_tokens=2, stop_strings=["xyz"], do_sample=True)
        assert vars(tokenizer) == {"pad_token_id": PAD, "eos_token_id": EOS}
        assert [model.config.to_dict(), model.generation_config.to_dict()] == configs

    @pytest.mark.parametrize("name", REFUSED)
    def test_an_option_that_gives_no_row_of_tokens_a_prompt_is_refused_before_the_work(self, name):
        model = SimpleNamespace()
        given = {"max_length": 20, "stop_strings": ["a"], "return_dict_in_generate": True}.get(name, [object()])
        # The stop strings are an argument of its own to `generate_batch`.
        for refuse in (check_options, *([] if name == "stop_strings" else [lambda options: generate_batch(model, Letters(), PROMPTS, **options)])):
            with pytest.raises(ValueError, match=f"^{name}=.* is not taken here: {REFUSED[name]}$"):
                refuse({name: given})
        check_options({name: None, "do_sample": True, "top_p": 0.9, "num_beams": 1})

    def test_several_responses_a_prompt_and_no_prompts_are_refused(self, model):
        with pytest.raises(ValueError, match="found 8 responses to 4 prompts, wanted one each: leave num_return_sequences at 1"):
            generate_batch(model, Letters(), PROMPTS, max_new_tokens=1, do_sample=True, num_return_sequences=2)
        with pytest.raises(ValueError, match="there are no prompts"):
            generate_batch(model, Letters(), [])


class TestStopStringsOfABatch:
    def test_a_row_ends_before_the_first_token_that_touches_one_and_the_others_go_on(self, model, free):
        texts = [Letters().decode(row) for row in free]
        # Two letters that only one row holds, and these not at its end, so that it ends early.
        row, stop = next(
            (row, text[at : at + 2]) for row, text in enumerate(texts) for at in range(1, 5) if sum(text[at : at + 2] in other for other in texts) == 1
        )
        batch = generate_batch(model, Letters(), PROMPTS, max_new_tokens=9, eos_token_id=None, stop_strings=["not to be found", stop])
        for index, response in enumerate(batch.responses):
            at = texts[index].find(stop) if index == row else None
            assert response.token_ids == free[index][:at] and response.finish == ("length" if at is None else "stop")
        assert batch.steps == 9
        alone = generate_batch(model, Letters(), [PROMPTS[row]], max_new_tokens=9, eos_token_id=None, stop_strings=[stop])
        assert alone.responses == [batch.responses[row]]
        # Not one step is run after the one that completed the stop string.
        assert alone.steps == texts[row].find(stop) + 2

    def test_what_the_prompt_holds_stops_nothing(self, model, free):
        """Neither the whole of it nor its end together with the beginning of the response."""
        row = free[2][:6]
        stops = ["question", PROMPTS[2], PROMPTS[2][-1] + Letters().decode(row[:1])]
        (response,) = generate_batch(model, Letters(), [PROMPTS[2]], max_new_tokens=6, eos_token_id=None, stop_strings=stops).responses
        assert (response.token_ids, response.finish) == (row, "length")

    def test_with_the_model_of_the_example(self):
        """A stop string that begins inside a token takes the whole token; with a padded row beside it."""
        model, tokenizer = AutoModelForCausalLM.from_pretrained(EXAMPLE / "lm", dtype=torch.float32).eval(), BYTE_LEVEL
        prompts = ["This film was", "I have seen many films in my life, and this one is by far"]
        free = generate_batch(model, tokenizer, prompts, max_new_tokens=10)
        pieces = [tokenizer.decode([token]) for token in free.responses[0].token_ids]
        text = free.responses[0].text
        assert "".join(pieces) == text and text[0] == " "
        place = next(place for place in range(2, 8) if len(pieces[place]) > 3 and text.find(pieces[place][1:]) == len("".join(pieces[:place])) + 1)
        (response, _) = generate_batch(model, tokenizer, prompts, max_new_tokens=10, stop_strings=[pieces[place][1:]]).responses
        assert response.finish == "stop" and response.token_ids == free.responses[0].token_ids[:place] and response.text == "".join(pieces[:place])

    @settings(max_examples=60, deadline=None)
    @given(text=st.text("aéb👣", min_size=1, max_size=14), stops=st.lists(st.text("aéb👣", min_size=1, max_size=5), min_size=1, max_size=3))
    def test_a_row_is_done_at_the_very_byte_that_completes_a_stop_string(self, text, stops):
        """Although only the end of the text is looked at. Tokens of one byte are the most that a stop string can be made of."""
        ids = list(text.encode())
        criterion = StopStrings(Bytes(), stops, prompt_length=3)
        prompt = list("👣ab".encode())[-3:]
        for count in range(1, len(ids) + 1):
            wanted = any(stop in bytes(ids[:count]).decode(errors="replace") for stop in stops)
            found = criterion(torch.tensor([prompt + ids[:count], prompt + [0] * count]), torch.empty(0))
            assert found.dtype == torch.bool and found.tolist() == [wanted, False]
            if wanted:
                break


class TestListedStopStrings:
    def test_one_text_is_one_stop_string(self, model, free):
        assert listed_stop_strings("Human:") == ["Human:"] and listed_stop_strings(None) == listed_stop_strings([]) == []
        text = Letters().decode(free[0][3:5])
        batches = [generate_batch(model, Letters(), PROMPTS, max_new_tokens=9, eos_token_id=None, stop_strings=stops) for stops in (text, [text])]
        assert tokens(batches[0]) == tokens(batches[1]) != free

    @pytest.mark.parametrize("stops", ["", [""], ["a", ""], [b"a"], [3]])
    def test_what_cannot_stop_anything_is_refused(self, model, stops):
        with pytest.raises(ValueError, match="stop_strings must be texts that are not empty, found"):
            generate_batch(model, Letters(), PROMPTS, stop_strings=stops)


class TestCheckLengths:
    def test_the_last_token_that_fits(self, model):
        check_lengths(model, Letters(), ["x" * 48, "x"], 16)
        with pytest.raises(ValueError, match=r"1 prompts leave no room for 16 new tokens in a context of 64: 0 \(49 tokens\)$"):
            check_lengths(model, Letters(), ["x" * 49, "x"], 16)
        generate_batch(model, Letters(), ["x" * 48], max_new_tokens=16, eos_token_id=None)

    def test_after_eight_prompts_the_others_are_not_named(self, model):
        eight = ", ".join(f"{index} (60 tokens)" for index in range(1, 9)).replace("(", r"\(").replace(")", r"\)")
        for count, rest in ((8, ""), (9, " and 1 more")):
            with pytest.raises(ValueError, match=f"{count} prompts leave no room for 16 new tokens in a context of 64: {eight}{rest}$"):
                check_lengths(model, Letters(), ["x", *["x" * 60] * count], 16)

    def test_a_model_without_a_longest_context(self):
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder=None: SimpleNamespace()), get_input_embeddings=lambda: None)
        check_lengths(model, Letters(), ["x" * 10_000], 10_000)

    def test_a_limit_of_the_callers_comes_on_top(self, model):
        check_lengths(model, Letters(), ["x" * 20], 16, max_prompt_tokens=20)
        with pytest.raises(ValueError, match=r"1 prompts are longer than 20 tokens: 1 \(21 tokens\)$"):
            check_lengths(model, Letters(), ["x", "x" * 21], 16, max_prompt_tokens=20)
        with pytest.raises(ValueError, match="leave no room for 16 new tokens in a context of 64"):
            check_lengths(model, Letters(), ["x" * 49], 16, max_prompt_tokens=1000)

    def test_something_else_than_texts_is_named(self, model):
        with pytest.raises(TypeError, match=r"prompts must be a list of texts, found NoneType at 1, 2$"):
            check_lengths(model, Letters(), ["To be", None, 3], 1)

    def test_one_text_and_none(self, model):
        with pytest.raises(TypeError, match=r"prompts must be a list of texts, found one text, 'To be'"):
            check_lengths(model, Letters(), "To be", 1)
        with pytest.raises(ValueError, match="there are no prompts"):
            check_lengths(model, Letters(), [], 1)


class TestEnds:
    @pytest.mark.parametrize(
        ("tokenizer", "options", "ends", "padding"),
        [
            (Letters(), {}, {EOS}, PAD),
            (Letters(), {"eos_token_id": 7}, {7}, PAD),
            (Letters(), {"eos_token_id": [9, 7, 9]}, {7, 9}, PAD),
            (Letters(), {"eos_token_id": torch.tensor([9, 7])}, {7, 9}, PAD),
            (Letters(), {"eos_token_id": None}, set(), PAD),
            (Letters(), {"pad_token_id": 50}, {EOS}, 50),
            (Letters(pad_token_id=None), {}, {EOS}, EOS),
            (Letters(pad_token_id=None, eos_token_id=5), {}, {EOS}, 5),
            (Letters(pad_token_id=None, eos_token_id=None), {}, {EOS}, 0),
            (Letters(), {"generation_config": GenerationConfig(eos_token_id=[7, 8])}, {7, 8}, PAD),
            (Letters(), {"generation_config": GenerationConfig(eos_token_id=7), "eos_token_id": 9}, {9}, PAD),
        ],
    )
    def test_the_ends_of_a_row_and_what_is_filled_in_behind_them(self, model, tokenizer, options, ends, padding):
        assert eos_tokens(model, options) == ends and padding_token(tokenizer, options) == padding


class TestSeeded:
    def test_a_seed_inside_and_the_callers_generator_outside(self):
        torch.manual_seed(3)
        wanted = torch.rand(4)
        torch.manual_seed(3)
        first = torch.rand(2)
        with seeded(8):
            inside = torch.rand(2)
            with seeded(9):
                torch.rand(2)
            torch.rand(1)
        assert torch.equal(torch.cat([first, torch.rand(2)]), wanted)
        assert torch.equal(inside, torch.rand(2, generator=torch.Generator().manual_seed(8)))

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda error: error.__name__)
    def test_also_after_an_exception(self, error):
        state = torch.get_rng_state()
        with pytest.raises(error), seeded(8):
            torch.rand(2)
            raise error
        assert torch.equal(torch.get_rng_state(), state)


class TestEvaluationMode:
    @pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt], ids=str)
    def test_each_module_comes_back_in_its_own_mode(self, error):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU()))
        model[1].eval()
        model[1][0].train()
        modes = [module.training for module in model.modules()]
        assert True in modes and False in modes
        try:
            with evaluation_mode(model):
                assert not any(module.training for module in model.modules())
                with evaluation_mode(model[1]):
                    model[1].train()
                assert not any(module.training for module in model.modules())
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert [module.training for module in model.modules()] == modes


class TestResponses:
    def test_special_tokens_are_kept_as_tokens_and_left_out_of_the_text(self):
        ids = Letters()(["Hi!"]).input_ids[0]
        response = make_response(Letters(), [1, 50], [*ids, EOS, PAD, PAD, *ids], {EOS})
        assert (response.token_ids, response.text, response.finish) == ([*ids, EOS], "Hi!", "eos")
        # A pad token that is no end is a token like any other; where padding is the end, only the first of it is kept.
        assert make_response(Letters(), [50], [*ids, PAD], {EOS}).finish == "length"
        assert make_response(Letters(), [50], [*ids, PAD, PAD, PAD], {PAD}).token_ids == [*ids, PAD]

    def test_nothing_new_is_an_empty_response(self):
        response = make_response(Letters(), [50], [], {EOS})
        assert (response.token_ids, response.text, response.finish) == ([], "", "length")
        assert make_response(Letters(), [50], [EOS], {EOS}).text == ""

    def test_the_ids_that_are_given_are_left_alone(self):
        prompt, ids = (50, 51), tuple(Letters()(["abcHuman:"]).input_ids[0])
        assert make_response(Letters(), prompt, ids, frozenset({EOS}), ("Human:",)).text == "abc"


@pytest.fixture(scope="module")
def sentencepiece():
    """Tokens begin with the space before them, and a text begins without one, as with the tokenizers of Llama 2 and Vicuna."""
    words = ["\u2581I", "\u2581have", "\u2581seen", "\u2581this", "\u2581film", "s", ",", "\u2581", "\u2581and", "!", "film"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in words)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=True)


class TestDecodeAfter:
    def test_the_first_space_is_kept(self, sentencepiece):
        """Wherever the prompt ends, also in the middle of a word; and no space is tidied away before a comma."""
        text = "I have seen this films , and this film!"
        ids = sentencepiece(text).input_ids
        assert sentencepiece.decode(ids[2:], clean_up_tokenization_spaces=False)[0] != " "
        for cut in range(1, len(ids)):
            before = sentencepiece.decode(ids[:cut], clean_up_tokenization_spaces=False)
            after = decode_after(sentencepiece, ids[:cut], ids[cut:], skip_special_tokens=True)
            assert before + after == text
            assert make_response(sentencepiece, ids[:cut], ids[cut:], {}).text == after
        assert decode_after(sentencepiece, ids[:2], ids[2:4], skip_special_tokens=True) == " seen this"

    def test_without_a_prompt_and_without_new_tokens(self, sentencepiece):
        ids = sentencepiece("I have seen").input_ids
        assert decode_after(sentencepiece, [], ids, skip_special_tokens=True) == "I have seen"
        assert decode_after(sentencepiece, ids, [], skip_special_tokens=True) == ""

    def test_special_tokens_are_left_out_only_when_asked_for(self):
        assert decode_after(Letters(), [50], [EOS, 60], skip_special_tokens=False) == "<eos>" + Letters().decode([60])
        assert decode_after(Letters(), [50, EOS], [EOS, 60], skip_special_tokens=True) == Letters().decode([60])

    @settings(max_examples=80, deadline=None)
    @given(text=st.text(st.sampled_from(" ,.'aeiTHé👣\n0"), min_size=1, max_size=20), cut=st.integers(0, 40))
    def test_prompt_and_response_make_the_whole_text(self, text, cut):
        """With the byte-level tokenizer of the example, wherever the prompt ends with a whole letter."""
        ids = BYTE_LEVEL(text, add_special_tokens=False).input_ids
        cut = min(cut, len(ids))
        before = BYTE_LEVEL.decode(ids[:cut], clean_up_tokenization_spaces=False)
        if text.startswith(before):
            assert before + decode_after(BYTE_LEVEL, ids[:cut], ids[cut:], skip_special_tokens=True) == text

    def test_a_prompt_that_ends_inside_a_letter(self):
        """Then the new tokens are read alone, and what they complete is no letter of theirs."""
        prompt, rest = list("é👣".encode())[:-1], ["👣".encode()[-1], *b" ok"]
        assert len(prompt) > CONTEXT_TOKENS
        assert decode_after(Bytes(), prompt, rest, skip_special_tokens=True) == "\ufffd ok"
