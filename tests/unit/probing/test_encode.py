"""Rows are scored on the tokens that TRL trains on, and limits cut where they say."""

import dataclasses

import pytest
import trl
from datasets import Dataset
from transformers import AutoTokenizer

from tiny import END, START, tiny_model, tiny_tokenizer
from trl_dynamics import ProbeSet
from trl_dynamics.probing.encode import LengthLimits, encode
from trl_dynamics.probing.schema import Probe

PLAIN_ROWS = [
    {"prompt": "What is 1 plus 2?", "chosen": " It is 3.", "rejected": " Maybe 4, who knows?"},
    {"prompt": "Größe? 🙂 ", "chosen": "naïve\n\n漢字", "rejected": " x"},
    {"prompt": "Ends itself", "chosen": f" with the token.{END}", "rejected": f" in the middle{END} and goes on"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Größe? 🙂"},
]
CHAT_ROWS = [
    {"prompt": [SYSTEM, *TURNS[:1]], "chosen": " Yes, naïve.", "rejected": "No"},
    {"prompt": TURNS, "chosen": "漢字\n\n", "rejected": "two\nlines"},
]


def as_probes(rows: list[dict]) -> ProbeSet:
    probes = [
        Probe(str(i), row["prompt"], {"chosen": row["chosen"], "rejected": row["rejected"]})
        for i, row in enumerate(rows)
    ]
    return ProbeSet(tuple(probes))


def tokenizer_named(name: str, request):
    if name == "tiny":
        return tiny_tokenizer()
    return AutoTokenizer.from_pretrained(request.getfixturevalue("data_dir") / "stories260k")


def trl_sft_rows(rows: list[dict], tokenizer, tmp_path) -> list[dict]:
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    data = Dataset.from_list(rows)
    trainer = trl.SFTTrainer(tiny_model(vocab_size=600), args=args, train_dataset=data, processing_class=tokenizer)
    return list(trainer.train_dataset)


def trl_dpo_rows(rows: list[dict], tokenizer, tmp_path) -> list[dict]:
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = trl.DPOTrainer(
        tiny_model(vocab_size=600),
        ref_model=tiny_model(vocab_size=600),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return list(trainer.train_dataset)


def as_completion(row: dict, side: str) -> dict:
    chat = not isinstance(row["prompt"], str)
    return {
        "prompt": row["prompt"],
        "completion": [{"role": "assistant", "content": row[side]}] if chat else row[side],
    }


def up_to_the_end(response: list[int], eos_id: int) -> list[int]:
    """What the model must say: a response up to and including the first end-of-turn token."""
    return response[: response.index(eos_id) + 1]


CASES = [("tiny", PLAIN_ROWS), ("stories260k", PLAIN_ROWS[:2]), ("tiny", CHAT_ROWS)]
CASE_IDS = ["plain", "plain, BOS and merges", "chat"]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(("name", "rows"), CASES, ids=CASE_IDS)
def test_equals_what_trls_sft_trainer_makes(name, rows, side, request, tmp_path):
    tokenizer = tokenizer_named(name, request)
    theirs = trl_sft_rows([as_completion(row, side) for row in rows], tokenizer, tmp_path)
    ours = [item for item in encode(as_probes(rows), tokenizer).items if item.response_type == side]
    for item, row in zip(ours, theirs, strict=True):
        start = row["labels"].count(-100)
        assert set(row["labels"][:start]) == {-100}
        assert list(item.prompt_ids) == row["input_ids"][:start]
        expected = up_to_the_end(row["input_ids"][start:], tokenizer.eos_token_id)
        assert [*item.response_ids, item.eos_id] == expected
        # What comes behind an end-of-turn token inside an answer is not scored, and counts as cut.
        behind = [token for token in row["input_ids"][start + len(expected) :] if token != tokenizer.eos_token_id]
        assert not item.prompt_cut and item.response_cut == bool(tokenizer.decode(behind).strip())


@pytest.mark.parametrize(("name", "rows"), CASES, ids=CASE_IDS)
def test_equals_what_trls_dpo_trainer_makes(name, rows, request, tmp_path):
    tokenizer = tokenizer_named(name, request)
    pairs = [row | {side: as_completion(row, side)["completion"] for side in ("chosen", "rejected")} for row in rows]
    theirs = trl_dpo_rows(pairs, tokenizer, tmp_path)
    items = encode(as_probes(rows), tokenizer).items
    for row, chosen, rejected in zip(theirs, items[::2], items[1::2], strict=True):
        for item, side in ((chosen, "chosen"), (rejected, "rejected")):
            start = len(item.prompt_ids)
            whole = row["prompt_ids"] + row[f"{side}_ids"]
            assert list(item.prompt_ids) == whole[:start]
            assert [*item.response_ids, item.eos_id] == up_to_the_end(whole[start:], tokenizer.eos_token_id)
        # TRL lets a pair share the shorter of its two prompts, which differ where a token spans the boundary.
        assert len(row["prompt_ids"]) == min(len(chosen.prompt_ids), len(rejected.prompt_ids))


def one(prompt, response: str, **options) -> ProbeSet:
    return ProbeSet((Probe("p1", prompt, {"chosen": response, "rejected": " r"} | options),))


def first_item(*arguments, tokenizer=None, limits=LengthLimits(), **options):
    return encode(one(*arguments), tokenizer or tiny_tokenizer(), limits, **options).items[0]


def test_text_and_boundary():
    tokenizer = tiny_tokenizer()
    item = first_item("Why?", " Because.")
    assert tokenizer.decode(item.prompt_ids) == "Why?"
    assert tokenizer.decode(item.response_ids) == " Because."
    assert item.eos_id == tokenizer.eos_token_id
    assert item.input_ids == (*item.prompt_ids, *item.response_ids, item.eos_id)


def test_chat_ends_at_the_end_of_turn_not_at_the_templates_last_token():
    tokenizer = tiny_tokenizer()
    item = first_item(TURNS, "So.")
    assert tokenizer.decode(item.prompt_ids).endswith(f"{START}assistant\n")
    assert tokenizer.decode(item.response_ids) == "So."
    assert item.eos_id == tokenizer.convert_tokens_to_ids(END)


def test_end_of_turn_that_is_nobodys_eos():
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    tokenizer.add_special_tokens({"eos_token": "<eos>", "additional_special_tokens": [START, END]})
    assert tokenizer.eos_token_id != end
    item = first_item(TURNS, "So.", tokenizer=tokenizer)
    assert (tokenizer.decode(item.response_ids), item.eos_id) == ("So.", end)


def test_end_ids_of_the_generation_config():
    tokenizer = tiny_tokenizer()
    stop = tokenizer.convert_tokens_to_ids(".")
    item = first_item("Why?", " So. And more", tokenizer=tokenizer, end_ids=[stop])
    assert (tokenizer.decode(item.response_ids), item.eos_id) == (" So", stop)


def test_template_without_an_end_has_no_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    item = first_item(TURNS, "So.", tokenizer=tokenizer)
    assert (tokenizer.decode(item.response_ids), item.eos_id) == ("So.", None)
    assert not item.response_cut


def test_types_come_in_their_order_row_by_row():
    probes = ProbeSet(
        (
            Probe("b", "1", {"zebra": " z", "rejected": " r", "chosen": " c"}),
            Probe("a", "2", {"other_test": " o", "chosen": " c", "rejected": " r"}),
        )
    )
    keys = [(item.probe_id, item.response_type) for item in encode(probes, tiny_tokenizer()).items]
    types = {"b": ["chosen", "rejected", "zebra"], "a": ["chosen", "rejected", "other_test"]}
    assert keys == [(probe_id, name) for probe_id in ("b", "a") for name in types[probe_id]]


def test_prompt_keeps_its_last_tokens():
    whole = first_item("abcdefgh", " xyz")
    item = first_item("abcdefgh", " xyz", limits=LengthLimits(max_prompt_length=3))
    assert item.prompt_ids == whole.prompt_ids[-3:]
    assert (item.response_ids, item.eos_id) == (whole.response_ids, whole.eos_id)
    assert item.prompt_cut and not item.response_cut
    exact = first_item("abcdefgh", " xyz", limits=LengthLimits(max_prompt_length=8))
    assert exact == whole


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_prompt_keeps_its_bos(limit, request):
    tokenizer = tokenizer_named("stories260k", request)
    whole = first_item("Once upon a time there was a boy", " who ran", tokenizer=tokenizer)
    assert whole.prompt_ids[0] == tokenizer.bos_token_id and len(whole.prompt_ids) > 5
    item = first_item("Once upon a time there was a boy", " who ran", tokenizer=tokenizer, limits=LengthLimits(limit))
    if limit == 1:
        assert item.prompt_ids == whole.prompt_ids[-1:]
    else:
        assert item.prompt_ids == (tokenizer.bos_token_id, *whole.prompt_ids[len(whole.prompt_ids) - limit + 1 :])
    assert item.response_ids == whole.response_ids


@pytest.mark.parametrize("max_length", [6, 7, 8, 9, 10])
def test_response_loses_its_end(max_length):
    whole = first_item("abcd", " xyz")  # 4 + 4 + the end of turn
    item = first_item("abcd", " xyz", limits=LengthLimits(max_length=max_length))
    if max_length >= 9:
        assert item == whole
    else:
        assert item.prompt_ids == whole.prompt_ids
        assert item.response_ids == whole.response_ids[: max_length - 4]
        assert item.eos_id is None and item.response_cut and not item.prompt_cut
        assert len(item.input_ids) == max_length


def test_cuts_are_counted_per_type():
    probes = ProbeSet(
        (
            Probe("a", "abcdef", {"chosen": " xyz", "rejected": " r"}),
            Probe("b", "abc", {"chosen": " wxyz", "rejected": " r", "zebra": " uvwxyz"}),
        )
    )
    cuts = encode(probes, tiny_tokenizer(), LengthLimits(max_prompt_length=4, max_length=8)).cuts
    assert cuts == {
        "chosen": {"prompt": 1, "response": 2, "of": 2},
        "rejected": {"prompt": 1, "response": 0, "of": 2},
        "zebra": {"prompt": 0, "response": 1, "of": 1},
    }


def test_over_long_row_is_named_with_both_ways_out():
    limits = LengthLimits(context_length=12)
    assert len(encode(one("abcd", " 123456"), tiny_tokenizer(), limits).items[0].input_ids) == 12
    said = "probe 'p1', response 'chosen' has 13 tokens, more than the model's context of 12.*probe_max_length"
    with pytest.raises(ValueError, match=said + ".*probe_max_prompt_length"):
        encode(one("abcd", " 1234567"), tiny_tokenizer(), limits)
    cut = encode(one("abcd", " 1234567"), tiny_tokenizer(), dataclasses.replace(limits, max_length=12))
    assert len(cut.items[0].input_ids) == 12
    cut = encode(one("abcd", " 1234567"), tiny_tokenizer(), dataclasses.replace(limits, max_prompt_length=3))
    assert len(cut.items[0].input_ids) == 12


@pytest.mark.parametrize("max_length", [3, 4])
def test_max_length_that_leaves_no_room(max_length):
    said = f"probe 'p1', response 'chosen': the prompt's 4 tokens leave no room .*probe_max_length={max_length}"
    with pytest.raises(ValueError, match=said):
        encode(one("abcd", " xyz"), tiny_tokenizer(), LengthLimits(max_length=max_length))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_prompt_length": 0}, "probe_max_prompt_length is 0, expected at least 1"),
        ({"max_length": 1}, "probe_max_length is 1, expected at least 2"),
    ],
)
def test_limits_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        LengthLimits(**fields)


def test_chat_needs_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="probe 'p1', response 'chosen' is a chat, but .* no chat template"):
        encode(one(TURNS, "So."), tokenizer)


def test_a_tokenizer_needs_an_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        encode(one("Why?", " So."), tokenizer)


def test_a_response_that_is_only_an_end_is_named():
    with pytest.raises(ValueError, match="probe 'p1', response 'chosen' has 4 prompt and 0 response tokens"):
        encode(one("Why?", END), tiny_tokenizer())


def test_fingerprint_is_of_the_tokens():
    same = encode(as_probes(PLAIN_ROWS), tiny_tokenizer())
    assert encode(as_probes(PLAIN_ROWS), tiny_tokenizer()).fingerprint == same.fingerprint
    assert encode(as_probes(PLAIN_ROWS), tiny_tokenizer(), LengthLimits(max_length=500)) == same
    others = [
        encode(as_probes(PLAIN_ROWS), tiny_tokenizer(), LengthLimits(max_prompt_length=5)),
        encode(as_probes(PLAIN_ROWS[::-1]), tiny_tokenizer()),
        encode(as_probes(PLAIN_ROWS[:2]), tiny_tokenizer()),
    ]
    assert len({same.fingerprint, *(other.fingerprint for other in others)}) == 4
