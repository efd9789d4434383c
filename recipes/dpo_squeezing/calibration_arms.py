"""The runs that the findings are calibrated on, beside those of study.py, and which squeeze by construction."""

from collections.abc import Mapping

from rewritings import KINDS, OWN_ANSWERS, OWN_GOOD_ANSWERS
from study import BASE, Arm

# Options that leave DPO plain.
PLAIN = {"learning_rate", "max_steps"}
SFT_TERM = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 1]}


def at(rate: float, start: str = "sft", **options) -> Arm:
    """DPO at another learning rate than the study's 2e-4."""
    return Arm("dpo", start, {"learning_rate": rate} | options)


def sft(rate: float, steps: int, data: str = "pairs", start: str = BASE, **options) -> Arm:
    """SFT that keeps greedy answers, as the study's does not."""
    settings = {"learning_rate": rate, "max_steps": steps, "probe_samples": 8, "probe_sample_tokens": 32}
    return Arm("sft", start, settings | options, data)


# What the study's arms hardly ever do, and, for the page, how these were chosen.
HOW_CHOSEN = (
    "Chosen that falls without harm, loops and answers that are alike hardly occur in the study, so runs that "
    "somebody could really have were sought for each: SFT on answers of one template, from the base model and after "
    "SFT on the original wording; self-training on own greedy answers, all or only good ones; SFT on a handful of "
    "rows for long, and on one phrase that declines; SFT and DPO on chosen answers that are padded by saying their "
    "last words again; DPO on templated pairs, with and without an NLL term. They were picked by what the checker "
    "said of single runs of seeds 0 to 2, never by what was found in them; the test has other rates, lengths and "
    "starts. Tried and left out, since they gave none of the three, or less of it: DPO and SFT on reworded answers, "
    "new words preferred to the old ones, the best of eight own answers preferred to a bad one, answers said twice, "
    "DPO after extended SFT at 8e-4, padded pairs at 2e-4."
)
DEVELOPMENT_ARMS: dict[str, Arm] = {
    "sft_templated": sft(1e-3, 150, "templated"),
    "sft_then_templated": sft(3e-4, 100, "templated", "sft"),
    "sft_own_answers": sft(1e-3, 150, OWN_ANSWERS, "sft_short"),
    "sft_own_good_answers": sft(5e-4, 100, OWN_GOOD_ANSWERS, "sft_short"),
    "sft_few_rows": sft(1e-3, 300, dataset_num_rows=8),
    "sft_declined": sft(1e-3, 50, "declined"),
    "sft_padded": sft(1e-3, 100, "padded", "sft"),
    "dpo_templated": Arm("dpo", "sft", data="templated"),
    "dpo_templated_sft_term": Arm("dpo", "sft", SFT_TERM, "templated"),
    "dpo_padded": Arm("dpo", "sft", {"learning_rate": 1e-3}, "padded"),
}
TEST_ARMS: dict[str, Arm] = {
    "sft": Arm("sft"),
    "sft_low_rate": Arm("sft", options={"learning_rate": 3e-4}),
    "sft_high_rate": Arm("sft", options={"learning_rate": 3e-3}),
    "sft_long": Arm("sft", options={"max_steps": 400}),
    "sft_beside_the_point": Arm("sft", options={"sft_on": "chosen_and_other", "max_steps": 200}),
    "more_sft": Arm("sft", "sft", {"learning_rate": 4e-4, "max_steps": 100}),
    "dpo_5e-5": at(5e-5),
    "dpo_1e-4": at(1e-4),
    "dpo_1e-4_long": at(1e-4, max_steps=300),
    "dpo_4e-4": at(4e-4),
    "dpo_8e-4": at(8e-4),
    "dpo_after_long_sft": at(2e-4, "sft_long"),
    "dpo_from_base": at(4e-4, BASE),
    "dpo_on_policy": Arm("dpo", "sft", {"learning_rate": 4e-4}, data="on_policy"),
    "gate": at(4e-4, gate_dpo="token"),
    "dpop": at(4e-4, dpop_lambda=50),
    "sft_term": at(4e-4, **SFT_TERM),
    "cal": at(4e-4, cal_dpo=1),
    "sft_templated": sft(5e-4, 200, "templated"),
    "sft_then_templated": sft(5e-4, 60, "templated", "sft"),
    "sft_own_answers": sft(5e-4, 200, OWN_ANSWERS, "sft_low_rate"),
    "sft_own_good_answers": sft(3e-4, 150, OWN_GOOD_ANSWERS, "sft_low_rate"),
    "sft_few_rows": sft(5e-4, 400, dataset_num_rows=12),
    "sft_declined": sft(5e-4, 60, "declined"),
    "sft_padded": sft(5e-4, 200, "padded"),
    "dpo_templated": Arm("dpo", "sft", {"learning_rate": 1e-4, "max_steps": 200}, "templated"),
    "dpo_templated_sft_term": Arm("dpo", "sft", {"learning_rate": 1e-4, "max_steps": 200} | SFT_TERM, "templated"),
    "dpo_padded": Arm("dpo", "sft", {"learning_rate": 7e-4, "max_steps": 200}, "padded"),
}


def squeezes(arm: Arm, arms: Mapping[str, Arm]) -> bool | None:
    """Whether an arm squeezes by construction; None where that cannot be said."""
    if arm.method == "sft" or arm.data in KINDS:
        return None
    if arm.data == "on_policy" or "cal_dpo" in arm.options:
        return False
    start = arms.get(arm.start)
    if start is None or start.options.get("sft_on") == "both" or not set(arm.options) <= PLAIN:
        return None
    return True
