"""From any data to a valid set: selection, leakage, what is refused, and sets of any text and size."""

import json
import string
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_peak import PEAK, needs_linux
from trl_dynamics.probing.build import build, read_lines
from trl_dynamics.probing.builders import BUILDERS
from trl_dynamics.probing.io import load
from trl_dynamics.probing.schema import is_blank, is_unicode

PERMUTED = ("chosen_permuted", "other_test_permuted")


def rows(num, tag="t"):
    return [
        {"prompt": f"{tag} question {i}?", "chosen": f" {tag} answer {i} fully", "rejected": f" {tag} no {i}"}
        for i in range(num)
    ]


def test_all_types_by_default():
    built = build(rows(20), held_out=rows(5, "h"), num_probes=20)
    assert built.probe_set.counts == dict.fromkeys(BUILDERS, 20)
    assert built.probe_set.required_types == ("chosen", "rejected") and not built.rejected
    without = build(rows(20), num_probes=20).probe_set.response_types
    assert set(BUILDERS) - set(without) == {"other_test", "other_test_permuted"}
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(4)]
    probe_set = build(completions, num_probes=4).probe_set
    assert "rejected" not in probe_set.response_types and probe_set.required_types == ("chosen",)


def test_selection():
    first = build(rows(30), num_probes=7, select="first").probe_set
    assert [probe.prompt for probe in first] == [f"t question {i}?" for i in range(7)]
    chosen = {probe.prompt for probe in build(rows(30), num_probes=7).probe_set}
    assert len(chosen) == 7 and chosen != {probe.prompt for probe in first}
    # Rows that are added elsewhere in the data push some out, and change none that stay.
    more = build(rows(30) + rows(5, "x"), num_probes=7).probe_set
    stay = {p.probe_id: p.responses["random_words"] for p in build(rows(30), num_probes=7).probe_set}
    kept = [p for p in more if p.probe_id in stay]
    assert kept and all(p.responses["random_words"] == stay[p.probe_id] for p in kept)


def test_unusable_and_repeated_rows_are_counted():
    data = [*rows(5), *rows(2), rows(1)[0] | {"chosen": " "}, rows(9)[8] | {"chosen": "one"}]
    built = build(data, num_probes=5)
    assert built.probe_set.metadata["num_rows"] == 9
    assert built.probe_set.metadata["unusable_rows"] == {
        "a blank chosen": 1,
        "a chosen without two different words to permute": 1,
        "repeats an earlier row": 2,
    }
    assert build(data, num_probes=6, types=["rejected"]).probe_set.counts["chosen"] == 6
    with pytest.raises(
        ValueError, match=r"6 probes.*of 9 rows only 5 are usable.*row 7 has a blank chosen.*--num_pro"
    ):
        build(data, num_probes=6)
    with pytest.raises(ValueError, match="of 0 rows only 0 are usable; give more data"):
        build([], num_probes=1)


def test_without_a_number_all_rows_are_taken_up_to_500():
    assert len(build(rows(48)).probe_set) == 48
    assert len(build(rows(520), types=["rejected"]).probe_set) == 500
    with pytest.raises(ValueError, match="of 1 rows only 0 are usable .a blank chosen: 1"):
        build([rows(1)[0] | {"chosen": " "}])


def test_no_training_answer_is_held_out():
    """Not even one of a row that is not probed."""
    held = [row | {"prompt": "other"} for row in rows(8)] + rows(2, "h")
    built = build(rows(10), held_out=held, num_probes=3)
    others = {probe.responses["other_test"] for probe in built.probe_set}
    assert others <= {row["chosen"] for row in rows(2, "h")}
    assert built.probe_set.metadata["held_out_answers_dropped_as_train_answers"] == 8
    with pytest.raises(ValueError, match="'other_test' needs held-out data: pass --held_out"):
        build(rows(10), held_out=held[:8], num_probes=3, types=["other_test"])


def test_columns_of_the_users_own():
    data = [row | {"theirs": f"their {i}", "plain": "words"} for i, row in enumerate(rows(4))]
    built = build(data, num_probes=4, select="first", extra_columns={"theirs": "mine", "plain": "human_unrelated"})
    assert [p.responses["mine"] for p in built.probe_set] == [f"their {i}" for i in range(4)]
    assert {p.responses["human_unrelated"] for p in built.probe_set} == {"words"}
    for name, message in (("chosen", "cannot become response type 'chosen'"), ("prompt", "the name is reserved")):
        with pytest.raises(ValueError, match=message):
            build(data, num_probes=4, extra_columns={"theirs": name})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes is 0"),
        ({"select": "last"}, "select is 'last', expected one of random, first"),
        ({"types": ["poem"]}, "'poem' cannot be built; expected some of chosen.*--columns COLUMN=TYPE"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(rows(3), **({"num_probes": 2} | options))


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("One here.\n\n  Two there. \n", encoding="utf-8")
    assert read_lines(tmp_path / "a.txt", "--human_text") == ("One here.", "Two there.")
    (tmp_path / "b.txt").write_text("\n \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    for name, message in (("b.txt", "has no text"), ("c.txt", "cannot be read"), ("d.txt", "cannot be read")):
        with pytest.raises(ValueError, match=f"--human_text .*{message}"):
            read_lines(tmp_path / name, "--human_text")
    built = build(rows(2), num_probes=2, sentences=("Only this.",), dictionary=("so",))
    for probe in built.probe_set:
        assert set(probe.responses["human_unrelated"].split()) == {"Only", "this."}
        assert set(probe.responses["random_words"].split()) == {"so"}


anything = st.text(max_size=60)
plain_rows = st.fixed_dictionaries({"prompt": anything, "chosen": anything, "rejected": anything})
chat_rows = st.builds(
    lambda prompt, chosen, rejected: {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    },
    anything,
    anything,
    anything,
)
# Few letters, so that prompts repeat, answers equal prompts, and words equal one another.
alike = st.text("ab ", max_size=4)
alike_rows = st.fixed_dictionaries({"prompt": alike, "chosen": alike, "rejected": alike})


def said(value):
    return value if isinstance(value, str) else value[0]["content"]


def is_usable(row):
    texts = [said(row[name]) for name in ("prompt", "chosen", "rejected")]
    # A chat's prompt may be blank: the template puts the roles around it.
    needed = texts if isinstance(row["prompt"], str) else texts[1:]
    words = set(texts[1].split())
    return not any(map(is_blank, needed)) and all(map(is_unicode, texts)) and len(words) > 1


@given(st.one_of(st.lists(plain_rows), st.lists(chat_rows), st.lists(alike_rows, max_size=60)), st.integers(0, 9))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_any_text_gives_a_valid_set_that_survives_the_disk(tmp_path, data, seed):
    distinct = {json.dumps(row, sort_keys=True) for row in data if is_usable(row)}
    if not distinct:
        with pytest.raises(ValueError, match="only 0 are usable"):
            build(data, num_probes=1, seed=seed)
        return
    built = build(data, held_out=rows(3, "h"), num_probes=len(distinct), seed=seed)
    by_content = {(said(json.loads(r)["prompt"]), said(json.loads(r)["chosen"])) for r in distinct}
    assert {(said(p.prompt), p.responses["chosen"]) for p in built.probe_set} == by_content
    built.probe_set.save(tmp_path / "set")
    assert load(tmp_path / "set").fingerprint == built.probe_set.fingerprint
    assert load(tmp_path / "set").metadata == built.probe_set.metadata


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "chosen", "rejected", "completion", "messages", "text", "images"]),
        st.one_of(st.none(), st.integers(), anything, st.lists(anything, max_size=2)),
        max_size=5,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_row_is_a_probe_or_one_clear_error(row):
    try:
        build([row], num_probes=1, types=["chosen"])
    except ValueError as error:
        assert "row 0" in str(error) or "usable" in str(error)


def test_very_long_rows():
    text = " ".join(string.ascii_lowercase) * 20_000
    built = build([{"prompt": text, "chosen": text, "rejected": "no"}, *rows(3)], held_out=rows(3, "h"), num_probes=4)
    assert built.probe_set.counts["human_unrelated"] == 4
    probe = next(p for p in built.probe_set if len(p.prompt) > 1000)
    assert probe.responses["chosen"] == probe.prompt == text


MEMORY = (
    PEAK
    + """
from trl_dynamics.probing.build import build
rows = ({"prompt": f"question {i}? " * 40, "chosen": f" answer {i} is this" * 30, "rejected": f" no {i} not this" * 30}
        for i in range(100_000))
held = ({"prompt": f"held {i}?", "chosen": f" held answer {i}" * 30, "rejected": " no"} for i in range(20_000))
print(len(build(rows, held_out=held, num_probes=2000).probe_set))
print(peak_kib())
"""
)


@needs_linux
def test_a_hundred_thousand_rows_within_two_gigabytes():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    num_probes, peak_kib = result.stdout.split()
    assert int(num_probes) == 2000 and int(peak_kib) < 2 * 2**20
