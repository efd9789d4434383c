"""SFT on pairs: what is logged of each side against plain logits, in every way that rows become batches."""

import functools

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset

import trl_dynamics
from tiny import END, tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, make_trainer
from trl_dynamics.trainers.data import SFT_ON, preference_to_completion

ROWS = [row | {"chosen": row["chosen"] + "!" * index} for index, row in enumerate(PAIRS[:7])]
DATA = Dataset.from_list(ROWS)
SIDES = ("chosen", "rejected")
UNPACKED = {"max_length": 128}
PADDING_FREE = {"padding_free": True, "max_length": None}
PACKED = {"packing": True, "max_length": 128}


@functools.cache
def trained_weights() -> dict[str, torch.Tensor]:
    """Weights that get some tokens right."""
    model = tiny_model()
    ids = tiny_tokenizer()([row["prompt"] + row["chosen"] for row in ROWS], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(**ids, labels=ids["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained_model(*args, **overrides):
    model = tiny_model(*args, **overrides)
    model.load_state_dict(trained_weights())
    return model


FROZEN = {"learning_rate": 0.0, "dropout": 0.0, "data": DATA, "sft_on": "both", "make_model": trained_model}


def chats(rows: list[dict]) -> list[dict]:
    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return [
        {"prompt": turn("user", row["prompt"])} | {side: turn("assistant", row[side]) for side in SIDES}
        for row in rows
    ]


def implicit(rows: list[dict]) -> list[dict]:
    return [{side: row["prompt"] + row[side] for side in SIDES} for row in rows]


FORMATS = {
    "plain": ROWS,
    "chat": chats(ROWS),
    "implicit": implicit(ROWS),
    "implicit chat": [{side: row["prompt"] + row[side] for side in SIDES} for row in chats(ROWS)],
}


def reference(side: str, whole_sequences: bool = False, chat: bool = False) -> tuple[float, float, int]:
    """Slow and obvious: sum of -log p in nats, right tokens and all tokens of a side, a row at a time in float64."""
    model, tokenizer = trained_model().double(), tiny_tokenizer()
    nll, right, count = 0.0, 0, 0
    for row in ROWS:
        prompt, answer = row["prompt"], row[side] + END
        if chat:
            prompt = f"<|im_start|>user\n{prompt}{END}<|im_start|>assistant\n"
        prompt_ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        ids = prompt_ids + answer_ids
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1 if whole_sequences else len(prompt_ids), len(ids)):
            nll -= logp[position - 1, ids[position]].item()
            right += int(logp[position - 1].argmax() == ids[position])
            count += 1
    return nll, right, count


def assert_sides(entry: dict, prefix: str = "", **how) -> None:
    for side in SIDES:
        nll, right, count = reference(side, **how)
        assert entry[f"{prefix}nll/{side}"] == pytest.approx(nll / count, rel=1e-5), side
        assert right and entry[f"{prefix}mean_token_accuracy/{side}"] == pytest.approx(right / count, rel=1e-9), side


def last(trainer, key: str) -> dict:
    return [entry for entry in trainer.state.log_history if key in entry][-1]


@pytest.mark.parametrize("whole_sequences", [False, True], ids=["completions", "whole sequences"])
@pytest.mark.parametrize("batches", [UNPACKED, PADDING_FREE, PACKED], ids=["padded", "padding-free", "packed"])
def test_sides_are_those_of_plain_logits(batches, whole_sequences, tmp_path):
    """Over an epoch of several batches, logged once, and over an evaluation; packing changes nothing."""
    options = {"completion_only_loss": not whole_sequences, "logging_strategy": "epoch", "max_steps": -1}
    options |= {"num_train_epochs": 1, "gradient_accumulation_steps": 2, "eval_strategy": "no"}
    trainer = make_trainer("sft", tmp_path, **FROZEN | options | batches)
    trainer.train()
    assert trainer.state.global_step > 1
    assert_sides(last(trainer, "loss"), whole_sequences=whole_sequences)
    trainer.evaluate(DATA)
    assert_sides(last(trainer, "eval_loss"), "eval_", whole_sequences=whole_sequences)


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("layout", FORMATS)
def test_sides_of_every_format_of_pairs(layout, streaming, tmp_path):
    data = Dataset.from_list(FORMATS[layout])
    data = data.to_iterable_dataset() if streaming else data
    trainer = make_trainer("sft", tmp_path, **FROZEN | {"data": data, "max_steps": 7, "logging_steps": 7})
    trainer.train()
    assert_sides(last(trainer, "loss"), chat="chat" in layout)


def test_the_sides_make_up_the_loss(tmp_path):
    """One optimiser step on all rows: the mean of the sides, weighted by their tokens, is the loss of TRL."""
    options = {"max_steps": 1, "gradient_accumulation_steps": 7, "logging_steps": 1}
    trainer = make_trainer("sft", tmp_path, **FROZEN | options)
    trainer.train()
    entry = last(trainer, "loss")
    counts = [reference(side)[2] for side in SIDES]
    assert counts[0] != counts[1]
    mean = sum(count * entry[f"nll/{side}"] for count, side in zip(counts, SIDES, strict=True)) / sum(counts)
    assert entry["loss"] == pytest.approx(mean, abs=1e-6)


def test_each_log_line_counts_its_own_steps(tmp_path):
    trainer = make_trainer("sft", tmp_path, **FROZEN | {"max_steps": 7, "logging_steps": 1})
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    sides = [[line[f"nll/{side}"] for side in SIDES if f"nll/{side}" in line] for line in lines]
    numbers = [len(found) for found in sides]
    assert 1 in numbers[numbers.index(2) :], "no batch of one side after a batch of both: nothing was forgotten"
    for line, found in zip(lines, sides, strict=True):
        assert min(found) - 1e-5 <= line["loss"] <= max(found) + 1e-5


@pytest.mark.parametrize("batches", [UNPACKED, PADDING_FREE, PACKED], ids=["padded", "padding-free", "packed"])
@pytest.mark.parametrize("sft_on", SFT_ON)
def test_training_is_that_of_trl_on_the_same_rows(sft_on, batches, tmp_path):
    rows = preference_to_completion(DATA, sft_on).select_columns(["prompt", "completion"])
    options = {"max_steps": 6, "logging_steps": 1, "gradient_accumulation_steps": 2} | batches
    # One after the other: each starts from the seed.
    ours = make_trainer("sft", tmp_path / "ours", sft_on=sft_on, data=DATA, **options)
    ours.train()
    theirs = make_trainer("sft", tmp_path / "trl", package=trl, data=rows, **options)
    theirs.train()
    for line, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        own = set(line) - set(other)
        assert all(key.startswith(("nll/", "mean_token_accuracy/")) for key in own)
        assert bool(own) == ("loss" in line and sft_on in ("both", "chosen_and_other"))
        timed = {key for key in other if key.endswith(("_runtime", "_per_second"))}
        assert {key: line[key] for key in other if key not in timed} == {
            key: other[key] for key in other if key not in timed
        }
    state = theirs.model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in ours.model.state_dict().items())


@pytest.mark.parametrize("options", [UNPACKED, PACKED, PACKED | {"packing_strategy": "wrapped"}], ids=str)
def test_streams_give_the_rows_of_map_style_data(options, tmp_path):
    options = options | {"sft_on": "both", "max_steps": 2, "logging_steps": 1}
    rows = Dataset.from_list([PAIRS[i % 20] | {"prompt": f"{i}? "} for i in range(50)])
    whole = make_trainer("sft", tmp_path / "whole", data=rows, **options)
    streamed = make_trainer("sft", tmp_path / "stream", data=rows.to_iterable_dataset(num_shards=2), **options)
    assert isinstance(streamed.train_dataset, IterableDataset)
    expected = whole.train_dataset.select_columns(["input_ids", "labels"]).to_list()
    assert [{name: row[name] for name in ("input_ids", "labels")} for row in streamed.train_dataset] == expected
    streamed.train()
    assert "nll/rejected" in last(streamed, "loss")


CUTS = [{"packing": True, "packing_strategy": strategy} for strategy in ("bfd", "bfd_split", "wrapped")]


@pytest.mark.parametrize("options", [*CUTS, {}, {"truncation_mode": "keep_end"}], ids=str)
def test_every_token_keeps_its_side_where_rows_are_cut_packed_and_shuffled(options, tmp_path):
    """The rows are those that TRL makes; the letters of an answer tell which side a token is from."""
    rows = [{"prompt": "q" * n, "chosen": "c" * (7 * n), "rejected": "r" * (5 * n)} for n in range(1, 9)]
    options = {"max_length": 32, "shuffle_dataset": True} | options
    trainer = make_trainer("sft", tmp_path, data=Dataset.from_list(rows), sft_on="both", **options)
    answers = preference_to_completion(Dataset.from_list(rows), "both").select_columns(["prompt", "completion"])
    theirs = make_trainer("sft", tmp_path, package=trl, data=answers, **options)
    assert trainer.train_dataset["input_ids"][:] == theirs.train_dataset["input_ids"][:]
    seen = set()
    for batch, other in zip(eval_batches(trainer), eval_batches(theirs), strict=True):
        side, labels = batch.pop("label_side"), batch["labels"]
        batch.pop("label_row", None)
        assert batch.keys() == other.keys() and torch.equal(labels, other["labels"])
        assert labels[side < 1].eq(-100).all()
        for mark, letter in ((1, "c"), (2, "r")):
            text = trainer.processing_class.decode(labels[(side == mark) & (labels != -100)]).replace(END, "")
            assert set(text) <= {letter}
            seen |= set(text)
    assert seen == {"c", "r"}


def eval_batches(trainer):
    return trainer.get_eval_dataloader(trainer.train_dataset)


def test_evaluation_sets_by_name_with_and_without_pairs(tmp_path):
    plain = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS])
    trainer = make_trainer("sft", tmp_path, **FROZEN)
    trainer.evaluate({"pairs": DATA, "plain": plain})
    assert_sides(last(trainer, "eval_pairs_loss"), "eval_")
    entry = last(trainer, "eval_plain_loss")
    assert not any("nll/" in key for key in entry)


def test_the_other_answers_are_a_side_of_their_own(tmp_path):
    options = FROZEN | {"sft_on": "chosen_and_other", "max_steps": 7, "logging_steps": 7}
    trainer = make_trainer("sft", tmp_path, **options)
    trainer.train()
    entry = last(trainer, "loss")
    nll, _, count = reference("chosen")
    assert entry["nll/chosen"] == pytest.approx(nll / count, rel=1e-5)
    assert "nll/other" in entry and "nll/rejected" not in entry


def test_a_formatting_function_gets_the_pairs_themselves(tmp_path):
    def text(row: dict) -> str:
        return row["chosen"] + row["rejected"]

    args = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    rows = Dataset.from_list(implicit(ROWS))
    common = {"processing_class": tiny_tokenizer(), "train_dataset": rows, "formatting_func": text}
    trainer = trl_dynamics.SFTTrainer(tiny_model(), trl_dynamics.SFTConfig(**args), **common)
    assert trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"]) == text(rows[0]) + END
    with pytest.raises(ValueError, match="sft_on='both'.*leave one of the two out"):
        trl_dynamics.SFTTrainer(tiny_model(), trl_dynamics.SFTConfig(**args, sft_on="both"), **common)


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="sft_on is 'all', expected one of chosen, both"):
        trl_dynamics.SFTConfig("x", sft_on="all", use_cpu=True, bf16=False)
