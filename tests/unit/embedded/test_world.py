"""The embedded world: what it emits is in its grammar, means what its type says, and depends on its seed alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_dynamics.embedded import check_answer, is_grammatical, preference_rows, probe_set, style_rows
from trl_dynamics.embedded.data import text_documents
from trl_dynamics.embedded.recogniser import parse_answer, parse_question
from trl_dynamics.embedded.vocabulary import ATTRIBUTES, PEOPLE
from trl_dynamics.embedded.world import people, recorded, rumoured
from trl_dynamics.probing.schema import ProbeSet

PERMUTED = ("chosen_permuted", "other_test_permuted")
WORLD_PROBES = Path(__file__).parents[3] / "probes" / "world"


def text_of(messages: list[dict]) -> str:
    return messages[0]["content"]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"[A-Z]\w+", text)) & set(PEOPLE)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("seed", [0, 5])
def test_chosen_is_true_and_preferred_and_rejected_is_neither(split, seed):
    for row in preference_rows(600, seed=seed, split=split):
        prompt, chosen, rejected = (text_of(row[side]) for side in ("prompt", "chosen", "rejected"))
        check = check_answer(prompt, chosen)
        assert check.grammatical and check.fact_right and check.preferred, row
        check = check_answer(prompt, rejected)
        assert check.grammatical and not check.fact_right and not check.preferred, row
        asked = parse_question(prompt)
        assert (parse_answer(rejected).claim.person, parse_answer(rejected).claim.attribute) == asked


def test_check_answer_judges_each_property_by_itself():
    row = preference_rows(1)[0]
    prompt, answer = text_of(row["prompt"]), parse_answer(text_of(row["chosen"]))
    claim = answer.claim
    values = next(a.values for a in ATTRIBUTES if a.name == claim.attribute)
    wrong_value = next(value for value in values if value != claim.value)
    wrong = answer.render().replace(claim.value, wrong_value)
    check = check_answer(prompt, wrong)
    assert (check.grammatical, check.fact_right, check.preferred) == (True, False, True)
    of_somebody_else = text_of(preference_rows(2)[1]["chosen"])
    assert not check_answer(prompt, of_somebody_else).fact_right
    for broken in (answer.render() + " Yes", answer.render()[:-1], "", "A sentence of another world."):
        check = check_answer(prompt, broken)
        assert (check.grammatical, check.fact_right, check.preferred) == (False, False, False)
    with pytest.raises(ValueError, match="not a question of the embedded world"):
        check_answer("What is the capital of France?", answer.render())


def test_record_and_rumour_differ_for_everybody():
    assert all(recorded(p, a.name) != rumoured(p, a.name) for p in PEOPLE for a in ATTRIBUTES)


def test_everything_the_base_model_reads_is_grammatical():
    for document in text_documents(500, "some seed"):
        texts = [document] if isinstance(document, str) else [message["content"] for message in document]
        assert all(map(is_grammatical, texts)), texts


def test_both_styles_are_equally_long():
    rows = preference_rows(2000)
    chosen, rejected = (
        sum(len(text_of(row[side]).split()) for row in rows) / len(rows) for side in ("chosen", "rejected")
    )
    assert abs(chosen - rejected) < 0.5


def test_style_rows_say_the_same_in_both_styles_and_keep_prompt_and_chosen():
    plain, rows = (draw(300, seed=2, split="test") for draw in (preference_rows, style_rows))
    for row, other in zip(rows, plain, strict=True):
        assert (row["prompt"], row["chosen"]) == (other["prompt"], other["chosen"])
        chosen, rejected, rude = (
            parse_answer(text_of(answer)) for answer in (row["chosen"], row["rejected"], other["rejected"])
        )
        assert rejected.claim == chosen.claim != rude.claim and rejected.style == rude.style != chosen.style


def test_probes_have_every_type_and_only_shuffled_ones_are_ungrammatical():
    probes = probe_set(120, seed=1)
    assert len(probes.response_types) == 11 and set(probes.counts.values()) == {120}
    for probe in probes:
        for name, text in probe.responses.items():
            assert is_grammatical(text) == (name not in PERMUTED), (name, text)
        for name in PERMUTED:
            original = probe.responses[name.removesuffix("_permuted")]
            assert probe.responses[name] != original
            assert sorted(probe.responses[name].split()) == sorted(original.split())


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_semantic_rephrase_says_the_same_in_entirely_other_words(side):
    for probe in probe_set(120):
        original, rephrase = (parse_answer(probe.responses[t]) for t in (side, f"{side}_rephrase_semantic"))
        assert (rephrase.claim, rephrase.style) == (original.claim, original.style)
        for choice in ("opener", "adjective", "noun", "verb", "form", "closer"):
            assert getattr(rephrase, choice) != getattr(original, choice)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_format_rephrase_says_something_else_in_the_same_frame(side):
    for probe in probe_set(120):
        original, rephrase = (parse_answer(probe.responses[t]) for t in (side, f"{side}_rephrase_format"))
        assert original.about(rephrase.claim) == rephrase
        claim = rephrase.claim
        assert claim.person != original.claim.person and claim.attribute != original.claim.attribute
        assert claim.value not in (recorded(claim.person, claim.attribute), rumoured(claim.person, claim.attribute))


def test_probes_are_training_pairs_and_other_answers_come_from_where_they_say():
    num_probes = 150
    rows, test_rows = preference_rows(num_probes, seed=2), preference_rows(num_probes, seed=2, split="test")
    chosen_train, chosen_test = ({text_of(row["chosen"]) for row in split} for split in (rows, test_rows))
    for probe, row in zip(probe_set(num_probes, seed=2), rows, strict=True):
        assert probe.prompt == row["prompt"]
        assert probe.responses["chosen"] == text_of(row["chosen"])
        assert probe.responses["rejected"] == text_of(row["rejected"])
        assert probe.responses["other_train"] in chosen_train
        assert not names_in(probe.responses["other_train"]) & names_in(probe.responses["chosen"])
        assert probe.responses["other_test"] in chosen_test


def test_train_and_held_out_people_are_disjoint():
    assert not set(people("train")) & set(people("test"))
    assert set(people("train")) | set(people("test")) == set(PEOPLE)
    train, test = (
        {
            name
            for row in preference_rows(500, split=split)
            for side in row.values()
            for name in names_in(text_of(side))
        }
        for split in ("train", "test")
    )
    assert train == set(people("train")) and test == set(people("test"))
    probes = probe_set(60)
    assert all(names_in(probe.responses["other_test"]) <= set(people("test")) for probe in probes)
    assert all(names_in(probe.responses["human_unrelated"]) == set() for probe in probes)


def test_questions_repeat_only_after_all_were_asked():
    num_subjects = len(people("train")) * len(ATTRIBUTES)
    asked = [parse_question(text_of(row["prompt"])) for row in preference_rows(num_subjects)]
    assert len(set(asked)) == num_subjects >= 400
    assert len({person for person, _ in asked[: len(people("train"))]}) == len(people("train"))


def test_rows_and_probes_do_not_depend_on_how_many_there_are():
    assert preference_rows(300)[:40] == preference_rows(40)
    assert probe_set(80).select(20).fingerprint == probe_set(20).fingerprint
    assert text_documents(50, "a")[:7] == text_documents(7, "a")


def test_the_seed_decides():
    assert preference_rows(30, seed=3) == preference_rows(30, seed=3) != preference_rows(30, seed=4)
    assert probe_set(10, seed=3).fingerprint == probe_set(10, seed=3).fingerprint != probe_set(10, seed=4).fingerprint
    assert len({len(probe_set(1, seed=seed).probes[0].responses) for seed in range(3)}) == 1


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_pairs is 0"):
        preference_rows(0)
    with pytest.raises(ValueError, match="num_probes is -1"):
        probe_set(-1)
    with pytest.raises(ValueError, match="split is 'valid', expected one of"):
        preference_rows(1, split="valid")


def test_shipped_probe_set_is_what_the_world_emits():
    shipped = ProbeSet.load(WORLD_PROBES)
    assert shipped.fingerprint == probe_set().fingerprint
    assert shipped.metadata == probe_set().metadata


def test_drawing_data_needs_neither_torch_nor_transformers():
    code = (
        "import sys, trl_dynamics.embedded as e; e.probe_set(2); e.preference_rows(2); e.model_path();"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
