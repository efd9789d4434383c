"""A set that would be scored wrongly is found out, with the tokens or the probes named."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import tiny_tokenizer
from tokenizer_zoo import sentence_piece
from trl_dynamics.probing.build import Built, settle_seams
from trl_dynamics.probing.check import check
from trl_dynamics.probing.encode import LengthLimits, encode, find_seam
from trl_dynamics.probing.schema import Probe, ProbeSet

# As Qwen3's: reasoning is taken out of the turns before the last question, and put into the last answer.
QWEN3_LIKE = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.index0 > last.user %}<think>\n\n</think>\n\n{% endif %}{{ answer }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Keeps the reasoning of the last assistant turn only, which is another turn once the response follows.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < messages|length - 2 %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "Why?"},
]


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def merging_tokenizer():
    """Bytes, and one token for "ab"."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<end>"]
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def make(*probes, prompt="Why?", **responses):
    given = probes or [Probe("p", prompt, {"chosen": "because", "rejected": "no idea"} | responses)]
    return ProbeSet(tuple(given))


def kinds(report):
    return [*report.errors, *report.warnings]


def test_a_good_set_has_no_findings():
    report = check(make(), tiny_tokenizer())
    assert report.lines() == ["no findings"]
    assert report.lengths["chosen"] == {
        "responses": 1,
        "mean_tokens": 7,
        "median_tokens": 7,
        "max_tokens": 7,
        "cut": 0,
    }


def test_a_template_like_qwen3s_is_scored_from_the_generation_prompt_on():
    probe_set, tokenizer = make(prompt=TURNS), with_template(QWEN3_LIKE)
    assert check(probe_set, tokenizer).errors == {}
    for item in encode(probe_set, tokenizer).items:
        prompt = tokenizer.decode(item.prompt_ids)
        assert prompt.endswith("<|im_start|>assistant\n") and "hm" not in prompt
        answer = probe_set.probes[0].responses[item.response_type]
        assert tokenizer.decode(item.response_ids) == f"<think>\n\n</think>\n\n{answer}"
        assert item.eos_id == tokenizer.eos_token_id


def test_a_template_that_rewrites_earlier_turns_is_refused_with_both_strings():
    probe_set, tokenizer = make(prompt=TURNS), with_template(REWRITING)
    with pytest.raises(ValueError, match=r"probe 'p', response 'chosen': the chat template changes.*'<thin' without"):
        encode(probe_set, tokenizer)
    report = check(probe_set, tokenizer)
    assert len(report.errors["a response cannot be scored"]) == 2
    with pytest.raises(ValueError, match=r"probe 'p', response 'chosen'.*\['<', 't', 'h', 'i', 'n'\], which become"):
        settle_seams(Built(probe_set), tokenizer)
    assert check(make(prompt=TURNS[:1]), tokenizer).errors == {}


def test_a_merge_over_the_seam_is_an_error_with_the_two_tokens():
    tokenizer = merging_tokenizer()
    probe_set = make(Probe("p", "say a", {"chosen": "bc", "rejected": " cd"}))
    seam = find_seam(probe_set.probes[0], "chosen", tokenizer)
    assert (seam.prompt_tokens, seam.joined_tokens) == (("a",), ("ab",))
    assert find_seam(probe_set.probes[0], "rejected", tokenizer) is None
    (cases,) = check(probe_set, tokenizer).errors.values()
    assert cases == [
        "probe 'p', response 'chosen': the prompt ends with the tokens ['a'], which become ['ab'] when the response "
        "follows"
    ]
    with pytest.raises(ValueError, match=r"ends with the tokens \['a'\], which become \['ab'\].*white space"):
        settle_seams(Built(probe_set), tokenizer)
    assert settle_seams(Built(make(prompt="say b")), tokenizer).rejected == ()


def test_an_answer_of_the_model_that_joins_the_prompt_is_rejected_not_fatal():
    probe_set = make(prompt="say a", chosen=" x", rejected=" y", greedy="bc", chosen_initial="cb")
    built = settle_seams(Built(probe_set), merging_tokenizer())
    assert set(built.probe_set.counts) == {"chosen", "rejected", "chosen_initial"}
    (item,) = built.rejected
    assert (item.response_type, item.reason, item.text) == ("greedy", "joins the prompt's last token", "bc")
    assert built.probe_set.metadata["rejected"] == {"greedy: joins the prompt's last token": 1}


def test_lengths_and_cuts():
    probe_set = make(chosen="x" * 30, rejected="y" * 5)
    report = check(probe_set, tiny_tokenizer(), LengthLimits(max_prompt_length=2, max_length=20))
    assert report.warnings["the prompt is cut"] == ["probe 'p', response 'chosen'", "probe 'p', response 'rejected'"]
    assert report.warnings["the response is cut"] == ["probe 'p', response 'chosen'"]
    assert report.lengths["chosen"]["max_tokens"] == 18 and report.lengths["chosen"]["cut"] == 1
    too_long = check(probe_set, tiny_tokenizer(), LengthLimits(context_length=20))
    assert list(too_long.errors) == ["a response cannot be scored"] and "chosen" not in too_long.lengths


def test_unknown_letters_are_told_and_do_not_end_a_response():
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "X"
    probe_set = make(prompt=TURNS[:1], chosen="aXbX")
    report = check(probe_set, tokenizer)
    assert report.warnings["a response has letters that the tokenizer only knows as 'X'"] == [
        "probe 'p', response 'chosen': 2 of 4 tokens"
    ]
    assert tokenizer.decode(encode(probe_set, tokenizer).items[0].response_ids) == "aXbX"


def test_ends():
    no_end = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    report = check(make(prompt=TURNS[:1]), no_end)
    assert len(report.warnings) == 1 and "no end-of-turn token" in kinds(report)[0]
    early = check(make(chosen="a<|im_end|>b"), tiny_tokenizer())
    assert early.errors["a response holds a special token, which may end it early"] == [
        "probe 'p', response 'chosen': '<|im_end|>'"
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert "no EOS token" in kinds(check(make(), tokenizer))[0]


def test_what_a_template_or_tokenizer_does_to_the_text():
    dropping = with_template(QWEN3_LIKE.replace("<think>\n\n</think>\n\n", ""))
    probe_set = make(
        Probe("p", TURNS[:1], {"chosen": "<think>hm</think>So", "rejected": "no"}),
        Probe("q", TURNS[:1], {"chosen": "<think>ha</think>So", "rejected": "yes"}),
    )
    cases = check(probe_set, dropping).errors["a response cannot be scored"]
    assert [case.split(",")[0] for case in cases] == ["probe 'p'", "probe 'q'"]
    added = check(make(prompt=TURNS[:1]), with_template(QWEN3_LIKE)).warnings
    assert added["the chat template writes text that is scored with the response"] == [
        "probe 'p', response 'chosen': '<think></think>'",
        "probe 'p', response 'rejected': '<think></think>'",
    ]
    lost = check(make(prompt=TURNS), with_template(QWEN3_LIKE)).warnings
    assert len(lost["the chat template does not write a message of the prompt as it is"]) == 1


def test_special_tokens_that_end_nothing_are_a_warning():
    report = check(make(chosen="a<|im_start|>b"), tiny_tokenizer())
    assert report.errors == {}
    assert report.warnings == {"a response holds a special token": ["probe 'p', response 'chosen': '<|im_start|>'"]}
    assert check(make(chosen="a<|im_end|>b"), tiny_tokenizer()).lengths["chosen"]["cut"] == 1


def test_two_bos_tokens_are_an_error():
    tokenizer = sentence_piece()
    assert check(make(), tokenizer).errors == {}
    assert list(check(make(prompt="<s>Why?"), tokenizer).errors) == ["a prompt starts with two BOS tokens"]
    # A chat goes in without the tokenizer's own BOS token.
    assert check(make(prompt=[{"role": "user", "content": "Why?"}]), tokenizer).errors == {}
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    assert list(check(make(prompt=TURNS[:1]), tokenizer).errors) == ["a prompt starts with two BOS tokens"]


def test_white_space_in_a_shared_token_is_a_warning():
    report = check(make(prompt="why ", chosen="a time", rejected=" no"), sentence_piece())
    assert report.errors == {} and len(report.warnings["prompt and response share white space in a token"]) == 1
    assert settle_seams(Built(make(prompt="why ", chosen="a time", rejected=" no")), sentence_piece()).rejected == ()


def test_repetitions():
    same = make(Probe("p", "Why?", {"chosen": "a", "rejected": " a "}))
    assert list(check(same, tiny_tokenizer()).errors) == ["two responses of a probe are the same"]
    greedy = check(make(greedy="because"), tiny_tokenizer())
    assert greedy.errors == {} and list(greedy.warnings) == ["two responses of a probe are the same"]
    prompt = check(make(other_train="Why?"), tiny_tokenizer())
    assert prompt.warnings == {"a response repeats its prompt": ["probe 'p', response 'other_train'"]}
    twice = make(
        Probe("p", "Why?", {"chosen": "a", "rejected": "b"}), Probe("q", "Why?", {"chosen": "c", "rejected": "d"})
    )
    found = check(twice, tiny_tokenizer()).warnings
    assert found == {"several probes have the same prompt": ["probe 'p'", "probe 'q'"]}


def test_leakage():
    train = make(
        Probe("p", "Why?", {"chosen": "a b", "rejected": "b", "other_test": "c d"}),
        Probe("q", "How?", {"chosen": "c d", "rejected": "d", "other_test": "e f"}),
    )
    report = check(train, tiny_tokenizer())
    assert report.errors == {"other_test is no held-out answer": ["probe 'p': it is the chosen response of probe 'q'"]}
    held = make(
        Probe("x", "Why? ", {"chosen": "g", "rejected": "h"}), Probe("y", "When?", {"chosen": " a b", "rejected": "i"})
    )
    report = check(train, tiny_tokenizer(), held_out=held)
    assert report.errors["a held-out prompt is probed as a training prompt"] == ["held-out probe 'x'"]
    assert report.warnings["a held-out answer is a training answer"] == ["held-out probe 'y': chosen of probe 'p'"]


def test_the_first_cases_of_each_kind_are_told():
    probes = [Probe(str(i), "Why?", {"chosen": "a", "rejected": "a"}) for i in range(9)]
    lines = check(make(*probes), tiny_tokenizer()).lines()
    assert lines[0] == "error: two responses of a probe are the same (9)" and lines[4] == "    and 6 more"


def test_all_responses_that_training_refuses_are_listed():
    probes = [Probe(str(i), "say a", {"chosen": "bc", "rejected": "x" * 40}) for i in range(9)]
    lines = check(make(*probes), merging_tokenizer(), LengthLimits(context_length=20)).lines()
    for kind in ("share a token", "cannot be scored"):
        (head,) = (index for index, line in enumerate(lines) if line.startswith("error") and kind in line)
        assert lines[head].endswith("(9)") and all(f"'{i}'" in lines[head + 1 + i] for i in range(9))
