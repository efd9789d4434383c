"""A probe set refuses what cannot be scored, and its fingerprint says whether the same things are scored."""

import dataclasses

import pytest

from trl_dynamics import ProbeSet
from trl_dynamics.probing.schema import (
    CUSTOM,
    GROUPS,
    RESERVED_FIELDS,
    RESPONSE_TYPES,
    Probe,
    group_of,
    is_blank,
    order_types,
)

ANSWERS = {"chosen": " Yes.", "rejected": " No."}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it so?"}]


def probe(probe_id: str = "a", prompt=None, **responses: str) -> Probe:
    return Probe(probe_id, "Is it so?" if prompt is None else prompt, ANSWERS | responses)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Probe("b", "Why?", {"chosen": " Yes."}), "'rejected'.*found \\['chosen'\\].*add that column"),
        (Probe("b", "Why?", {"rejected": " No."}), "'chosen'.*add that column"),
        (probe("b", other_test=" \n"), "'other_test' is blank; leave the type out"),
        (probe("b", chosen=""), "'chosen' is blank"),
        (probe("b", metadata="source"), "'metadata' cannot be a response type"),
        (probe("b", prompt=" "), "prompt is blank"),
        (probe("b", prompt=[]), "expected text or a list of role/content messages"),
        (probe("b", prompt=["Why?"]), "expected text or a list of role/content messages"),
        (probe("b", prompt=[{"role": "user"}]), "expected text or a list of role/content messages"),
        (Probe("b", None, ANSWERS), "expected text or a list of role/content messages"),
        (probe("b", prompt=[*CHAT, {"role": "assistant", "content": "Yes"}]), "end it with the user's turn"),
    ],
)
def test_a_bad_row_is_named_with_what_to_do(bad, said):
    with pytest.raises(ValueError, match=f"probe set 'mine', row 1 \\(probe_id 'b'\\).*{said}"):
        ProbeSet((probe("a"), bad), name="mine")


@pytest.mark.parametrize("given", [7, [{"role": "assistant", "content": " Yes."}]])
def test_a_response_that_is_no_text_is_not_called_blank(given):
    with pytest.raises(ValueError, match="row 0.*'chosen'") as error:
        ProbeSet((probe(chosen=given),))
    assert "blank" not in str(error.value)


def test_empty_and_repeated_are_refused():
    with pytest.raises(ValueError, match="'mine' has no probes; expected at least one row"):
        ProbeSet((), name="mine")
    with pytest.raises(ValueError, match="repeats probe_id 'a'; every id must be unique"):
        ProbeSet((probe("a"), probe("b"), probe("a")))


@pytest.mark.parametrize("name", RESERVED_FIELDS)
def test_reserved_names_are_refused(name):
    with pytest.raises(ValueError, match=f"{name!r} cannot be a response type"):
        ProbeSet((Probe("a", "Why?", ANSWERS | {name: " text"}),))


def test_required_types_can_be_other_ones():
    only_chosen = (Probe("a", "Why?", {"chosen": " So."}),)
    assert ProbeSet(only_chosen, required_types=("chosen",)).counts == {"chosen": 1}
    with pytest.raises(ValueError, match="no response type 'ours'.*chosen and ours"):
        ProbeSet(only_chosen, required_types=("chosen", "ours"))


BASE = (probe("a", other_test=" Paris."), probe("b", prompt=CHAT))


def changed(**fields) -> tuple[Probe, ...]:
    return (dataclasses.replace(BASE[0], **fields), BASE[1])


@pytest.mark.parametrize(
    "probes",
    [
        changed(probe_id="c"),
        changed(prompt="Is it so"),
        changed(responses=BASE[0].responses | {"chosen": " Yes"}),
        changed(responses=BASE[0].responses | {"other_train": " Rome."}),
        changed(responses=ANSWERS),
        changed(responses={"chosen": " No.", "rejected": " Yes.", "other_test": " Paris."}),
        BASE[::-1],
        BASE[:1],
        (BASE[0], dataclasses.replace(BASE[1], prompt=CHAT[1:])),
        (BASE[0], dataclasses.replace(BASE[1], prompt=[CHAT[0] | {"role": "user"}, CHAT[1]])),
    ],
)
def test_fingerprint_changes_with_what_is_scored(probes):
    assert ProbeSet(probes).fingerprint != ProbeSet(BASE).fingerprint


def test_fingerprint_ignores_everything_else():
    backwards = dict(reversed(BASE[0].responses.items()))
    turned_messages = [dict(reversed(message.items())) for message in CHAT]
    same = (dataclasses.replace(BASE[0], responses=backwards), dataclasses.replace(BASE[1], prompt=turned_messages))
    given = ProbeSet(same, name="other name", metadata={"licence": "MIT"})
    assert given.fingerprint == ProbeSet(BASE).fingerprint
    assert len(given.fingerprint) == 64


def test_fingerprint_does_not_run_fields_together():
    one = Probe("a", "Why?", {"chosen": " x y", "rejected": " z"})
    two = Probe("a", "Why?", {"chosen": " x", "rejected": " y z"})
    assert ProbeSet((one,)).fingerprint != ProbeSet((two,)).fingerprint


def test_select_keeps_the_first_probes_and_their_description():
    whole = ProbeSet(BASE, name="mine", metadata={"licence": "MIT"})
    part = whole.select(1)
    assert (part.probes, part.name, part.metadata) == (BASE[:1], "mine", {"licence": "MIT"})
    assert whole.select(99).fingerprint == whole.fingerprint
    with pytest.raises(ValueError, match="num_probes is 0, expected at least 1"):
        whole.select(0)


def test_known_types_come_first_in_their_order_then_custom_ones_by_name():
    assert order_types(reversed(RESPONSE_TYPES)) == list(RESPONSE_TYPES)
    assert order_types(["zebra", "other_test", "apple", "chosen", "apple"]) == [
        "chosen",
        "other_test",
        "apple",
        "zebra",
    ]


def test_counts_and_types_over_rows_that_lack_some():
    given = ProbeSet((probe("a", zebra=" z", other_test=" Paris."), probe("b", apple=" a", zebra=" z"), probe("c")))
    assert given.counts == {"chosen": 3, "rejected": 3, "other_test": 1, "apple": 1, "zebra": 2}
    assert given.response_types == list(given.counts)
    assert len(given) == 3 and [p.probe_id for p in given] == ["a", "b", "c"]


def test_groups():
    assert all(kind.group in GROUPS and kind.name == name for name, kind in RESPONSE_TYPES.items())
    assert group_of("rejected") == "in_distribution"
    assert group_of("chosen_permuted") == "random"
    assert group_of("my own type") == CUSTOM


def test_conversational_prompts():
    chat, plain = BASE[1], BASE[0]
    assert chat.is_conversational and not plain.is_conversational
    assert chat.to_row() == {"probe_id": "b", "prompt": CHAT, **ANSWERS}
    assert ProbeSet((chat, plain)).response_types == ["chosen", "rejected", "other_test"]


@pytest.mark.parametrize(("text", "blank"), [(None, True), ("", True), (" \n\t", True), (" x", False)])
def test_is_blank(text, blank):
    assert is_blank(text) is blank


def test_probes_may_come_as_a_list():
    assert ProbeSet(list(BASE)).probes == BASE
