"""Answers survive every kind of interruption and are never asked for twice."""

import json

import pytest

from trl_dynamics.probing.cache import AnswerCache, answer_all
from trl_dynamics.probing.generate import Answer, Failure, Request, Sampling


class Scripted:
    """Answers with the prompt in capitals; counts, fails where told, and may be interrupted."""

    is_chat = False

    def __init__(self, name="g", fails=(), dies_after=None):
        self.name, self.fails, self.dies_after, self.asked = name, fails, dies_after, []

    def generate(self, requests):
        for request in requests:
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(request.prompt)
            failed = request.prompt in self.fails
            yield request, Failure("no") if failed else Answer(request.prompt.upper())


def requests(*texts, **sampling):
    return [Request.of(text, Sampling(**sampling)) for text in texts]


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    with AnswerCache(path) as cache, pytest.raises(KeyboardInterrupt):
        answer_all(Scripted(dies_after=2), requests("a", "b", "c"), cache)
    again = Scripted()
    with AnswerCache(path) as cache:
        found = answer_all(again, requests("a", "b", "c"), cache)
    assert again.asked == ["c"] and (found.num_cached, found.num_generated) == (2, 1)
    assert [found.answers[r].text for r in requests("a", "b", "c")] == ["A", "B", "C"]


def test_each_answer_is_on_the_disk_before_the_next_one(tmp_path):
    with AnswerCache(tmp_path / "c") as cache:
        for number, text in enumerate(("x", "a\nb", "ü\u2028"), start=1):
            cache.put(text, Answer(text, "length"))
            assert len((tmp_path / "c").read_bytes().splitlines(keepends=True)) == number
    with AnswerCache(tmp_path / "c") as cache:
        assert len(cache) == 3 and cache.get("ü\u2028") == Answer("ü\u2028", "length")


def test_no_answer_leaves_no_file(tmp_path):
    with AnswerCache(tmp_path / "c"):
        assert (tmp_path / "c").exists(), "that it can be written is known before anything is asked"
    assert not (tmp_path / "c").exists()


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path):
    path = tmp_path / "c"
    with AnswerCache(path) as cache:
        answer_all(Scripted(), requests("a", "b"), cache)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1])):
        path.write_bytes(whole[:-cut])
        with AnswerCache(path) as cache:
            assert len(cache) == 1
            assert answer_all(Scripted(), requests("a", "b"), cache).num_generated == 1
        assert path.read_bytes() == whole


def test_another_file_is_refused_and_left_alone(tmp_path):
    for text in ("not json\n", '{"key": "k"}\n', "[]\n", '{"key": "k", "text": "t", "finish": "stop"}\nno\n'):
        (tmp_path / "c").write_text(text)
        with pytest.raises(ValueError, match=r"line \d is not a cached answer"):
            AnswerCache(tmp_path / "c")
        assert (tmp_path / "c").read_text() == text
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot write the cache"):
        AnswerCache(tmp_path / "folder")


def test_failures_are_asked_again():
    cache = AnswerCache()
    found = answer_all(Scripted(fails=("b",)), requests("a", "b"), cache)
    assert list(found.failures.values()) == ["no"] and len(found.answers) == 1
    assert answer_all(Scripted(), requests("a", "b"), cache).num_generated == 1


def test_equal_requests_are_asked_once():
    generator, seen = Scripted(), []
    found = answer_all(generator, requests("a", "a", "b"), AnswerCache(), lambda *counts: seen.append(counts))
    assert generator.asked == ["a", "b"] and found.num_generated == 2
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 1.0}, {"max_new_tokens": 5}, {"stop": ("x",)}])
def test_whatever_changes_the_answer_changes_the_key(other):
    (first,), (second,) = requests("a"), requests("a", **other)
    assert first.key("g") == requests("a")[0].key("g")
    assert len({first.key("g"), second.key("g"), first.key("h"), requests("b")[0].key("g")}) == 4


def test_the_file_is_json_lines(tmp_path):
    with AnswerCache(tmp_path / "c") as cache:
        answer_all(Scripted(), requests("a"), cache)
    row = json.loads((tmp_path / "c").read_text())
    assert row == {"key": requests("a")[0].key("g"), "text": "A", "finish": "stop"}
