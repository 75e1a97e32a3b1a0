"""What evaluations ask: prompts built from data, and how prompts are cut and put into templates."""

import json
import re

import pytest

from kivi_jax.eval import gsm8k, longbench, needle, ruler
from kivi_jax.eval.generating import cut, encode
from kivi_jax.eval.jobs import in_batches
from kivi_jax.eval.samples import Sample, files_by_task, find_file, read_rows


class Words:
    """A tokenizer of one token per word, and a begin token, 0."""

    def __init__(self, chat_template=None):
        self.words = ["<s>"]
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return {"input_ids": [0] * add_special_tokens + [self.words.index(word) for word in text.split()]}

    def decode(self, ids, *, skip_special_tokens):
        return " ".join(self.words[i] for i in ids if i or not skip_special_tokens) + " "

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return f"<s> user {messages[0]['content']} model"


def sample(prompt="one two three", **changes):
    return Sample(id="0", task="t", prompt=prompt, answers=["x"], max_new_tokens=3, **changes)


def test_a_needle_stands_at_its_depth_and_the_prompt_fits():
    samples = needle.build_samples(
        Words(), lengths=[60, 200], depths=3, repeats=2, haystack=None, max_new_tokens=4
    )
    assert len(samples) == 12
    assert len({item.id for item in samples}) == 12
    for item in samples:
        length, depth = item.info["length"], item.info["depth"]
        assert length - 10 < len(Words()(item.prompt)["input_ids"]) <= length
        assert item.prompt.count(item.answers[0]) == 2  # named and repeated, in the needle only
        place = item.prompt.index(item.answers[0]) / len(item.prompt)
        assert abs(place - depth) < 0.45
        assert (depth == 0) == item.prompt.startswith("The pass key is")


def test_a_haystack_of_ones_own_is_used_and_too_little_of_it_refused():
    text = " ".join(f"Sentence number {i} is here." for i in range(100))
    numbers = dict(depths=1, repeats=1, haystack=text, max_new_tokens=4)
    (item,) = needle.build_samples(Words(), lengths=[90], **numbers)
    assert len(re.findall(r"Sentence number \d+ is here\.", item.prompt)) == 13
    for length, match in ((2000, "shorter than"), (20, "no text fits")):
        with pytest.raises(ValueError, match=match):
            needle.build_samples(Words(), lengths=[length], **numbers)


def test_recorded_pass_keys_are_read(shared):
    rows = read_rows(shared / "data" / "passkey" / "passkey_examples.jsonl")
    samples = needle.read_samples(Words(), rows, max_new_tokens=5)
    assert len(samples) == 5
    assert all(
        item.prompt.endswith("The pass key is ") and item.answers[0] in item.prompt for item in samples
    )


def test_ruler_rows_become_samples(shared):
    rows = read_rows(shared / "data" / "ruler" / "niah_multikey_3.jsonl")
    samples = ruler.build_samples("niah_multikey_3", rows, max_new_tokens=128)
    assert len({item.id for item in samples}) == 500
    assert ruler.score({"prediction": samples[0].prompt, "answers": samples[0].answers}) == 1


def test_gsm8k_shows_examples_and_asks(shared):
    rows = read_rows(shared / "data" / "gsm8k" / "test.jsonl")
    item = gsm8k.build_samples(rows[5:7], examples=rows[:2], max_new_tokens=3)[1]
    assert item.prompt.startswith(f"Question: {rows[0]['question']}\nAnswer: {rows[0]['answer']}\nQuestion: ")
    assert item.prompt.endswith(f"Question: {rows[6]['question']}\nAnswer:")
    assert gsm8k.strict({"prediction": rows[6]["answer"], "answers": item.answers}) == 1


def test_longbench_reads_its_own_prompts(shared):
    samples = longbench.read_samples(shared / "data" / "longbench", None, limit=3)
    assert [item.task for item in samples] == ["multi_news"] * 3 + ["passage_retrieval_zh"] * 3
    assert [item.max_new_tokens for item in samples] == [512] * 3 + [32] * 3
    for item in samples:
        best = {"task": item.task, "prediction": item.answers[0], "answers": item.answers}
        assert longbench.score(best) == pytest.approx(1, abs=1e-6)


def test_longbench_reads_the_tasks_that_are_wanted(shared):
    folder = shared / "data" / "longbench"
    samples = longbench.read_samples(folder, None, limit=1, tasks=["passage_retrieval_zh"])
    assert [item.task for item in samples] == ["passage_retrieval_zh"]
    for task, match in (
        ("hotpot", "unknown task hotpot"),
        ("lcc", "no file of the task lcc, but multi_news"),
    ):
        with pytest.raises(ValueError, match=match):
            longbench.read_samples(folder, None, limit=1, tasks=[task])


def test_longbench_of_the_hub_are_the_15_tasks_of_kivi(shared, monkeypatch):
    asked = []

    def recorded(source, *fields):
        asked.append(source)
        assert fields[:3] == ("context", "input", "answers")
        return [dict.fromkeys(fields, "x")]

    monkeypatch.setattr(longbench, "read_rows", recorded)
    prompts = shared / "data" / "longbench"
    samples = longbench.read_samples("some/LongBench", prompts, limit=1)
    assert len(asked) == len(samples) == 15
    assert asked[0] == "some/LongBench:narrativeqa"
    assert max(item.max_new_tokens for item in samples) == longbench.LONGEST_ANSWER


def test_longbench_without_prompts_or_tasks_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"dataset2prompt\.json cannot be read"):
        longbench.read_samples(tmp_path, None, limit=None)
    with pytest.raises(ValueError, match="no file in"):
        files_by_task(tmp_path, longbench.METRICS)
    with pytest.raises(ValueError, match="there is no gsm8k_30"):
        find_file(tmp_path, "gsm8k_30.jsonl")


def test_rows_are_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n\n")
    assert read_rows(path) == [{"a": 1}]
    path.write_text('{"a": "one\x85two\u2028three"}\n', "utf-8")
    assert read_rows(path) == [{"a": "one\x85two\u2028three"}]
    path.write_text('{"a": 1}\n', "utf-8-sig")  # as some editors begin a file
    assert read_rows(path) == [{"a": 1}]
    path.write_text("no json")
    with pytest.raises(ValueError, match="not a file of JSON lines"):
        read_rows(path)
    path.write_text('{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n')
    with pytest.raises(ValueError, match="row 2 has its field c more than once: keep one"):
        read_rows(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="not an object"):
        read_rows(path)
    path.write_text('{"a": 1}\n{"b": 1, "c": 2}\n')
    with pytest.raises(ValueError, match="row 2 has no field a, but b, c"):
        read_rows(path, "a")
    path.write_text('{"input": 3}\n')
    with pytest.raises(ValueError, match="row 1 has no text in its field input, but 3"):
        read_rows(path, "input")
    for odd in ([], None, [None], [["a"]], {"a": 1}, [True]):
        path.write_text(json.dumps({"outputs": odd}) + "\n")
        with pytest.raises(ValueError, match="row 1 has no list of texts in its field outputs, but"):
            read_rows(path, "outputs")
    with pytest.raises(ValueError, match="not a file of JSON lines"):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match="not a file of JSON lines"):
        read_rows("nowhere.jsonl")


def test_long_prompts_lose_their_middle_if_they_may():
    prompt = " ".join(f"word{i}" for i in range(50))
    tokenizer = Words()
    ids = encode(tokenizer, sample(prompt, truncate=True), max_length=10, chat=False)
    kept = "word0 word1 word2 word3 word45 word46 word47 word48 word49"
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == kept
    assert len(encode(tokenizer, sample(prompt), max_length=10, chat=False)) == 51


def test_a_chat_template_is_used_where_it_may_be():
    tokenizer = Words(chat_template="any")
    text = tokenizer.decode(
        encode(tokenizer, sample(), max_length=None, chat=True), skip_special_tokens=False
    )
    assert text.split() == ["<s>", "user", "one", "two", "three", "model"]
    assert len(encode(tokenizer, sample(chat=False), max_length=None, chat=True)) == 4
    with pytest.raises(ValueError, match="no chat template"):
        encode(Words(), sample(), max_length=None, chat=True)


def test_an_answers_beginning_follows_the_template():
    """The message is what stands before it; without a chat the prompt is one text."""
    tokenizer = Words(chat_template="any")
    asked = sample("one two three", answer_prefix=" three")
    text = tokenizer.decode(encode(tokenizer, asked, max_length=None, chat=True), skip_special_tokens=False)
    assert text.split() == ["<s>", "user", "one", "two", "model", "three"]
    plain = tokenizer.decode(encode(tokenizer, asked, max_length=None, chat=False), skip_special_tokens=False)
    assert plain.split() == ["<s>", "one", "two", "three"]


def test_predictions_end_at_the_first_stop_string():
    assert cut("a\nQ: b", ("\nQ:", "b")) == "a"
    assert cut("a b", ()) == "a b"


def test_batches_share_a_width_and_come_widest_first():
    batches = in_batches((5, 40, 6, 7, 33), 2, key=lambda size: (-(-size // 32),))
    assert batches == [[40, 33], [5, 6], [7]]


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RULER = [dict(index=i, input=f"question {i}", outputs=["x"], length=64) for i in range(2)]


def read_ruler(data):
    return [(item.id, item.task) for item in ruler.read_samples(data, limit=None, max_new_tokens=4)]


def test_rulers_own_folders_are_tasks_and_lengths(tmp_path):
    for length in ("4096", "8192"):
        write_rows(tmp_path / length / "data" / "niah_single_1" / "validation.jsonl", *RULER)
    write_rows(tmp_path / "4096" / "data" / "niah_multikey_1" / "validation.jsonl", *RULER)
    found = read_ruler(tmp_path)
    assert len({name for name, _ in found}) == 6
    assert {task for _, task in found} == {
        "niah_multikey_1",
        "niah_single_1 4096/data",
        "niah_single_1 8192/data",
    }
    single = tmp_path / "4096" / "data" / "niah_single_1"
    expected = [("niah_single_1-0", "niah_single_1"), ("niah_single_1-1", "niah_single_1")]
    assert read_ruler(single) == read_ruler(single / "validation.jsonl") == expected
    write_rows(tmp_path / "flat" / "niah_single_1.jsonl", *RULER)
    assert read_ruler(tmp_path / "flat") == expected
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        ruler.read_samples(write_rows(tmp_path / "empty.jsonl"), limit=None, max_new_tokens=4)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "full.jsonl").write_text('{"settings": {}}\n')  # results of a former run
    with pytest.raises(ValueError, match="there are no samples"):
        ruler.read_samples(tmp_path / "nothing", limit=None, max_new_tokens=4)


def test_the_beginning_of_an_answer_ends_the_prompt():
    rows = [RULER[0] | {"answer_prefix": prefix} for prefix in (" It is", "", None)]
    prompts = [item.prompt for item in ruler.build_samples("t", rows, max_new_tokens=4)]
    assert prompts == ["question 0 It is", "question 0", "question 0"]


@pytest.mark.parametrize(
    ("outputs", "expected"), [("4711", ["4711"]), (4711, ["4711"]), ([1, "a"], ["1", "a"])]
)
def test_answers_may_be_one_text_or_a_number(outputs, expected):
    (item,) = ruler.build_samples("t", [dict(input="q", outputs=outputs)], max_new_tokens=4)
    assert item.answers == expected


def test_answers_that_any_prediction_or_none_has_are_refused():
    with pytest.raises(ValueError, match="t has a row with an empty answer"):
        ruler.build_samples("t", [dict(input="q", outputs=["a", " "])], max_new_tokens=4)
    with pytest.raises(ValueError, match="the answer of row 1 has no number, but 'three'"):
        gsm8k.build_samples([dict(question="q", answer="three")], examples=[], max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("[1]", "it is no JSON object"),
        ("3", "it is no JSON object"),
        ("[" * 200_000, "recursion"),
        ('{"qasper": "{question}"}', "prompt of qasper .* cannot be filled .*question"),
        ('{"qasper": "{} {input}"}', "cannot be filled"),
        ('{"qasper": "{"}', "cannot be filled"),
        ('{"qasper": 3}', "cannot be filled"),
    ],
)
def test_longbench_of_damaged_prompts_is_one_line(tmp_path, prompts, message):
    row = {"context": "c", "input": "i", "answers": ["a"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "dataset2prompt.json").write_text(prompts)
    (tmp_path / "dataset2maxlen.json").write_text('{"qasper": 4}')
    with pytest.raises(ValueError, match=message):
        longbench.read_samples(tmp_path, None, limit=None)


def test_one_file_of_a_task_is_read_and_two_are_refused(tmp_path):
    exact = write_rows(tmp_path / "qasper.jsonl")
    write_rows(tmp_path / "qasper_e.jsonl")
    assert files_by_task(tmp_path, longbench.METRICS) == {"qasper": exact}
    write_rows(tmp_path / "8k" / "qasper.jsonl")
    with pytest.raises(ValueError, match=r"several files are of qasper: .*8k.*, .*name one of them"):
        files_by_task(tmp_path, longbench.METRICS)


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"input": ["moon \ud83d owl", "\ud83d\ude00"], "a\udc00": 1}' + "\n")
    assert read_rows(path) == [{"input": ["moon \ufffd owl", "\U0001f600"], "a\ufffd": 1}]


def test_rows_too_deep_to_read_are_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="not a file of JSON lines"):
        read_rows(path)


def test_a_data_set_that_is_a_script_is_one_line_and_names_a_copy(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found LongBench.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"found LongBench\.py \(Xnhyacinth/LongBench is a copy"):
        read_rows("THUDM/LongBench:qasper", "context")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The balance is -$3", "-3"),
        ("#### -$3", "-3"),
        ("#### $-1,234.50", "-1234.5"),
        ("The answer is .5", "0.5"),
        ("#### .5", "0.5"),
        ("-.5", "-0.5"),
        ("It costs $29.00.", "29"),
        ("The end.5 apples", "5"),
        ("1.2.3", "3"),
    ],
)
def test_numbers_are_read_with_sign_dollar_and_point(text, number):
    assert gsm8k.flexible({"prediction": text, "answers": [f"so\n#### {number}"]}) == 1
