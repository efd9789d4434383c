"""A comparison survives interruptions, asks nothing twice, and refuses to mix settings."""

import json

import pytest

from trl_dynamics.judging.answers import FileSide, ModelSide
from trl_dynamics.judging.compare import compare
from trl_dynamics.judging.folder import ComparisonFolder
from trl_dynamics.judging.match import Verdict
from trl_dynamics.probing.generate import Answer, Failure, Sampling
from trl_dynamics.store.lock import LockedError

PROMPTS = ["one", "two", "three", [{"role": "user", "content": "four"}]]


class Writer:
    """Answers with its name and the prompt; counts, fails where told, and may be interrupted."""

    is_chat = True

    def __init__(self, name, fails=(), dies_after=None):
        self.name, self.fails, self.dies_after, self.requests = name, fails, dies_after, []

    def generate(self, requests):
        for request in requests:
            if len(self.requests) == self.dies_after:
                raise KeyboardInterrupt
            self.requests.append(request)
            failed = request.prompt in self.fails
            yield request, Failure("too long") if failed else Answer(f"{self.name} on {request.prompt_json}")


class Longest:
    """The longer answer wins; counts, fails where told, and may be interrupted."""

    sees_order = True

    def __init__(self, name="longest", fails=(), dies_after=None):
        self.about = {"model": name}
        self.fails, self.dies_after, self.asked = fails, dies_after, []

    def judge(self, showings):
        for showing in showings:
            if len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append((showing.match.index, showing.leader))
            first, second = map(len, showing.texts)
            choice = "first" if first > second else "second" if second > first else "tie"
            yield showing, Failure("no verdict") if showing.match.index in self.fails else Verdict(choice, "words")


def run(root, judge=None, a=None, b=None, prompts=PROMPTS, sampling=Sampling(), **options):
    a, b = a or Writer("longer"), b or Writer("short")
    sides = {
        name: writer if isinstance(writer, FileSide) else ModelSide(lambda w=writer: w, sampling, name)
        for name, writer in (("A", a), ("B", b))
    }
    with ComparisonFolder(root) as folder:
        return compare(prompts, sides, lambda: judge or Longest(), folder, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_judged_in_both_orders(tmp_path):
    judge = Longest()
    summary = run(tmp_path / "new" / "out", judge)
    assert judge.asked == [(index, leader) for index in range(4) for leader in "AB"]
    assert (summary["wins"], summary["win_rate"], summary["position_bias"]["share"]) == (4, 1.0, 0.0)
    rows = lines(tmp_path / "new" / "out" / "verdicts.jsonl")
    assert [(row["prompt"], row["first"], row["verdict"], row["said"]) for row in rows] == [
        (index, leader, "A", "words") for index in range(4) for leader in "AB"
    ]
    answers = lines(tmp_path / "new" / "out" / "answers_B.jsonl")
    assert answers[3] == {"prompt": PROMPTS[3], "response": f"short on {json.dumps(PROMPTS[3], sort_keys=True)}"}
    stored = json.loads((tmp_path / "new" / "out" / "summary.json").read_text())
    assert stored == summary and "(wins + ties/2)" in stored["rule"]
    kept = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert kept == {
        "settings.json",
        "answers.jsonl",
        "answers_A.jsonl",
        "answers_B.jsonl",
        "verdicts.jsonl",
        "summary.json",
    }


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path):
    whole = run(tmp_path / "whole")
    a = Writer("longer", dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", a=a)
    a, judge = Writer("longer"), Longest(dies_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", judge, a=a)
    assert [request.prompt for request in a.requests] == PROMPTS[2:]
    a, b, again = Writer("longer"), Writer("short"), Longest()
    summary = run(tmp_path / "cut", again, a, b)
    assert not a.requests and not b.requests
    assert judge.asked + again.asked == [(index, leader) for index in range(4) for leader in "AB"]
    assert (summary["new_verdicts"], summary["kept_verdicts"]) == (5, 3)
    counts = {"new_verdicts", "kept_verdicts"}
    assert {k: v for k, v in summary.items() if k not in counts} == {k: v for k, v in whole.items() if k not in counts}
    assert (tmp_path / "cut" / "verdicts.jsonl").read_bytes() == (tmp_path / "whole" / "verdicts.jsonl").read_bytes()


def test_a_torn_verdict_is_judged_again_and_nothing_else(tmp_path):
    run(tmp_path)
    path = tmp_path / "verdicts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    judge = Longest()
    run(tmp_path, judge)
    assert judge.asked == [(3, "B")] and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": PROMPTS[:3]}, "prompts, number was 4, now 3"),
        ({"a": Writer("other")}, "A, model was 'longer', now 'other'"),
        ({"b": Writer("longer")}, "B, model was 'short', now 'longer'"),
        ({"judge": Longest("another")}, "judge, model was 'longest', now 'another'"),
        ({"sampling": Sampling(max_new_tokens=5)}, "A, sampling, max_new_tokens was 256, now 5"),
        ({"sampling": Sampling(temperature=1.0)}, "A, sampling, temperature was 0.0, now 1.0"),
    ],
    ids=["prompts", "A", "B", "judge", "length", "temperature"],
)
def test_other_settings_are_refused_with_the_way_out(tmp_path, changed, message):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{message}.*choose another --output_dir"):
        run(tmp_path, **changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # The seed draws nothing from a greedy model, and the interval is not kept.
    run(tmp_path, sampling=Sampling(seed=3), seed=7, num_resamples=10)


def test_identical_answers_tie_and_no_server_is_asked(tmp_path):
    judge = Longest()
    summary = run(tmp_path, judge, Writer("same"), Writer("same"))
    assert judge.asked == [] and not (tmp_path / "verdicts.jsonl").exists()
    assert (summary["identical"], summary["ties"], summary["win_rate"]) == (4, 4, 0.5)
    assert summary["position_bias"]["share"] is None
    scoring = Longest()
    scoring.sees_order = False
    summary = run(tmp_path / "scored", scoring, Writer("same"), Writer("same"))
    assert len(scoring.asked) == 8 and (summary["ties"], summary["new_verdicts"]) == (4, 8)


def test_sampled_answers_draw_from_seeds_of_their_own(tmp_path):
    a, b = Writer("m"), Writer("m")
    run(tmp_path, a=a, b=b, sampling=Sampling(temperature=1.0, seed=1))
    seeds = [request.sampling.seed for request in a.requests + b.requests]
    assert len(set(seeds)) == 8
    again = Writer("m")
    run(tmp_path / "again", a=again, sampling=Sampling(temperature=1.0, seed=1))
    assert [request.sampling.seed for request in again.requests] == seeds[:4]


def test_plain_dialogues_end_before_the_next_turn(tmp_path):
    a = Writer("longer")
    run(tmp_path, a=a, prompts=["\n\nHuman: Hi.\n\nAssistant:"], sampling=Sampling(stop=("x",)))
    assert a.requests[0].sampling.stop == ("x", "\n\nHuman:")


def test_missing_answers_and_verdicts_stop_or_are_left_out(tmp_path):
    with pytest.raises(ValueError, match="1 of 4 answers of A are missing, first prompt 1: too long.*allow_failures"):
        run(tmp_path, a=Writer("longer", fails=["two"]))
    with pytest.raises(ValueError, match="1 of 4 prompts' verdicts are missing, first prompt 2: no verdict"):
        run(tmp_path, Longest(fails=[2]))
    judge = Longest(fails=[2])
    summary = run(tmp_path, judge, allow_failures=True)
    assert judge.asked == [(2, "A"), (2, "B")]
    assert (summary["prompts"], summary["left_out"]) == (3, 1)
    summary = run(tmp_path / "two", Longest(fails=[2]), a=Writer("longer", fails=["two"]), allow_failures=True)
    assert (summary["prompts"], summary["left_out"]) == (2, 2)
    with pytest.raises(ValueError, match="no prompt has both answers and both verdicts; first: no verdict"):
        run(tmp_path / "none", Longest(fails=range(4)), allow_failures=True)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_answers_whatever_form_its_prompts_have(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "one"}], "response": "1"}, {"prompt": "four", "response": "4444"}]
    path = write(tmp_path / "a.jsonl", *rows, {"prompt": "not asked", "response": "x"})
    found = FileSide(path).answers(PROMPTS, None)
    assert found.texts == {0: "1", 3: "4444"} and sorted(found.failures) == [1, 2]
    assert "has no answer to 'two'" in found.failures[1]
    summary = run(tmp_path / "out", a=FileSide(path), allow_failures=True)
    assert (summary["prompts"], summary["losses"]) == (2, 2)
    moved = write(tmp_path / "moved.jsonl", *rows[::-1], {"prompt": "not asked", "response": "x"})
    assert FileSide(moved).open()["sha256"] == FileSide(path).open()["sha256"]


def test_the_answers_of_one_comparison_are_a_side_of_the_next(tmp_path):
    first = run(tmp_path / "first")
    a, b = (FileSide(tmp_path / "first" / f"answers_{side}.jsonl") for side in "AB")
    second = run(tmp_path / "second", a=a, b=b)
    assert second["win_rate"] == first["win_rate"] and second["lengths"] == first["lengths"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p"}], "answer 1 has the fields \\['prompt'\\]; expected 'prompt' and 'response'"),
        ([{"prompt": "p", "response": 3}], "expected 'prompt' and 'response', a text"),
        (
            [{"prompt": "p", "response": "a"}, {"prompt": "p", "response": "b"}],
            "answer 2 answers a prompt that another",
        ),
        ([{"prompt": "p", "response": "\ud800"}], "broken Unicode"),
    ],
)
def test_wrong_files_of_answers_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        FileSide(write(tmp_path / "a.jsonl", *rows))


def test_only_a_comparisons_folder_is_written_and_by_one_at_a_time(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no comparison"):
        run(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="cannot write to"):
        run(tmp_path / "other" / "thesis.tex" / "below")
    with ComparisonFolder(tmp_path / "out"):
        with pytest.raises(LockedError, match="use another output_dir"):
            run(tmp_path / "out")
    run(tmp_path / "out")
    (tmp_path / "out" / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        run(tmp_path / "out")
    (tmp_path / "out" / "settings.json").write_text("{}")
    (tmp_path / "out" / "verdicts.jsonl").write_text('{"key": "k"}\n')
    with pytest.raises(ValueError, match="line 1 is not a verdict"):
        run(tmp_path / "out")
    (tmp_path / "out" / "verdicts.jsonl").unlink()
    run(tmp_path / "out")
