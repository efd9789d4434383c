"""Each response type by its definition, whatever the text; the same for any order of rows and number of processes."""

import random
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dynamics.probing.build import build, build_probe
from trl_dynamics.probing.builders import BUILDERS, CannotBuild, Material, build_one, has_permutation, shipped_text
from trl_dynamics.probing.rows import Pair, read_pairs
from trl_dynamics.probing.schema import RESPONSE_TYPES, ProbeSet

TRAIN, HELD_OUT = ("alpha beta", "gamma delta epsilon", "zeta"), ("eta theta", "iota kappa lambda mu")
MATERIAL = Material(0, TRAIN, HELD_OUT, shipped_text("prose"), shipped_text("words"))
PAIR = Pair("Why?", " alpha beta", " nothing")

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)
# Long rows, of words of any script.
long_texts = st.lists(texts, min_size=50, max_size=400).map(" ".join)


def words(text):
    return Counter(text.split())


def test_every_type_has_a_builder_or_a_generator_and_a_group():
    from trl_dynamics.probing.generated import is_generated

    assert {name for name in RESPONSE_TYPES if not is_generated(name)} == set(BUILDERS)


@pytest.mark.parametrize("name", BUILDERS)
def test_begins_as_chosen_does_and_is_never_blank(name):
    for space in ("", " ", "\n\n"):
        text = build_one(name, Pair("Why?", f"{space}alpha beta", f"{space}no"), MATERIAL)
        assert text.startswith(space) and text.strip() == text[len(space) :] and text.strip()


@pytest.mark.parametrize("name", BUILDERS)
def test_deterministic_by_seed_and_content(name):
    pairs = [Pair(f"prompt {i}", f" {' '.join(f'w{i}x{j}' for j in range(9))}", " no") for i in range(30)]

    def made(seed):
        material = Material(
            seed, [p.chosen.strip() for p in pairs], [f"held {i} out" for i in range(30)], *MATERIAL_TEXT
        )
        return [build_one(name, pair, material) for pair in pairs]

    assert made(0) == made(0)
    if name not in ("chosen", "rejected"):
        assert made(0) != made(1)


MATERIAL_TEXT = (MATERIAL.sentences, MATERIAL.dictionary)


def test_other_answers_are_never_the_pairs_own():
    for seed in range(40):
        material = Material(seed, TRAIN, HELD_OUT, *MATERIAL_TEXT)
        assert build_one("other_train", PAIR, material).strip() in TRAIN[1:]
        assert build_one("other_test", PAIR, material).strip() in HELD_OUT
    for alone in (("alpha beta",), (), ("alpha beta", "nothing")):
        with pytest.raises(CannotBuild, match="no other training pair"):
            build_one("other_train", PAIR, Material(0, alone))
    # One other answer among many of the pair's own is found.
    assert build_one("other_train", PAIR, Material(0, ["alpha beta"] * 10_000 + ["other"])) == " other"


@given(st.one_of(texts, long_texts), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_permutations_keep_the_words_and_change_their_order(chosen, seed):
    pair, material = Pair("Why?", chosen, "no"), Material(seed, TRAIN, (chosen.strip(),), *MATERIAL_TEXT)
    if not has_permutation(chosen):
        with pytest.raises(CannotBuild, match="two different words"):
            build_one("chosen_permuted", pair, material)
        return
    permuted = build_one("chosen_permuted", pair, material)
    assert words(permuted) == words(chosen) and permuted.split() != chosen.split()
    other = Pair("Why?", "something else", "no")
    source = build_one("other_test", other, material)
    assert words(build_one("other_test_permuted", other, material)) == words(source) == words(chosen)


@given(st.one_of(texts, long_texts), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_lengths_follow_chosen(chosen, seed):
    pair, material = Pair("Why?", chosen, "no"), Material(seed, (), (), *MATERIAL_TEXT)
    wanted = len(chosen.split())
    made = build_one("random_words", pair, material).split()
    assert len(made) == wanted and set(made) <= set(material.dictionary)
    sentences = build_one("human_unrelated", pair, material)
    longest = max(len(s.split()) for s in material.sentences)
    assert abs(len(sentences.split()) - wanted) <= longest
    left = sentences.strip()
    while left:
        sentence = next(s for s in material.sentences if left.startswith(s))
        left = left[len(sentence) :].lstrip()


def test_the_shipped_texts_are_clean():
    for name in ("prose", "words"):
        lines = shipped_text(name)
        assert len(set(lines)) == len(lines) and all(line == line.strip() and line for line in lines)
    assert all(line[-1] in ".!?" for line in shipped_text("prose"))


def rows(num, held_out=False):
    draw = random.Random(f"{held_out}")
    vocabulary = [f"{'h' if held_out else 't'}{i}" for i in range(200)]

    def text():
        return " " + " ".join(draw.sample(vocabulary, draw.randint(2, 30)))

    return [{"prompt": f"prompt {held_out} {i}", "chosen": text(), "rejected": text()} for i in range(num)]


def test_independent_of_row_order():
    data, held = rows(60), rows(20, True)
    first = build(data, held_out=held, num_probes=25).probe_set
    for order in (data[::-1], data[30:] + data[:30]):
        assert build(order, held_out=held[::-1], num_probes=25).probe_set.fingerprint == first.fingerprint
    assert build(data, held_out=held, num_probes=25, seed=1).probe_set.fingerprint != first.fingerprint


def test_a_larger_set_holds_the_smaller_one():
    small, large = (build(rows(60), num_probes=n, types=["rejected", "random_words"]).probe_set for n in (10, 40))
    assert small.probes == large.probes[:10]


@pytest.mark.parametrize("num_proc", [None, 2, 3])
def test_independent_of_the_number_of_processes(num_proc):
    data, held = rows(24), rows(10, True)
    whole = build(data, held_out=held, num_probes=24, select="first").probe_set
    pairs = list(read_pairs(data))
    material = Material(
        0,
        tuple(sorted(p.chosen.strip() for p in pairs)),
        tuple(sorted(r["chosen"].strip() for r in held)),
        *MATERIAL_TEXT,
    )

    def probe(row):
        (pair,) = read_pairs([row])
        return build_probe(pair, list(BUILDERS), material).to_row()

    mapped = Dataset.from_list(data).map(probe, num_proc=num_proc)
    assert ProbeSet.load(mapped).fingerprint == whole.fingerprint
