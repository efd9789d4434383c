"""Training rows: preference pairs as completions, blank answers, prompts cut to a number of tokens."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from tiny import tiny_tokenizer
from trl_dynamics.trainers.data import (
    SFT_ON,
    check_answers,
    column_names,
    limit_prompts,
    other_rows,
    preference_to_completion,
)
from trl_dynamics.trainers.sides import SIDE_COLUMN

PAIRS = [{"prompt": f"{i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(5)]
IMPLICIT = [{"chosen": f"Q: {i}? A: yes", "rejected": f"Q: {i}? A: no"} for i in range(5)]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CHATS = [
    {"prompt": [user(f"{i}?")], "chosen": [assistant(f"yes {i}")], "rejected": [assistant(f"no {i}")]}
    for i in range(5)
]
IMPLICIT_CHATS = [
    {"chosen": [*row["prompt"], *row["chosen"]], "rejected": [*row["prompt"], *row["rejected"]]} for row in CHATS
]
SPLIT_IMPLICIT = [{"prompt": f"Q: {i}? A:", "chosen": " yes", "rejected": " no"} for i in range(5)]
LAYOUTS = {
    "explicit": (PAIRS, PAIRS),
    "implicit": (IMPLICIT, SPLIT_IMPLICIT),
    "chat": (CHATS, CHATS),
    "prompt beside implicit chat": ([row | {"prompt": "?"} for row in IMPLICIT_CHATS], CHATS),
    "implicit chat": (IMPLICIT_CHATS, CHATS),
    "other columns": ([row | {"score": 1.0, "completion": "old"} for row in PAIRS], PAIRS),
}


def as_dataset(rows: list[dict], streaming: bool) -> Dataset | IterableDataset:
    dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if streaming else dataset


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_preference_to_completion(layout, streaming):
    rows, pairs = LAYOUTS[layout]
    chosen = preference_to_completion(as_dataset(rows, streaming), "chosen")
    both = preference_to_completion(as_dataset(rows, streaming), "both")
    assert isinstance(chosen, IterableDataset) == isinstance(both, IterableDataset) == streaming
    assert list(chosen) == [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    assert list(both) == [
        {"prompt": row["prompt"], "completion": row[side], SIDE_COLUMN: mark}
        for row in pairs
        for mark, side in ((1, "chosen"), (2, "rejected"))
    ]


def test_pairs_stay_together_over_batches():
    rows = [{"prompt": str(i), "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(2100)]
    both = preference_to_completion(Dataset.from_list(rows), "both")
    assert both["completion"][:] == [f"{side}{i}" for i in range(2100) for side in "cr"]


PREPARED = """
from datasets import Dataset
from trl_dynamics.trainers.data import preference_to_completion
rows = Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r", "source": "s", "score": 1, "id": 2}])
print(preference_to_completion(rows, "both")._fingerprint)
"""


def test_another_process_finds_the_prepared_rows_again():
    """Names in sets come in another order in each."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARED], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate(timeout=300)[0] for run in runs)
    assert first == second and first.strip()


def test_chosen_answers_without_rejected_ones():
    rows = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in PAIRS]
    expected = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    assert preference_to_completion(Dataset.from_list(rows), "chosen").to_list() == expected
    chats = [{"prompt": f"{i}?", "chosen": row["chosen"]} for i, row in enumerate(IMPLICIT_CHATS)]
    expected = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in CHATS]
    assert preference_to_completion(Dataset.from_list(chats), "chosen").to_list() == expected
    with pytest.raises(ValueError, match="needs chosen and rejected"):
        preference_to_completion(Dataset.from_list(rows), "both")


def test_a_prompt_column_without_prompts_is_no_prompt():
    rows = [row | {"prompt": None} for row in IMPLICIT]
    assert preference_to_completion(Dataset.from_list(rows), "chosen")["completion"][:] == [" yes"] * 5


def test_a_plain_prompt_of_answers_that_are_messages_is_refused():
    rows = [{"prompt": "?", "chosen": row["chosen"], "rejected": row["rejected"]} for row in CHATS]
    with pytest.raises(ValueError, match="make both text, or both lists of messages"):
        preference_to_completion(Dataset.from_list(rows), "chosen")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_controls_have_as_many_rows_as_both(layout):
    rows, pairs = LAYOUTS[layout]
    twice = preference_to_completion(as_dataset(rows, False), "chosen_twice")
    assert list(twice) == [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs for _ in range(2)]
    if layout == "implicit":
        return  # Its chosen answers are all the same.
    other = preference_to_completion(as_dataset(rows, False), "chosen_and_other").to_list()
    assert [row[SIDE_COLUMN] for row in other] == [1, 2] * 5
    assert [row["prompt"] for row in other] == [row["prompt"] for row in pairs for _ in range(2)]
    assert [row["completion"] for row in other[::2]] == [row["chosen"] for row in pairs]
    swapped = [row["completion"] for row in other[1::2]]
    assert all(answer != row["chosen"] for answer, row in zip(swapped, pairs, strict=True))
    assert sorted(map(str, swapped)) == sorted(str(row["chosen"]) for row in pairs)


def test_other_answers_need_the_whole_data():
    with pytest.raises(ValueError, match="'chosen_and_other'.*the data is a stream"):
        preference_to_completion(as_dataset(PAIRS, True), "chosen_and_other")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_rows", [2, 3, 8, 101])
def test_other_rows_are_a_permutation_that_gives_every_row_something_else(num_rows, seed):
    draw = random.Random(seed)
    prompts = [index // 2 if index < num_rows // 2 else -index for index in range(num_rows)]
    draw.shuffle(prompts)
    answers = [draw.randrange(num_rows) if num_rows > 8 else index for index in range(num_rows)]
    others = other_rows(prompts, answers)
    assert sorted(others) == list(range(num_rows)) and others == other_rows(prompts, answers)
    for row, other in enumerate(others):
        assert prompts[row] != prompts[other] and answers[row] != answers[other]


def partitions(num_rows: int) -> list[tuple[int, ...]]:
    """Every way in which rows can have the same value or others, numbered in order of appearance."""
    found = [()]
    for _ in range(num_rows):
        found = [(*row, value) for row in found for value in range(max(row, default=-1) + 2)]
    return found


@pytest.mark.parametrize("num_rows", range(6))
def test_other_rows_are_found_wherever_there_are_any(num_rows):
    for prompts, answers in itertools.product(partitions(num_rows), repeat=2):

        def fits(others, prompts=prompts, answers=answers):
            return all(prompts[i] != prompts[j] and answers[i] != answers[j] for i, j in enumerate(others))

        if any(map(fits, itertools.permutations(range(num_rows)))):
            others = other_rows(list(prompts), list(answers))
            assert sorted(others) == list(range(num_rows)) and fits(others)
        else:
            with pytest.raises(ValueError, match="of which no prompt and no chosen answer makes up more than half"):
                other_rows(list(prompts), list(answers))


def test_what_owns_too_many_rows_is_named():
    with pytest.raises(ValueError, match="the prompt of row 1 is that of 2 of 3 rows"):
        other_rows(["b", "a", "a"], [1, 2, 3])
    with pytest.raises(ValueError, match="the chosen answer of row 0 is that of 3 of 5 rows"):
        other_rows([[user(f"{i}?")] for i in range(5)], [[assistant(text)] for text in "xyxyx"])


@pytest.mark.parametrize("sft_on", SFT_ON)
def test_columns_that_the_chat_template_sees_are_kept(sft_on):
    extra = [{"tools": f"[{i}]", "chat_template_kwargs": {"enable_thinking": i % 2 == 0}} for i in range(5)]
    data = Dataset.from_list([row | more | {"score": 1.0} for row, more in zip(CHATS, extra, strict=True)])
    rows = preference_to_completion(data, sft_on).to_list()
    assert [{name: row[name] for name in extra[0]} for row in rows] == [more for more in extra for _ in SFT_ON[sft_on]]
    assert "score" not in rows[0]


def test_pairs_with_images_are_refused():
    with pytest.raises(ValueError, match="these pairs have images"):
        preference_to_completion(Dataset.from_list([row | {"image": "x"} for row in PAIRS]), "both")


@pytest.mark.parametrize("known", [True, False], ids=["known columns", "unknown columns"])
def test_looking_at_a_stream_leaves_all_of_it(known):
    """Rows are read when they are needed; without known columns the first one is, and the stream starts anew."""
    read = []

    def generate():
        for row in PAIRS:
            read.append(row)
            yield row

    features = Dataset.from_list(PAIRS).features if known else None
    stream = IterableDataset.from_generator(generate, features=features)
    assert set(column_names(stream)) == set(PAIRS[0]) and read == ([] if known else PAIRS[:1])
    assert [row["completion"] for row in preference_to_completion(stream, "chosen")] == [r["chosen"] for r in PAIRS]


BLANKS = {
    "chosen": (PAIRS, "chosen", " \n"),
    "rejected": (PAIRS, "rejected", ""),
    "null": (PAIRS, "rejected", None),
    "chat": (CHATS, "chosen", [assistant(" ")]),
    "chat null": (CHATS, "rejected", [{"role": "assistant", "content": None}]),
    "chat without messages": (CHATS, "rejected", []),
    "completion": ([{"prompt": "?", "completion": "x"}] * 5, "completion", " "),
}


def test_answers_that_are_no_text_are_named():
    rows = Dataset.from_list([{"prompt": "?", "chosen": 0.5, "rejected": 0.1}])
    for drop in (False, True):
        with pytest.raises(ValueError, match="row 0 has 0.5 under 'chosen'; expected text or messages"):
            check_answers(rows, drop_invalid_rows=drop)


def test_a_tool_call_is_no_blank_answer():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}]}
    rows = Dataset.from_list([CHATS[0] | {"chosen": [call], "rejected": [call | {"content": ""}]}])
    assert len(check_answers(rows, drop_invalid_rows=False)) == 1


@pytest.mark.parametrize("case", BLANKS)
def test_blank_answers_are_refused_or_dropped(case):
    rows, name, blank = BLANKS[case]
    dataset = Dataset.from_list([row | ({name: blank} if i in (2, 4) else {}) for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match=f"row 2 has a blank '{name}' \\(2 such rows of 5\\).*--drop_invalid_rows"):
        check_answers(dataset, drop_invalid_rows=False)
    assert check_answers(dataset, drop_invalid_rows=True).to_list() == [rows[0], rows[1], rows[3]]


def test_a_row_with_two_blanks_is_counted_once():
    dataset = Dataset.from_list([PAIRS[0], {"prompt": "?", "chosen": "", "rejected": " "}])
    with pytest.raises(ValueError, match="1 such rows of 2"):
        check_answers(dataset, drop_invalid_rows=False)
    assert check_answers(dataset, drop_invalid_rows=True).to_list() == PAIRS[:1]


def test_answers_that_come_in_parts_are_read():
    def row(*parts):
        return {"completion": [{"role": "assistant", "content": list(parts)}]}

    full, blank = row({"type": "text", "text": "yes"}), row({"type": "text", "text": " "})
    with pytest.raises(ValueError, match="row 1 has a blank 'completion'"):
        check_answers(Dataset.from_list([full, blank]), drop_invalid_rows=False)
    assert len(check_answers(Dataset.from_list([full]), drop_invalid_rows=False)) == 1


@pytest.mark.parametrize("rows", [PAIRS, CHATS, [{"prompt": "?", "completion": "x"}], [{"text": ""}]])
def test_good_rows_are_left_as_they_are(rows):
    dataset = Dataset.from_list(rows)
    assert check_answers(dataset, drop_invalid_rows=False) is dataset


def prompts_of(data_dir) -> list[str]:
    path = data_dir / "probing_helpful_base" / "formal_prob_train.jsonl"
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for _, line in zip(range(100), lines, strict=False)]


@pytest.fixture(scope="module")
def stories(data_dir):
    return AutoTokenizer.from_pretrained(data_dir / "stories260k")


@pytest.mark.parametrize("limit", [5, 17, 64, 200])
def test_prompts_have_at_most_the_tokens_asked_for(limit, data_dir, stories):
    """Counted after tokenising the cut row as TRL does, BOS and the tokens that the cut itself may add included."""
    prompts = prompts_of(data_dir)
    dataset = limit_prompts(Dataset.from_list([{"prompt": p, "completion": " x"} for p in prompts]), stories, limit)
    longer = 0
    for prompt, row in zip(prompts, dataset, strict=True):
        before, after = (len(stories(text=text)["input_ids"]) for text in (prompt, row["prompt"]))
        assert prompt.endswith(row["prompt"]) and row["completion"] == " x"
        if before <= limit:
            assert row["prompt"] == prompt
        else:
            longer += 1
            # Tokens may merge anew at the cut, so that the limit is not always reached.
            assert limit - 2 <= after <= limit, f"{after} tokens from {row['prompt'][:40]!r}"
    assert longer > 20


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_prompts_without_bos_keep_exactly_the_last_tokens(limit):
    tokenizer = tiny_tokenizer()
    dataset = limit_prompts(Dataset.from_list([{"prompt": "abcdefgh"}, {"prompt": "abc"}]), tokenizer, limit)
    assert dataset["prompt"][:] == ["abcdefgh"[-limit:], "abc"[-limit:]]


@pytest.mark.parametrize("limit", range(1, 9))
def test_a_cut_inside_a_character_keeps_the_limit(limit):
    """A character of four tokens cannot be halved: it goes or it stays, the limit holds."""
    tokenizer = tiny_tokenizer()
    (cut,) = limit_prompts(Dataset.from_list([{"prompt": "ab🙂cd"}]), tokenizer, limit)["prompt"]
    assert "ab🙂cd".endswith(cut) and 0 < len(tokenizer(text=cut)["input_ids"]) <= limit


def test_a_limit_that_leaves_room_for_bos_only_is_refused(stories):
    with pytest.raises(ValueError, match="max_prompt_length"):
        limit_prompts(Dataset.from_list([{"prompt": "Once upon a time"}]), stories, 1)


@pytest.mark.parametrize("rows", [CHATS, IMPLICIT, [{"text": "x"}]], ids=["chat", "implicit", "text"])
def test_prompts_that_cannot_be_cut_are_refused(rows):
    with pytest.raises(ValueError, match="max_prompt_length cuts plain text prompts only"):
        limit_prompts(Dataset.from_list(rows), tiny_tokenizer(), 4)
