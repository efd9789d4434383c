"""Who is asked for which rephrase and how, and why an answer is not kept."""

import json
from collections import Counter

import pandas as pd
import pytest

from trl_dynamics.probing.build import build
from trl_dynamics.probing.cache import AnswerCache
from trl_dynamics.probing.generate import Answer, Failure, Sampling
from trl_dynamics.probing.generated import Generation
from trl_dynamics.probing.quality import Gate, language_of
from trl_dynamics.probing.rephrase import INSTRUCTIONS, PLAIN_LEAD, REPHRASES, FileRephraser, GeneratedRephraser, Job

SOURCE = "The quick brown fox jumps over the lazy dog and it runs away."
ROWS = [
    {
        "prompt": f"Question {i}?",
        "chosen": f" The answer to this is number {i} and that is all.",
        "rejected": f" I will not tell you that the number is {i}.",
    }
    for i in range(6)
]
ALL = [*REPHRASES, "rejected"]


class Writer:
    """A generator that answers by a function of the prompt's text and the request's seed."""

    def __init__(self, write, is_chat=True, name="writer"):
        self.write, self.is_chat, self.name, self.asked = write, is_chat, name, []

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            text = request.prompt[0]["content"] if self.is_chat else request.prompt
            outcome = self.write(text, request)
            yield request, outcome if isinstance(outcome, (Answer, Failure)) else Answer(outcome)


def echo_words(text, request):
    return "In other terms: " + text.rsplit("Text:\n")[-1].strip()


def jobs():
    return [Job("k", name, SOURCE) for name in REPHRASES]


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (Answer("A fast brown animal leaps over a sleeping hound and then flees."), "semantic", None),
        (Answer("no", "refusal"), "semantic", "refused"),
        (Answer(" \n"), "format", "empty"),
        (Answer("A fast brown animal leaps over a sleeping", "length"), "semantic", "cut at the limit of new tokens"),
        (
            Answer("the QUICK brown fox jumps, over the lazy dog - and it runs away"),
            "semantic",
            "the same as its source",
        ),
        (Answer("A fast fox."), "semantic", "too short"),
        (Answer("word " * 60), "format", "too long"),
        (
            Answer("Der schnelle Fuchs springt über den Hund und das ist nicht die Katze."),
            "format",
            "in German instead",
        ),
        (
            Answer("Быстрая лиса прыгает через ленивую собаку и убегает прочь."),
            "semantic",
            "in Cyrillic instead of Eng",
        ),
    ],
)
def test_each_reason(answer, kind, reason):
    found = Gate().reject(SOURCE, answer, kind)
    assert found is None if reason is None else found.startswith(reason)


def test_meaning_is_compared_both_ways():
    answer = Answer("A fast brown animal leaps over a sleeping hound and then flees.")
    same, other = Gate(similarity=lambda a, b: 0.9), Gate(similarity=lambda a, b: 0.2)
    assert same.reject(SOURCE, answer, "semantic") is None and other.reject(SOURCE, answer, "format") is None
    assert same.reject(SOURCE, answer, "format") == "the same meaning"
    assert other.reject(SOURCE, answer, "semantic") == "another meaning"
    with pytest.raises(ValueError, match="0 <= min < max"):
        Gate(2.0, 1.0)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("This is the way that it was and you have to be here for it.", "English"),
        ("Das ist nicht die Zeit, die der Mann mit dem Hund hat.", "German"),
        ("Les chats et les chiens sont dans la maison pour vous.", "French"),
        ("El perro y los gatos son para los que más se lo piden por la noche.", "Spanish"),
        ("我们今天去公园散步", "Cjk"),
        ("今日は公園へ散歩に行きます", "Japanese"),
        ("Привет, как дела сегодня", "Cyrillic"),
        ("ok", None),
        ("12345 + 678 = ...", None),
        ("foo bar baz qux", None),
    ],
)
def test_language(text, language):
    assert language_of(text) == language


def test_chat_models_are_told_and_others_continue():
    chat, plain = Writer(echo_words), Writer(echo_words, is_chat=False)
    for writer in (chat, plain):
        GeneratedRephraser(writer, Sampling(50, 0.7)).rephrase(jobs(), AnswerCache())
    kinds = Counter()
    for told, continued in zip(chat.asked, plain.asked, strict=True):
        ((message,), text) = told.prompt, continued.prompt
        assert message["role"] == "user" and text == message["content"] + PLAIN_LEAD and SOURCE in text
        kinds[next(k for k, i in INSTRUCTIONS.items() if message["content"] == i.replace("{text}", SOURCE))] += 1
        assert not told.sampling.stop and continued.sampling.stop
    assert kinds == {"semantic": 3, "format": 2}
    assert len({request.sampling.seed for request in chat.asked}) == len(REPHRASES)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Here is the rewritten text:\n\nA fox.", "A fox."),
        ("Here's another way to say it: A fox.", "A fox."),
        ("Rewritten text: A fox.", "A fox."),
        ('"A fox."', "A fox."),
        ("“A fox.”", "A fox."),
        ('"A fox" and "a dog"', '"A fox" and "a dog"'),
        ("A fox: quick.", "A fox: quick."),
        ("<think>\nLet me see.\n</think>\n\nA fox.", "A fox."),
        ("<think>\n\n</think>\n\nRephrased text: A fox.", "A fox."),
        ("<think>\nLet me see and", ""),
        ("A <think> tag.", "A <think> tag."),
    ],
)
def test_labels_and_quotes_are_taken_off(raw, clean):
    found = GeneratedRephraser(Writer(lambda *_: raw)).rephrase(jobs()[:1], AnswerCache())
    assert [answer.text for answer in found.answers.values()] == [clean]


def test_braces_in_texts_and_instructions_are_only_text():
    writer = Writer(echo_words)
    rephraser = GeneratedRephraser(writer, instructions={"semantic": "{json} {text} {0}"})
    rephraser.rephrase([Job("k", "chosen_rephrase_semantic", "a {text} {b}")], AnswerCache())
    assert writer.asked[0].prompt[0]["content"] == "{json} a {text} {b} {0}"
    for bad, message in (({"semantic": "no place"}, "does not contain"), ({"other": "{text}"}, "no kind of rephrase")):
        with pytest.raises(ValueError, match=message):
            GeneratedRephraser(writer, instructions=bad)


def test_the_build_asks_who_should_write_what():
    model, other = Writer(echo_words, is_chat=False, name="model"), Writer(echo_words, name="other")
    generation = Generation(model=model, rephraser=GeneratedRephraser(other))
    built = build(ROWS, types=[*ALL, "greedy", "sampled_1", "sampled_2"], num_probes=6, generation=generation)
    assert set(built.probe_set.counts.values()) == {6}
    about = built.probe_set.metadata
    assert [(part["by"], part["types"]) for part in about["rephrases"]] == [
        ("model", ["chosen_self_rephrase"]),
        ("other", [name for name in REPHRASES if name != "chosen_self_rephrase"]),
    ]
    assert about["own_answers"]["types"] == ["greedy", "sampled_1", "sampled_2"]
    assert all(probe.responses[name][0] == " " for probe in built.probe_set for name in REPHRASES)
    alone = build(ROWS, num_probes=6, generation=Generation(model=model)).probe_set
    assert set(alone.response_types) & {*REPHRASES, "greedy"} == {"chosen_self_rephrase", "greedy"}


def test_what_is_rejected_is_asked_again_and_listed():
    def write(text, request):
        return "no" if request.sampling.seed % 2 else echo_words(text, request)

    generation = Generation(rephraser=GeneratedRephraser(Writer(write)), attempts=12)
    built = build(ROWS, types=["chosen_rephrase_semantic"], num_probes=6, generation=generation)
    assert built.probe_set.counts["chosen_rephrase_semantic"] == 6
    assert built.rejected and {item.reason for item in built.rejected} == {"too short"}
    assert built.probe_set.metadata["rejected"] == {"chosen_rephrase_semantic: too short": len(built.rejected)}

    never = Generation(rephraser=GeneratedRephraser(Writer(lambda *_: Answer("No.", "refusal"))), attempts=2)
    built = build(ROWS, types=["chosen_rephrase_semantic"], num_probes=6, generation=never)
    assert "chosen_rephrase_semantic" not in built.probe_set.counts
    assert len(built.rejected) == 12 and {item.text for item in built.rejected} == {"No."}
    greedy = Generation(rephraser=GeneratedRephraser(Writer(lambda *_: "x"), Sampling(temperature=0)), attempts=9)
    assert len(build(ROWS, types=["chosen_rephrase_format"], num_probes=6, generation=greedy).rejected) == 6


def test_failures_stop_the_build_or_are_counted(tmp_path):
    def write(text, request):
        return Failure("status 400: no") if "number 3" in text else echo_words(text, request)

    with AnswerCache(tmp_path / "c") as cache:
        options = {"types": ["chosen_rephrase_semantic"], "num_probes": 6}
        generation = Generation(rephraser=GeneratedRephraser(Writer(write)), cache=cache)
        with pytest.raises(ValueError, match=r"1 of 6 responses got no answer.*status 400.*--allow_failures") as error:
            build(ROWS, generation=generation, **options)
        assert str(tmp_path / "c") in str(error.value) and len(cache) == 5
        generation.allow_failures = True
        built = build(ROWS, generation=generation, **options)
    assert built.probe_set.counts["chosen_rephrase_semantic"] == 5
    assert built.probe_set.metadata["failures"] == {"chosen_rephrase_semantic: status 400: no": 1}


def test_an_empty_own_answer_is_listed():
    model = Writer(lambda text, request: "" if "2" in text else "fine", is_chat=False)
    built = build(ROWS, types=["greedy"], num_probes=6, generation=Generation(model=model))
    assert built.probe_set.counts["greedy"] == 5
    assert [(item.response_type, item.reason) for item in built.rejected] == [("greedy", "empty")]


def test_own_answers_to_dialogues_end_before_the_next_turn():
    rows = [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello there", "rejected": " no"}, ROWS[0]]
    model = Writer(lambda *_: "fine", is_chat=False)
    build(rows, types=["greedy"], num_probes=2, generation=Generation(model=model))
    assert {request.prompt[:5]: request.sampling.stop for request in model.asked} == {
        "\n\nHum": ("\n\nHuman:",),
        "Quest": (),
    }


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["greedy"], "'greedy' needs the model to be tracked: pass --model"),
        (["chosen_self_rephrase"], "needs the model to be tracked"),
        (["chosen_rephrase_format"], "needs someone who rephrases: pass --rephraser"),
        (["sampled_0"], "'sampled_0' cannot be built"),
    ],
)
def test_what_is_missing_is_named(types, message):
    with pytest.raises(ValueError, match=message):
        build(ROWS, types=types, num_probes=2)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_of_ready_rephrases(tmp_path, suffix):
    path = tmp_path / f"ready.{suffix}"
    rows = [
        {
            "text": row["chosen"],
            "response_type": "chosen_rephrase_semantic",
            "rephrase": f"Number {i} answers it fully.",
        }
        for i, row in enumerate(ROWS)
    ]
    if suffix == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    generation = Generation(rephraser=FileRephraser(path))
    built = build(ROWS, types=["chosen_rephrase_semantic"], num_probes=6, generation=generation)
    for probe in built.probe_set:
        number = probe.prompt[9]
        assert probe.responses["chosen_rephrase_semantic"] == f" Number {number} answers it fully."
    with pytest.raises(ValueError, match="6 of 6 responses got no answer.*has no such rephrase"):
        build(ROWS, types=["rejected_rephrase_format"], num_probes=6, generation=generation)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 1 is not JSON"),
        ("[]", "line 1 is a list"),
        ('{"text": "a", "response_type": "chosen_rephrase_semantic"}', "row 1, field 'rephrase' is None"),
        (
            '{"text": "a", "response_type": "chosen", "rephrase": "b"}',
            "field 'response_type' is 'chosen'; expected one",
        ),
    ],
)
def test_bad_files_of_rephrases(tmp_path, line, message):
    (tmp_path / "f.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        FileRephraser(tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        FileRephraser(tmp_path / "none.jsonl")
