"""The chapter of learning paths and squeezing: what was scored of a probe set."""

from trl_dynamics.findings.chapter import Chapter, Overview
from trl_dynamics.paths.changes import Changes
from trl_dynamics.paths.comparison import compare_comparable
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.live import LivePaths
from trl_dynamics.paths.pairs import paired
from trl_dynamics.paths.rules.registry import RULES, calm_text
from trl_dynamics.paths.summary import Summary, summarise_store
from trl_dynamics.store.store import DynamicsStore


def open_paths(store: DynamicsStore) -> dict[str, Summary]:
    """Model -> what its records say; models that were scored once each are ends of one training.

    Raises:
        ValueError: If records are damaged, or of a newer version.
    """
    return paired(summarise_store(store), store.read_meta()) if store.steps(RECORDS) else {}


def overview(summary: Summary) -> Overview:
    """What was scored of a model, and what moved."""
    steps, calm = summary.steps, calm_text(summary)
    if len(steps) < 2:
        scope = f"one step was scored ({steps[0]}): there is no change to judge"
        return Overview(scope, calm, lack="One step was scored: there is no change to judge.", scored=steps)
    scope = f"{len(steps)} probing steps, {steps[0]} to {steps[-1]}"
    if summary.compared_with is not None:
        scope = f"judged as the end (step 1) of a training that began at {summary.compared_with} (step 0)"
    moved = moved_text(summary.changes())
    return Overview(scope, calm, moved=moved, scored=steps, compared_with=summary.compared_with)


def moved_text(changes: Changes) -> str:
    """What moved between two steps, as a sentence."""
    known = {
        "chosen": changes.chosen,
        "rejected": changes.rejected,
        "other fluent answers": changes.bystanders,
        "the likeliest token along chosen": changes.argmax,
    }
    moved = ", ".join(f"{label} {effect}" for label, effect in known.items() if effect.known)
    finite, number = changes.num_finite
    if finite < number:
        moved += f"; over {finite} of {number} probes, which are finite at both ends" * bool(moved)
    return f"Moved since the start, nats per token: {moved or 'nothing that was scored and finite at both ends'}."


CHAPTER: Chapter[Summary] = Chapter(
    name="paths",
    kinds=(RECORDS, SAMPLES),
    open=open_paths,
    rules=RULES,
    overview=overview,
    sections="trl_dynamics.paths.page.sections:SECTIONS",
    live=LivePaths,
    compare=compare_comparable,
)
