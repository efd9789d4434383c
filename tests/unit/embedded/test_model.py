"""The shipped base model: small, reproducible, fluent in its world, and without a preference yet."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dynamics.embedded import is_grammatical, model_path, preference_rows
from trl_dynamics.embedded.base_model import build_card, collate, held_out_loss
from trl_dynamics.embedded.data import text_documents
from trl_dynamics.embedded.tokenizer import build_tokenizer, tokenizer_hash
from trl_dynamics.embedded.training import TrainingPlan, new_model, train

MAX_BYTES = 2_500_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path()).eval()


def answer_logps(model, tokenizer, rows, side):
    """Summed log-probability and number of tokens of each answer, with its end token."""
    chats = [row["prompt"] + row[side] for row in rows]
    batch = collate(chats, tokenizer)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    first = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    scored = (torch.arange(targets.shape[1]) >= first) & (batch["attention_mask"][:, 1:] == 1)
    return (logp * scored).sum(-1), scored.sum(-1)


def test_model_folder_is_small_and_complete(model):
    weights = Path(model_path()) / "model.safetensors"
    assert weights.stat().st_size <= MAX_BYTES
    names = {path.name for path in Path(model_path()).iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "build.json"} <= names
    assert model.num_parameters() == build_card()["num_parameters"]
    assert model.dtype == torch.float32


def test_tokenizer_is_the_one_built_from_the_word_lists(tokenizer):
    card = build_card()
    assert tokenizer_hash(tokenizer) == tokenizer_hash(build_tokenizer()) == card["tokenizer_sha256"]


def test_tokenizer_takes_world_words_whole_and_any_text_losslessly(tokenizer):
    answer = preference_rows(1)[0]["chosen"][0]["content"]
    assert len(tokenizer(answer)["input_ids"]) <= 22
    for text in (answer, "Größe, naïve 😀\n\tx_y  z's", "unheardof Words"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_distinct_and_the_model_knows_them(tokenizer, model):
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, *tokenizer.all_special_ids}) == 4
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_chat_prompt_is_a_prefix_of_the_chat_and_the_answer_ends_with_eos(tokenizer):
    for row in preference_rows(20):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        chat = tokenizer.apply_chat_template(
            row["prompt"] + row["chosen"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, answer = chat["input_ids"], row["chosen"][0]["content"]
        assert ids[: len(prompt)] == prompt
        assert ids[len(prompt) :] == [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        assert chat["assistant_masks"] == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


@pytest.mark.parametrize("split", ["train", "test"])
def test_base_model_prefers_neither_answer_and_leaves_room(model, tokenizer, split):
    rows = preference_rows(250, seed=91, split=split)
    chosen, num_chosen = answer_logps(model, tokenizer, rows, "chosen")
    rejected, _ = answer_logps(model, tokenizer, rows, "rejected")
    assert abs((chosen - rejected).mean()) < 1.0
    assert -1.5 < (chosen / num_chosen).mean() < -0.6


@pytest.mark.parametrize(("sample", "least"), [(False, 0.95), (True, 0.9)])
def test_free_running_answers_are_grammatical(model, tokenizer, sample, least):
    prompts = [row["prompt"] for split in ("train", "test") for row in preference_rows(50, seed=7, split=split)]
    batch = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=40,
            do_sample=sample,
            top_k=0 if sample else None,
        )
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(map(is_grammatical, answers)) >= least * len(prompts), [a for a in answers if not is_grammatical(a)]
    assert (output == tokenizer.eos_token_id).any(dim=1).float().mean() >= least


def test_held_out_loss_is_the_one_in_build_json(model, tokenizer):
    assert held_out_loss(model, tokenizer) == pytest.approx(build_card()["held_out_loss"], abs=1e-3)


def test_padding_does_not_change_the_loss(model, tokenizer):
    documents = sorted(text_documents(6, "padding"), key=str)
    with torch.no_grad():
        together = model(**collate(documents, tokenizer))
        alone = [model(**collate([document], tokenizer)) for document in documents]
    counts = [collate([document], tokenizer)["labels"].shape[1] - 1 for document in documents]
    expected = sum(a.loss * n for a, n in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together.loss, expected, rtol=0, atol=1e-4)


def test_training_is_reproducible_and_learns(tokenizer):
    plan = TrainingPlan(num_steps=12, batch_size=8, num_warmup_steps=4)
    runs = []
    for _ in range(2):
        losses = []
        train(new_model(tokenizer), tokenizer, plan, lambda step, loss, losses=losses: losses.append(loss))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0] - 0.5


def test_learning_rate_warms_up_and_decays_to_zero():
    plan = TrainingPlan(num_steps=100, num_warmup_steps=10, learning_rate=1.0)
    rates = [plan.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.0)
