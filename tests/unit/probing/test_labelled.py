"""Encoded answers as labelled batches, and the text of each of their tokens."""

import pytest
from transformers import AutoTokenizer

from tiny import tiny_model, tiny_tokenizer
from trl_dynamics.embedded import model_path, probe_set
from trl_dynamics.probing.encode import EncodedResponse, encode, token_texts
from trl_dynamics.probing.labelled import collate, pad_id_of, split
from trl_dynamics.probing.schema import ProbeSet


def items(*lengths: int) -> list[EncodedResponse]:
    return [EncodedResponse("p", str(n), (1, 2), (3,) * n, 9, False, False) for n in lengths]


def test_batches_hold_as_many_padded_tokens_as_allowed_and_every_answer_once():
    parts = list(split(items(1, 5, 2, 2), 16))
    assert [[len(item.response_ids) for item in part] for part in parts] == [[1, 5], [2, 2]]
    assert [len(part) for part in split(items(1, 5, 2, 2), 1)] == [1, 1, 1, 1]


def test_labels_are_the_answers_tokens_and_their_end_where_it_counts():
    batch = collate(items(1, 5), 0)
    assert batch["labels"].tolist() == [[-100, -100, 3, *[-100] * 5], [-100, -100, 3, 3, 3, 3, 3, -100]]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 0, 0, 0, 0], [1, 2, 3, 3, 3, 3, 3, 9]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 8]
    assert collate(items(1, 5), 0, ends=True)["labels"][0].tolist() == [-100, -100, 3, 9, *[-100] * 4]


def test_what_fills_rows_up():
    tokenizer = tiny_tokenizer()
    assert pad_id_of(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id_of(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    new = tokenizer.pad_token_id
    assert pad_id_of(tokenizer) == new == pad_id_of(tokenizer, tiny_model(vocab_size=new + 1))
    assert pad_id_of(tokenizer, tiny_model(vocab_size=new)) == tokenizer.eos_token_id != new


@pytest.mark.parametrize("answer", [" It is 5.", " grün, naïve"])
def test_texts_of_tokens_together_are_the_answer(answer):
    rows = [{"prompt": "What is 2 plus 3?", "chosen": answer, "rejected": " No."}]
    tokenizer = tiny_tokenizer()
    (item, _) = encode(ProbeSet.load(rows), tokenizer).items
    texts = token_texts(tokenizer, item)
    assert len(texts) == len(item.response_ids)
    if answer.isascii():
        assert "".join(texts) == answer
    else:
        assert "\ufffd" in texts, "one byte of two is no character"


def test_texts_keep_the_space_in_front_of_a_word():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    for item in encode(probe_set(3), tokenizer).items:
        assert "".join(token_texts(tokenizer, item)) == tokenizer.decode(item.input_ids)[
            len(tokenizer.decode(item.prompt_ids)) :
        ].removesuffix(tokenizer.decode([item.eos_id]))
