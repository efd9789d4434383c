"""Each judge against a slow reference or planted answers."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, FNetConfig

from http_backend import Backend
from tiny import END, VOCAB_SIZE, tiny_model, tiny_tokenizer
from trl_dynamics import embedded
from trl_dynamics.embedded.recogniser import parse_answer
from trl_dynamics.judging.folder import to_row
from trl_dynamics.judging.likelihood import Likelihood
from trl_dynamics.judging.match import Match, Verdict, both_orders, prompt_text
from trl_dynamics.judging.outcome import outcomes
from trl_dynamics.judging.pairwise import PairwiseJudge, parse
from trl_dynamics.judging.reward import RewardModel
from trl_dynamics.judging.scores import CHUNK, Score, ScoreJudge
from trl_dynamics.judging.world import WorldChecker
from trl_dynamics.probing.generate import Answer, Failure, LocalModel
from trl_dynamics.probing.server import OpenAIServer

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
TALK = [*CHAT, {"role": "assistant", "content": "Air."}, {"role": "user", "content": "And at night?"}]
ITEMS = [
    ("Once", " upon a time"),
    ("Once", " no"),
    (CHAT, "It scatters light."),
    (TALK, "No sun, no light to scatter, and so on and on."),
    (CHAT, "Because."),
]


def matches(*answers):
    return [Match(i, f"prompt {i}", {"A": a, "B": b}) for i, (a, b) in enumerate(answers)]


def choices(judge, pairs):
    found = {(s.match.index, s.leader): verdict for s, verdict in judge.judge(both_orders(matches(*pairs)))}
    assert len(found) == 2 * len(pairs)
    return found


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("A", "first"),
        ("b", "second"),
        ("tie", "tie"),
        ("[[B]]", "second"),
        ("Both are fine.\n\n**Verdict: A**\n", "first"),
        ("Final verdict: Tie.", "tie"),
        ("_B_", "second"),
        ("Answer A", "first"),
        ("A is better than B", "unparsable"),
        ("A or B", "unparsable"),
        ("A\nbecause it is right", "unparsable"),
        ("tied", "unparsable"),
        ("a tie", "unparsable"),
        ("C", "unparsable"),
        ("", "unparsable"),
    ],
)
def test_only_a_verdict_alone_on_the_last_line_is_one(said, choice):
    assert parse(Answer(said)) == Verdict(choice, said)


def test_a_cut_or_refused_answer_is_no_verdict():
    for finish in ("length", "refusal"):
        assert parse(Answer("A", finish)).choice == "unparsable"


@pytest.fixture
def backend():
    backend = Backend()
    yield backend
    backend.stop()


def test_the_server_sees_prompt_and_answers_in_both_orders(backend):
    seen = []

    def longer_wins(question):
        seen.append(question)
        first, second = question.split("|")[1:3]
        return "A" if len(first) > len(second) else "B"

    backend.default = longer_wins
    judge = PairwiseJudge(OpenAIServer(backend.url, "j"), "Q {prompt}|{first}|{second}|")
    found = choices(judge, [("{second} {prompt}", "short"), ("x", "yy")])
    assert {key: verdict.choice for key, verdict in found.items()} == {
        (0, "A"): "first",
        (0, "B"): "second",
        (1, "A"): "second",
        (1, "B"): "first",
    }
    assert sorted(seen) == sorted(
        ["Q prompt 0|{second} {prompt}|short|", "Q prompt 0|short|{second} {prompt}|"]
        + ["Q prompt 1|x|yy|", "Q prompt 1|yy|x|"]
    )
    assert all(body["temperature"] == 0 for body in backend.bodies)


def test_answers_that_differ_in_space_alone_are_judged_in_both_orders_and_tie(backend):
    backend.default = lambda question: "A"
    judge = PairwiseJudge(OpenAIServer(backend.url, "j"))
    pair = matches(("Yes.", "Yes.\n"))
    rows = [to_row(*judged) for judged in judge.judge(both_orders(pair))]
    assert outcomes(pair, {row["key"]: row for row in rows}).tolist() == [0.5]


def test_the_judges_question_needs_its_slots():
    with pytest.raises(ValueError, match="no {second}"):
        PairwiseJudge(OpenAIServer("http://localhost:1/v1", "j"), "{prompt} {first}")


def test_chats_are_shown_with_their_roles():
    assert prompt_text(CHAT) == "Why is the sky blue?" == prompt_text("Why is the sky blue?")
    assert prompt_text(TALK) == "User: Why is the sky blue?\n\nAssistant: Air.\n\nUser: And at night?"


class ByLength:
    about = {"model": "length"}

    def __init__(self):
        self.asked = []

    def score(self, items):
        self.asked.append(items)
        return [Failure("no") if text == "?" else Score(len(text) / 10 if text else -math.inf) for _, text in items]


def test_scores_decide_and_close_ones_tie_in_both_orders():
    pairs = [("xxx", "x"), ("x", "xx"), ("xx", "yy"), ("", ""), ("", "x"), ("?", "x")]
    found = choices(ScoreJudge(ByLength(), margin=0.1), pairs)
    assert [found[i, "A"].choice for i in range(5)] == ["first", "tie", "tie", "tie", "second"]
    assert [found[i, "B"].choice for i in range(5)] == ["second", "tie", "tie", "tie", "first"]
    assert isinstance(found[5, "A"], Failure) and isinstance(found[5, "B"], Failure)
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tie_margin"):
            ScoreJudge(ByLength(), margin=bad)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_no_verdict(number):
    class Broken(ByLength):
        def score(self, items):
            return [Score(number, {"reward": number}) for _ in items]

    found = choices(ScoreJudge(Broken()), [("x", "y")])
    assert {type(verdict) for verdict in found.values()} == {Failure}


def test_each_answer_is_scored_once_and_verdicts_come_chunk_by_chunk():
    scorer = ByLength()
    stream = ScoreJudge(scorer).judge(both_orders(matches(*[("x", "xx")] * (CHUNK + 1))))
    next(stream)
    assert [len(items) for items in scorer.asked] == [2 * CHUNK]
    list(stream)
    assert [len(items) for items in scorer.asked] == [2 * CHUNK, 2]
    identical = choices(ScoreJudge(scorer), [("x", "x")])
    assert {verdict.choice for verdict in identical.values()} == {"tie"} and len(scorer.asked[-1]) == 1


def test_the_world_puts_fact_before_grammar_before_style():
    (row,) = embedded.preference_rows(1)
    prompt, chosen, rejected = row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"]
    right, wrong = parse_answer(chosen), parse_answer(rejected)
    rude_and_right = wrong.about(right.claim).render()
    polite_and_wrong = right.about(wrong.claim).render()
    ranked = [chosen, rude_and_right, polite_and_wrong, rejected, chosen[:-1]]
    scores = [score.value for score in WorldChecker([prompt]).score([(prompt, text) for text in ranked])]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    (score,) = WorldChecker().score([(prompt, f" {rude_and_right}\n")])
    assert score.numbers == {"fact_right": 1.0, "grammatical": 1.0, "preferred": 0.0}
    with pytest.raises(ValueError, match="not a question of the embedded world"):
        WorldChecker(["Who wrote Emma?"])


def tiny_reward_model(num_labels=1, **overrides):
    torch.manual_seed(1)
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, initializer_range=0.3, num_labels=num_labels, **(options | overrides)
    )
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def slow_reward(model, ids):
    """The classifier's head on the last token's state, one answer at a time."""
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return (model.score.weight @ hidden[0, -1]).item()


@pytest.mark.parametrize("as_chat", [True, False])
def test_rewards_equal_those_of_one_answer_at_a_time(as_chat):
    model, tokenizer = tiny_reward_model(), tiny_tokenizer()
    scores = RewardModel(model, tokenizer, as_chat=as_chat, batch_size=2).score(ITEMS)
    for (prompt, text), score in zip(ITEMS, scores, strict=True):
        if as_chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], tokenize=False)
        else:
            whole = prompt + text if isinstance(prompt, str) else f"{prompt_text(prompt)}\n{text}"
        expected = slow_reward(model, tokenizer(text=whole)["input_ids"])
        assert score.value == pytest.approx(expected, abs=1e-4) and score.numbers == {"reward": score.value}
    assert len({round(score.value, 3) for score in scores}) == len(ITEMS)


@pytest.mark.parametrize("model_pad", [None, 0, 257, 258])
@pytest.mark.parametrize("pad", ["<|im_end|>", "<pad>", None, "a"])
def test_rewards_do_not_depend_on_padding(pad, model_pad):
    """Neither on the padding token of tokenizer or model, nor on the padding side, nor on the size of a batch."""
    model, tokenizer = tiny_reward_model(), tiny_tokenizer()
    tokenizer.pad_token = pad
    items = [*ITEMS, ("Ends with", f" its end.{END}"), ("and with", " padding<pad>"), ("aaa", "a")]
    expected = [slow_reward(model, tokenizer(text=whole)["input_ids"]) for whole in map(plain, items)]
    for batch_size, side in ((1, "right"), (2, "left"), (8, "right")):
        model.config.pad_token_id, tokenizer.padding_side = model_pad, side
        judge = RewardModel(model, tokenizer, as_chat=False, batch_size=batch_size)
        assert [score.value for score in judge.score(items)] == pytest.approx(expected, abs=1e-4)
        assert model.config.pad_token_id == model_pad


def plain(item):
    prompt, text = item
    return prompt + text if isinstance(prompt, str) else f"{prompt_text(prompt)}\n{text}"


def test_rewards_of_a_model_that_reads_padding_come_one_by_one():
    """Fourier mixing knows no attention mask, and a vocabulary may have no token left to pad with."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    config = FNetConfig(num_labels=1, initializer_range=0.3, **sizes)
    model, tokenizer = AutoModelForSequenceClassification.from_config(config).eval(), tiny_tokenizer()
    scores = RewardModel(model, tokenizer, as_chat=False).score(ITEMS)
    for item, score in zip(ITEMS, scores, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([tokenizer(text=plain(item))["input_ids"]])).logits.item()
        assert score.value == pytest.approx(expected, abs=1e-4)
    rows = [[0, 1], [VOCAB_SIZE - 1, *range(VOCAB_SIZE)]]
    model = tiny_reward_model()
    assert RewardModel(model, tokenizer)._rewards(rows) == pytest.approx(
        [slow_reward(model, r) for r in rows], abs=1e-4
    )


def test_a_reward_model_whose_template_drops_the_answer_fails_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    )
    kept, dropped = RewardModel(tiny_reward_model(), tokenizer).score([(CHAT, "So."), (CHAT, "<think>hm</think>So.")])
    assert isinstance(kept, Score)
    assert dropped == Failure("the reward model's chat template leaves out '<think>hm</think>'")


def test_reward_models_that_cannot_judge_are_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="has 2 outputs"):
        RewardModel(tiny_reward_model(2), tokenizer)
    short = RewardModel(tiny_reward_model(max_position_embeddings=40), tokenizer, as_chat=False)
    kept, too_long = short.score([("a", "b"), ("a", "b" * 40)])
    assert isinstance(kept, Score) and too_long == Failure(
        "prompt and answer have 41 tokens, the reward model takes 40"
    )
    tokenizer.chat_template = None
    assert RewardModel(tiny_reward_model(), tokenizer).as_chat is False
    with pytest.raises(ValueError, match="no chat template"):
        RewardModel(tiny_reward_model(), tokenizer, as_chat=True)


def slow_logp_mean(model, tokenizer, prompt, text):
    """Token by token: the probability of each of the answer's bytes after all that stands before it."""
    if isinstance(prompt, str):
        before = prompt
    else:
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start, ids = len(tokenizer(text=before)["input_ids"]), tokenizer(text=before + text)["input_ids"]
    total = 0.0
    for position in range(start, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1].double()
        total += logits.log_softmax(-1)[ids[position]].item()
    return total / (len(ids) - start)


def test_likelihood_is_the_mean_log_probability_per_token():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    judge = Likelihood(LocalModel(model, tokenizer, "third", batch_size=2))
    *scores, blank, too_long = judge.score([*ITEMS, (CHAT, " "), ("a", "b" * 600)])
    for (prompt, text), score in zip(ITEMS, scores, strict=True):
        assert score.value == pytest.approx(slow_logp_mean(model, tokenizer, prompt, text), abs=1e-4)
        assert score.numbers == {"logp_mean": score.value}
    assert blank.value == -math.inf and "takes 512" in too_long.reason


def test_likelihood_refuses_what_it_would_score_in_part():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (cut,) = Likelihood(LocalModel(model, tokenizer, "third")).score([("Why?", f" So{END} and on")])
    assert cut == Failure("the answer holds '<|im_end|>', which ends it for the judge")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token.*set tokenizer.eos_token"):
        Likelihood(LocalModel(model, tokenizer, "third"))


def test_likelihoods_do_not_depend_on_padding():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    scores = [score.value for score in Likelihood(LocalModel(model, tokenizer, "third", batch_size=1)).score(ITEMS)]
    tokenizer.add_tokens(["<other>"])
    for pad in (END, "a", None, "<new>"):
        tokenizer.add_special_tokens({"pad_token": pad}) if pad == "<new>" else setattr(tokenizer, "pad_token", pad)
        judge = Likelihood(LocalModel(model, tokenizer, "third", batch_size=4))
        assert [score.value for score in judge.score(ITEMS)] == pytest.approx(scores, abs=1e-5)


def test_likelihood_of_chats_needs_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    judge = Likelihood(LocalModel(tiny_model(), tokenizer, "third"))
    with pytest.raises(ValueError, match="no chat template"):
        judge.score(ITEMS)
