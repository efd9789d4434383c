"""Two sides answer the same prompts and a judge decides, in both orders; what is done is kept and never done twice."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from trl_dynamics.judging.answers import ModelSide, SideAnswers
from trl_dynamics.judging.folder import SUMMARY_FILE, ComparisonFolder
from trl_dynamics.judging.match import SIDES, UNPARSABLE, Judge, Match, Showing, both_orders
from trl_dynamics.judging.outcome import check_bootstrap, summarise
from trl_dynamics.probing.cache import AnswerCache
from trl_dynamics.probing.generate import Failure
from trl_dynamics.probing.schema import Prompt

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class Side(Protocol):
    """Something that answers; `open` returns what its answers depend on."""

    def open(self) -> dict: ...

    def answers(
        self, prompts: Sequence[Prompt], cache: AnswerCache, progress: Callable[[int, int], None] | None = None
    ) -> SideAnswers: ...


def compare(
    prompts: Sequence[Prompt],
    sides: Mapping[str, Side],
    judge: Callable[[], Judge],
    folder: ComparisonFolder,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    allow_failures: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Let both sides answer, judge what was not judged yet, and write the summary; returns it.

    Args:
        prompts (`Sequence[Prompt]`): Without repetition.
        sides (`Mapping[str, Side]`): `"A"` and `"B"`; opened one after the other, files before models.
        judge (`Callable[[], Judge]`): Called once all answers are there.
        folder ([`ComparisonFolder`]): Where everything is kept; entered.
        confidence, num_resamples, seed (*optional*): Of the bootstrap interval.
        allow_failures (`bool`, *optional*): Leave out prompts that got no answer or no verdict, instead of stopping.
        progress (`Callable[[str, int, int], None]`, *optional*): Called with what is done, how many, and of how many.

    Raises:
        ValueError: If the folder was begun with other settings, or an answer or a verdict is missing; what did arrive
            is kept, so that the same call asks for the rest only.
    """
    check_bootstrap(confidence, num_resamples)
    content = json.dumps(list(prompts), sort_keys=True).encode()
    folder.settle("prompts", {"number": len(prompts), "sha256": hashlib.sha256(content).hexdigest()})
    tell = progress or (lambda what, done, total: None)
    found, about, left_out = {}, {}, {}
    # What is quickly read may be quickly found wrong.
    for name in sorted(SIDES, key=lambda name: isinstance(sides[name], ModelSide)):
        about[name] = sides[name].open()
        folder.settle(name, about[name])
        found[name] = sides[name].answers(
            prompts, folder.cache, lambda done, total, name=name: tell(f"answers of {name}", done, total)
        )
        left_out |= _left_out(found[name].failures, len(prompts), f"answers of {name}", allow_failures)
        _write_answers(folder, name, prompts, found[name])
    complete = [
        Match(index, prompt, {name: found[name].texts[index] for name in SIDES})
        for index, prompt in enumerate(prompts)
        if index not in left_out
    ]
    counts = _judge_missing(complete, judge, folder, tell)
    left_out |= _left_out(counts.pop("failures"), len(complete), "prompts' verdicts", allow_failures)
    matches = [match for match in complete if match.index not in left_out]
    if not matches:
        raise ValueError(f"no prompt has both answers and both verdicts; first: {next(iter(left_out.values()))}")
    summary = {
        **{name: about[name] | {"num_cut": found[name].num_cut} for name in SIDES},
        **counts,
        "left_out": len(left_out),
        **summarise(matches, folder.rows, confidence=confidence, num_resamples=num_resamples, seed=seed),
    }
    folder.write(SUMMARY_FILE, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return summary


def _judge_missing(
    matches: Sequence[Match], load: Callable[[], Judge], folder: ComparisonFolder, tell: Progress
) -> dict:
    """Ask the judge for verdicts that the folder lacks; returns who judged, how many are new, and failures."""
    judge = load()
    folder.settle("judge", judge.about)
    # Identical answers tie. A score of theirs still tells what they are like; asking which is better is only costly.
    wanted = both_orders([match for match in matches if not (judge.sees_order and match.is_identical)])
    missing = [showing for showing in wanted if showing.key not in folder.rows]
    failures: dict[int, str] = {}
    for done, (showing, verdict) in enumerate(_asked(judge, missing), start=1):
        if isinstance(verdict, Failure):
            failures[showing.match.index] = verdict.reason
        else:
            folder.add(showing, verdict)
        tell("verdicts", len(wanted) - len(missing) + done, len(wanted))
    left = sum(showing.key not in folder.rows for showing in missing)
    unparsable = sum(folder.rows[s.key]["verdict"] == UNPARSABLE for s in wanted if s.key in folder.rows)
    if unparsable:
        logger.warning("%d of %d verdicts could not be read; each counts as a tie", unparsable, len(wanted))
    return {
        "judge": judge.about,
        "sees_order": judge.sees_order,
        "new_verdicts": len(missing) - left,
        "kept_verdicts": len(wanted) - len(missing),
        "failures": failures,
    }


def _asked(judge: Judge, showings: list[Showing]):
    return judge.judge(showings) if showings else ()


def _left_out(failures: Mapping[int, str], total: int, what: str, allow_failures: bool) -> Mapping[int, str]:
    """The failures, if they are allowed."""
    if not failures:
        return failures
    index, reason = next(iter(failures.items()))
    listed = f"{len(failures)} of {total} {what} are missing, first prompt {index}: {reason}"
    if not allow_failures:
        raise ValueError(
            f"{listed}. The others are kept: run the same command again to ask for the rest only, or pass "
            "--allow_failures to leave these prompts out"
        )
    logger.warning("%s; these prompts are left out", listed)
    return failures


def _write_answers(folder: ComparisonFolder, name: str, prompts: Sequence[Prompt], found: SideAnswers) -> None:
    """A side's answers in the format that the next comparison takes as a side."""
    rows = [{"prompt": prompts[index], "response": text} for index, text in sorted(found.texts.items())]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    folder.write(f"answers_{name}.jsonl", "".join(lines))
