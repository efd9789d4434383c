"""SFT trains on what TRL trains on, token for token and label for label, whatever other columns the data has."""

import itertools
import logging

import numpy as np
import pytest
import trl
from datasets import Dataset

import trl_dynamics
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import PROBES
from trl_dynamics.trainers.sft_columns import own_columns

TEXTS = [f"This is text number {i}." for i in range(4)]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def chats(text: str) -> list[list[dict]]:
    return [[assistant(f"{text} {i}")] for i in range(4)]


# Columns that TRL trains on, by name of the layout: plain, then conversational.
OWN = {
    "text": {"text": TEXTS},
    "completion": {"prompt": [f"Prompt {i}?" for i in range(4)], "completion": [f" Completed {i}." for i in range(4)]},
    "tokens": {"input_ids": [[5, 6, 7 + i] for i in range(4)]},
    "messages": {"messages": [[user(f"Hi {i}"), assistant(f"Hello {i}")] for i in range(4)]},
    "conversations": {
        "conversations": [
            [{"from": "user", "value": f"Hi {i}"}, {"from": "assistant", "value": "Yo"}] for i in range(4)
        ]
    },
    "chat completion": {"prompt": [[user(f"Hi {i}")] for i in range(4)], "completion": chats("Done")},
}
# Columns that are left over in such data.
LEFT_OVER = {
    "none": {},
    "pairs": {"chosen": [f" Chosen {i}." for i in range(4)], "rejected": [f" Rejected {i}." for i in range(4)]},
    "whole pairs": {"chosen": [f"Q {i} A yes" for i in range(4)], "rejected": [f"Q {i} A no" for i in range(4)]},
    "numbers": {"chosen": [0.5, 1.0, 2.0, 3.0], "rejected": [0, 1, 2, 3]},
    "nothing": {"chosen": [None] * 4, "rejected": [None] * 4},
    "others": {"source": ["web"] * 4, "score": [1.0] * 4},
}
CHAT_LEFT_OVER = {
    "chat pairs": {"chosen": chats("Chosen"), "rejected": chats("Rejected")},
    "whole chat pairs": {
        "chosen": [[user(f"Hi {i}"), assistant("Yes")] for i in range(4)],
        "rejected": [[user(f"Hi {i}"), assistant("No")] for i in range(4)],
    },
}
CHAT_OWN = ("messages", "conversations", "chat completion")


def same_kind(own: str, left_over: str) -> bool:
    """Whether TRL can tell chats from text: it takes any one column for all of them, in an order that varies."""
    neutral = own == "tokens" or left_over in ("none", "others")
    return neutral or (own in CHAT_OWN) == (left_over in CHAT_LEFT_OVER)


ALL_LEFT_OVER = LEFT_OVER | CHAT_LEFT_OVER
CASES = [
    (own, left_over)
    for own, left_over in itertools.product(OWN, ALL_LEFT_OVER)
    if not (own == "text" and left_over in CHAT_LEFT_OVER)  # see the test of what TRL cannot train on
]


def trained_on(package, rows, tmp_path, *, eval_rows=None, **options):
    """(token ids, labels) of every batch row that the trainer trains on and evaluates, and the trainer."""
    args = package.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=2, **options
    )
    trainer = package.SFTTrainer(
        tiny_model(), args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tiny_tokenizer()
    )
    found = [sorted(batches_of(trainer.train_dataset))]
    evaluated = trainer.eval_dataset
    for data in evaluated.values() if isinstance(evaluated, dict) else [evaluated] if evaluated is not None else []:
        found.append(sorted(batches_of(data)))
    return found, trainer


def warnings_of_ours(caplog) -> list[str]:
    ours = [entry for entry in caplog.records if entry.name.startswith("trl_dynamics")]
    return [entry.getMessage() for entry in ours if entry.levelno >= logging.WARNING]


def batches_of(dataset) -> list[tuple]:
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in dataset]


@pytest.mark.parametrize(("own", "left_over"), CASES)
def test_left_over_columns_change_nothing(own, left_over, tmp_path, caplog):
    rows = Dataset.from_dict(OWN[own] | ALL_LEFT_OVER[left_over])
    theirs_of = rows if same_kind(own, left_over) else Dataset.from_dict(OWN[own])
    theirs, _ = trained_on(trl, theirs_of, tmp_path)
    ours, _ = trained_on(trl_dynamics, rows, tmp_path)
    assert ours == theirs and len(ours[0]) == 4
    assert not warnings_of_ours(caplog)


@pytest.mark.parametrize(
    ("own", "options"),
    [
        ("text", {"packing": True, "max_length": 16}),
        ("text", {"max_length": 4}),
        ("completion", {"completion_only_loss": False}),
        ("completion", {"packing": True, "max_length": 16, "eval_packing": False}),
        ("chat completion", {"assistant_only_loss": True, "completion_only_loss": True}),
        ("messages", {"assistant_only_loss": True}),
        ("messages", {"shuffle_dataset": True, "packing": True, "packing_strategy": "wrapped", "max_length": 8}),
        ("text", {"dataset_text_field": "chosen"}),
    ],
    ids=str,
)
def test_options_of_preparation(own, options, tmp_path):
    left_over = CHAT_LEFT_OVER["chat pairs"] if own in CHAT_OWN else LEFT_OVER["whole pairs"]
    rows = Dataset.from_dict(OWN[own] | left_over)
    theirs, ours = (trained_on(package, rows, tmp_path, eval_rows=rows, **options) for package in (trl, trl_dynamics))
    assert ours[0] == theirs[0]
    assert ours[1].completion_only_loss == theirs[1].completion_only_loss


@pytest.mark.parametrize("own", OWN)
def test_streams_and_several_evaluation_sets(own, tmp_path):
    left_over = CHAT_LEFT_OVER["chat pairs"] if own in CHAT_OWN else LEFT_OVER["pairs"]
    rows = Dataset.from_dict(OWN[own] | left_over)
    evaluated = {"a": rows, "b": rows.select(range(2))}
    found = []
    for package in (trl, trl_dynamics):
        # Streams of rows know no columns after they were mapped.
        stream = rows.to_iterable_dataset().map(lambda row: row)
        found.append(trained_on(package, stream, tmp_path, eval_rows=evaluated)[0])
    assert found[0] == found[1] and [len(part) for part in found[1]] == [4, 4, 2]


CHOSEN_ONLY = {
    "prompt and chosen": {"prompt": OWN["completion"]["prompt"], "chosen": LEFT_OVER["pairs"]["chosen"]},
    "pairs": {"prompt": OWN["completion"]["prompt"]} | LEFT_OVER["pairs"],
    "whole pairs": LEFT_OVER["whole pairs"],
    "chat pairs": {"prompt": OWN["chat completion"]["prompt"]} | CHAT_LEFT_OVER["chat pairs"],
    "text and chat pairs": OWN["text"] | CHAT_LEFT_OVER["whole chat pairs"],
    "messages beside a prompt": {"prompt": TEXTS} | OWN["messages"] | CHAT_LEFT_OVER["whole chat pairs"],
    "no completions": OWN["completion"] | {"completion": [None] * 4} | LEFT_OVER["pairs"],
    "no texts": {"text": [None] * 4} | LEFT_OVER["whole pairs"],
}


@pytest.mark.parametrize("layout", CHOSEN_ONLY)
def test_where_trl_cannot_train_the_chosen_answers_are_trained_on_with_one_warning(layout, tmp_path, caplog):
    rows = Dataset.from_dict(CHOSEN_ONLY[layout])
    with pytest.raises((KeyError, TypeError, AttributeError)):
        trained_on(trl, rows, tmp_path)
    default, trainer = trained_on(trl_dynamics, rows, tmp_path, eval_rows=rows)
    said = warnings_of_ours(caplog)
    assert len(said) == 1 and "--sft_on chosen" in said[0]
    given, _ = trained_on(trl_dynamics, rows, tmp_path, eval_rows=rows, sft_on="chosen")
    assert default == given and len(given[0]) == 4 and trainer.completion_only_loss
    assert warnings_of_ours(caplog) == said


@pytest.mark.parametrize("own", ["text", "completion", "messages"])
def test_a_given_value_wins(own, tmp_path):
    left_over = CHAT_LEFT_OVER["whole chat pairs"] if own == "messages" else LEFT_OVER["whole pairs"]
    rows = Dataset.from_dict(OWN[own] | left_over)
    pairs = Dataset.from_dict({name: column for name, column in (OWN[own] | left_over).items() if name != own})
    pairs = pairs.select_columns([name for name in ("prompt", "chosen", "rejected") if name in pairs.column_names])
    for sft_on, count in (("chosen", 4), ("both", 8)):
        found, _ = trained_on(trl_dynamics, rows, tmp_path, sft_on=sft_on)
        assert found == trained_on(trl_dynamics, pairs, tmp_path, sft_on=sft_on)[0] and len(found[0]) == count


def test_chosen_that_is_no_text_is_refused(tmp_path):
    rows = Dataset.from_dict({"prompt": TEXTS, "chosen": [1.0] * 4, "rejected": [0.0] * 4})
    with pytest.raises(ValueError, match="nothing to train on: 'chosen' is 1.0"):
        trained_on(trl_dynamics, rows, tmp_path)
    with pytest.raises(ValueError, match="needs chosen and rejected"):
        trained_on(trl_dynamics, Dataset.from_dict(CHOSEN_ONLY["prompt and chosen"]), tmp_path, sft_on="both")


def test_what_trl_refuses_is_refused_in_the_same_words(tmp_path):
    rows = Dataset.from_dict({"prompt": TEXTS} | LEFT_OVER["pairs"])
    for data in (rows.with_transform(lambda batch: batch), rows.to_list(), {"train": rows}):
        errors = []
        for package in (trl, trl_dynamics):
            with pytest.raises((TypeError, ValueError)) as refused:
                trained_on(package, data, tmp_path)
            errors.append(str(refused.value))
        assert errors[0] == errors[1]


def test_a_formatting_function_given_by_position_gets_the_rows(tmp_path):
    args = trl_dynamics.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_dict({"prompt": TEXTS} | LEFT_OVER["pairs"]).remove_columns("prompt")
    more = (None, tiny_tokenizer(), None, None, None, (None, None), None, None, None, None)
    trainer = trl_dynamics.SFTTrainer(tiny_model(), args, None, rows, *more, lambda row: row["rejected"])
    assert "Rejected" in trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_dpo_and_grpo_prepare_the_same_tokens_with_probes(method, tmp_path):
    rows = {"prompt": TEXTS} | LEFT_OVER["pairs"] | {"completion": ["x"] * 4, "source": ["web"] * 4}
    found = []
    for package in (trl, trl_dynamics):
        config, trainer = (getattr(package, f"{method.upper()}{kind}") for kind in ("Config", "Trainer"))
        options = {"num_generations": 2, "per_device_train_batch_size": 2} if method == "grpo" else {}
        args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
        extra = {"probe_set": PROBES} if package is trl_dynamics else {}
        if method == "dpo":
            extra["ref_model"] = tiny_model()
        if method == "grpo":
            extra["reward_funcs"] = lambda completions, **columns: [0.0] * len(completions)
        made = trainer(
            tiny_model(), args=args, train_dataset=Dataset.from_dict(rows), processing_class=tiny_tokenizer(), **extra
        )
        batch = next(iter(made.get_train_dataloader()))
        found.append(made.train_dataset.to_list() if method == "dpo" else [repr(batch)])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, ("text",)),
        ({"text": "a", "prompt": "b"}, ()),
        ({"text": None}, ()),
        ({"text": "a", "messages": None}, ("text",)),
        ({"prompt": "a", "completion": "b", "input_ids": [1]}, ("input_ids",)),
        ({"prompt": "a", "completion": [assistant("b")]}, ()),
        ({"messages": [user("a")], "prompt": "b", "image": 0}, ("messages",)),
        ({"text": "a", "chosen": [user("a")], "image": 0}, ("text",)),
        ({"chosen": "a", "rejected": "b", "prompt": "c", "image": 0}, ()),
        ({"conversations": [user("a")]}, ()),
        ({"chosen": "a", "rejected": "b"}, ()),
        ({"chosen": np.float64(1), "text": "a"}, ("text",)),
    ],
)
def test_own_columns(row, expected):
    assert own_columns(row) == expected
