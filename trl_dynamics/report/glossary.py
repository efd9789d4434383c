"""What the words on the page mean: those that all chapters share, then the words and the metrics of each."""

from trl_dynamics import chapters
from trl_dynamics.drawing.terms import Term

GENERAL: tuple[Term, ...] = (
    Term("probe set", "A fixed set of prompts, each with responses of several types, scored again and again."),
    Term("probe", "One prompt of the probe set with its responses."),
    Term("response type", "The role of a response, e.g. chosen, rejected, a paraphrase, an unrelated answer."),
    Term(
        "nat", "Unit of log-probability with the natural logarithm: −0.69 nats halves a probability, +0.69 doubles it."
    ),
    Term(
        "change since start",
        "Value now minus value at the first recorded step, probe by probe, then averaged.",
        "mean over probes of value(step) − value(first step)",
    ),
    Term("band", "The 10 % to 90 % quantile over probes: where four out of five probes lie."),
    Term("±", "Standard error of a mean over probes. It says nothing about other seeds or other data."),
)


def terms() -> tuple[Term, ...]:
    """Every term of the glossary, in its order."""
    sections = [chapters.load(chapter.sections) for chapter in chapters.load_all()]
    words = [term for one in sections for term in one.words]
    return (*GENERAL, *words, *(term for one in sections for term in one.metrics))
