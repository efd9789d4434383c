"""The embedded world's own checker as judge: fact before grammar before style."""

from collections.abc import Iterable, Sequence

from trl_dynamics.embedded.world import check_answer
from trl_dynamics.judging.match import prompt_text
from trl_dynamics.judging.scores import Score
from trl_dynamics.probing.schema import Prompt


class WorldChecker:
    """Knows the facts of the world and the grammar of its answers; see [`embedded.check_answer`].

    An answer that is true to the record beats one that is not, a well-formed one beats one that is not, and among
    equals the preferred style wins; answers alike in all three tie.

    Args:
        prompts (`Iterable[Prompt]`): Questions of the world.

    Raises:
        ValueError: If one is none.
    """

    about = {"by": "fact, then grammar, then style"}

    def __init__(self, prompts: Iterable[Prompt] = ()):
        for prompt in prompts:
            check_answer(prompt_text(prompt), "")

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """4 for the right fact, 2 for grammar, 1 for the preferred style, added up."""
        return [_score(prompt, text) for prompt, text in items]


def _score(prompt: Prompt, text: str) -> Score:
    check = check_answer(prompt_text(prompt), text.strip())
    numbers = {
        "fact_right": float(check.fact_right),
        "grammatical": float(check.grammatical),
        "preferred": float(check.preferred),
    }
    return Score(4 * check.fact_right + 2 * check.grammatical + check.preferred, numbers)
