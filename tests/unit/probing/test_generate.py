"""The local model's answers against a plain loop, and independent of what shares their batch."""

import pytest
import torch

from tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from trl_dynamics.probing.generate import Answer, Failure, LocalModel, Request, Sampling, seed_of, weights_fingerprint

CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "How are you today?", "x" * 40, "ü 日本")]
TEXTS = ["Once", "Once upon a time there was", " a", "ö"]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request):
    return tiny_model(request.param)


def local(model, batch_size=16):
    return LocalModel(model, tiny_tokenizer(), "tiny", batch_size)


def answers(generator, requests):
    return dict(generator.generate(requests))


@torch.no_grad()
def reference(model, tokenizer, prompt, sampling):
    """One row, one token at a time, no cache; draws by the Gumbel-max trick written out."""
    if isinstance(prompt, str):
        ids = tokenizer(text=prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    noise = torch.Generator().manual_seed(sampling.seed)
    new, finish = [], "length"
    for _ in range(sampling.max_new_tokens):
        logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1].float()
        if sampling.temperature:
            p = (logits / sampling.temperature).softmax(-1)
            order = p.argsort(descending=True)
            before = p[order].cumsum(0) - p[order]
            kept = order[before < sampling.top_p]
            u = torch.rand(len(p), generator=noise, dtype=torch.float64)
            token = int(kept[(p[kept].double().log() - (-u[kept].log()).log()).argmax()])
        else:
            token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            finish = "stop"
            break
        new.append(token)
    text = tokenizer.decode(ids + new, skip_special_tokens=True)[
        len(tokenizer.decode(ids, skip_special_tokens=True)) :
    ]
    return Answer(text.rstrip() if isinstance(prompt, str) else text.strip(), finish)


@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["plain", "chat"])
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_equal_to_one_token_at_a_time(model, prompts, temperature, top_p):
    # Greedy answers of a random model soon repeat themselves; a few tokens tell enough.
    wanted = [Request.of(p, Sampling(12, temperature, top_p, seed=i)) for i, p in enumerate(prompts)]
    found = answers(local(model), wanted)
    for request, prompt in zip(wanted, prompts, strict=True):
        assert found[request] == reference(model, tiny_tokenizer(), prompt, request.sampling)


def test_independent_of_batch_order_and_company(model):
    wanted = [Request.of(p, Sampling(10, 1.0, seed=i)) for i, p in enumerate(TEXTS * 2)]
    found = answers(local(model), wanted)
    assert len(set(found.values())) > 4
    for batch_size, order in ((1, wanted), (3, wanted[::-1]), (5, wanted[2:] + wanted[:2])):
        assert answers(local(model, batch_size), order) == found


@pytest.mark.parametrize("pad", ["<|im_end|>", "a", None, "<new>"])
def test_independent_of_the_padding_token(model, pad):
    """It may be EOS, a letter, missing, or unknown to the model."""
    wanted = [Request.of(p, Sampling(10, 1.0, seed=i)) for i, p in enumerate(TEXTS * 2)]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    tokenizer.add_special_tokens({"pad_token": pad}) if pad == "<new>" else setattr(tokenizer, "pad_token", pad)
    assert pad != "<new>" or tokenizer.pad_token_id >= VOCAB_SIZE
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert answers(LocalModel(model, tokenizer, "tiny", 5), wanted) == answers(local(model), wanted)


def test_a_template_that_reads_parts_gets_parts(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'][0]['text']")
    wanted = [Request.of(prompt, Sampling(6)) for prompt in CHATS]
    assert answers(LocalModel(model, tokenizer, "tiny"), wanted) == answers(local(model), wanted)
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template refuses the messages: Roles must alternate"):
        answers(LocalModel(model, tokenizer, "tiny"), wanted)


def test_an_answer_ends_at_the_stop_text_and_at_the_limit(model):
    (whole,) = answers(local(model), [Request.of("Once", Sampling(20))]).values()
    stop = whole.text[3:5]
    (cut,) = answers(local(model), [Request.of("Once", Sampling(20, stop=(stop,)))]).values()
    assert whole.finish == "length" and cut == Answer(whole.text[: whole.text.index(stop)].rstrip(), "stop")


def test_the_context_is_kept_to():
    model = tiny_model(max_position_embeddings=32)
    requests = [Request.of("x" * n, Sampling(8)) for n in (10, 28, 31, 32, 40)]
    found = [answers(local(model), requests)[r] for r in requests]
    assert found[0].finish == "length" and found[1].finish == "length" and found[2].finish == "length"
    reason = "the prompt has 32 tokens, the model's context is 32; --max_prompt_length keeps the prompt's last tokens"
    assert found[3] == Failure(reason)
    assert isinstance(found[4], Failure)
    alone = answers(local(model, 1), requests)
    assert [alone[r] for r in requests] == found


def test_a_long_prompt_keeps_its_last_tokens(model):
    (cut,) = answers(local(model), [Request.of("x" * 600 + "Once", Sampling(8, max_prompt_length=6))]).values()
    assert cut == answers(local(model), [Request.of("xxOnce", Sampling(8))])[Request.of("xxOnce", Sampling(8))]


def test_a_chat_needs_a_template(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    generator = LocalModel(model, tokenizer, "tiny")
    assert not generator.is_chat
    with pytest.raises(ValueError, match="no chat template"):
        list(generator.generate([Request.of(CHATS[0], Sampling())]))


def test_other_weights_have_another_name():
    model = tiny_model()
    before, name = weights_fingerprint(model), local(model).name
    assert before == weights_fingerprint(tiny_model()) and name == local(tiny_model()).name
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    assert weights_fingerprint(model) != before and local(model).name != name


def test_the_models_own_sampling_defaults_do_not_leak_in():
    model = tiny_model()
    (plain,) = answers(local(model), [Request.of("Once", Sampling(20))]).values()
    model.generation_config.update(do_sample=True, repetition_penalty=5.0, top_k=3, temperature=9.0, max_new_tokens=2)
    assert list(answers(local(model), [Request.of("Once", Sampling(20))]).values()) == [plain]


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"max_prompt_length": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}],
    ids=lambda o: next(iter(o)),
)
def test_bad_sampling_is_refused(options):
    with pytest.raises(ValueError):
        Sampling(**options)


def test_seeds_are_the_same_everywhere():
    assert seed_of(0, "chosen_initial", "abc") == 1974733402
    assert len({seed_of(i, "a") for i in range(1000)}) == 1000
