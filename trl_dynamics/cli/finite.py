"""Answers whose numbers are not finite: counted, said in one line, and an exit status of their own."""

import sys

# 1 and 2 are what every command ends with after an error or wrong usage, 3 is diagnose's for a run it cannot judge.
NOT_FINITE = 4


def exit_status(command: str, not_finite: int, total: int, where: str) -> int:
    """0, or where there are answers that are not finite a line on stderr and [`NOT_FINITE`].

    Args:
        command (`str`): Its name, as on the command line.
        not_finite, total (`int`): Answers.
        where (`str`): What has their numbers.
    """
    if not not_finite:
        return 0
    print(
        f"trl-dynamics {command}: error: {not_finite} of {total} answers are not finite (NaN or infinite); {where} "
        "has them as they are. Look for NaN in the model's weights, or score in float32",
        file=sys.stderr,
    )
    return NOT_FINITE
