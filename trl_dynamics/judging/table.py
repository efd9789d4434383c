"""A comparison's summary for the terminal."""

from collections.abc import Mapping

from trl_dynamics.judging.match import SIDES, TIE, UNPARSABLE


def table(summary: Mapping, names: Mapping[str, str]) -> list[str]:
    """The summary for the terminal.

    Args:
        summary (`Mapping`): What [`compare`] returned.
        names (`Mapping[str, str]`): What `"A"` and `"B"` are called.
    """
    total, bias, size = summary["prompts"], summary["position_bias"], summary["lengths"]
    low, high = summary["interval"]
    lines = [f"{name}: {names[name]}" for name in SIDES] + [f"{'':<28}{'prompts':>8}{'share':>8}"]
    for label, key in (("A wins", "wins"), (TIE, "ties"), ("B wins", "losses")):
        lines.append(f"{label:<28}{summary[key]:>8}{summary[key] / total:>8.1%}")
    boot = summary["bootstrap"]
    lines += [
        f"win rate of A, (wins + ties/2)/prompts: {summary['win_rate']:.3f}, {100 * boot['confidence']:g}% interval "
        f"{low:.3f} to {high:.3f} (bootstrap over prompts, {boot['num_resamples']} resamples, seed {boot['seed']})",
        *(["the interval has no width because all prompts ended alike, not because it is certain"] * (low == high)),
        _position_line(summary, bias),
        "mean length: "
        + ", ".join(f"{s} {size['characters'][s]:.0f} characters ({size['words'][s]:.0f} words)" for s in SIDES),
        _rate_line("win rate of A among answers of similar length", size["similar"]),
        _rate_line("the longer answer of the other pairs wins", size["longer"]),
    ]
    # A side whose answers are all blank has no likelihood.
    for key in dict.fromkeys(name for side in SIDES for name in summary["numbers"][side]):
        means = {side: summary["numbers"][side].get(key) for side in SIDES}
        lines.append(f"mean {key}: " + ", ".join(f"{s} {'-' if m is None else f'{m:.3f}'}" for s, m in means.items()))
    counts = {
        "verdicts that could not be read, counted as ties": summary["verdicts"].get(UNPARSABLE, 0),
        "prompts with identical answers, which tie": summary["identical"],
        "prompts left out": summary["left_out"],
        "answers of A cut at max_new_tokens": summary["A"]["num_cut"],
        "answers of B cut at max_new_tokens": summary["B"]["num_cut"],
    }
    lines += [f"{what}: {count}" for what, count in counts.items() if count]
    return lines + [f"verdicts: {summary['new_verdicts']} new, {summary['kept_verdicts']} from before"]


def _position_line(summary: Mapping, bias: Mapping) -> str:
    if not summary["sees_order"]:
        return "position bias: none is possible, this judge scores each answer by itself"
    if bias["share"] is None:
        return "position bias: no prompt has two readable verdicts"
    order = summary["by_order"]
    return (
        f"position bias: for {bias['share']:.1%} of {bias['prompts']} prompts the verdict follows the place ("
        f"{bias['follows_first']} first, {bias['follows_second']} second); A gets {order['A_first']:.3f} shown first, "
        f"{order['B_first']:.3f} shown second"
    )


def _rate_line(what: str, found: Mapping) -> str:
    rate = "-" if found["win_rate"] is None else f"{found['win_rate']:.3f}"
    return f"{what}: {rate} ({found['prompts']} prompts)"
