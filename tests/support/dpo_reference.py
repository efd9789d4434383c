"""DPO and its variants, slowly: one answer at a time from plain logits, one pair at a time, in float64."""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Answer:
    """One row of a batch: log-probabilities of its completion's tokens with their graph, and the distributions."""

    logp: torch.Tensor
    prob_TV: torch.Tensor

    @property
    def probs(self) -> list[float]:
        return self.logp.detach().exp().tolist()


def answers(model, inputs: dict) -> list[Answer]:
    """Chosen rows first, then rejected ones, as in the batch; every row runs alone and without padding."""
    found = []
    for ids, attended, completion in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True
    ):
        length = int(attended.sum())
        logp_TV = model(ids[None, :length]).logits[0].double().log_softmax(dim=-1)
        positions = [t for t in range(1, length) if completion[t]]
        logp = torch.stack([logp_TV[t - 1, ids[t]] for t in positions])
        found.append(Answer(logp, logp_TV[[t - 1 for t in positions]].detach().exp()))
    return found


def gated(row: torch.Tensor, on: str, alpha: float, tau: float) -> torch.Tensor:
    """The same values, whose gradient is weighed by the gate: w ln p + (1 - w) ln p without gradient."""
    probs = row.detach().exp().tolist()
    estimate = {
        "token": lambda t: probs[t],
        "sequence": lambda t: math.prod(probs) ** (1 / len(probs)),
        "q10": lambda t: float(np.quantile(probs, 0.1)),
    }[on]
    weights = [1 / (1 + math.exp(-alpha * (estimate(t) - tau))) for t in range(len(probs))]
    return torch.stack([w * logp + (1 - w) * logp.detach() for w, logp in zip(weights, row, strict=True)])


def log_ratio(row: torch.Tensor, reference: torch.Tensor, other_length: int, ld_alpha: float | None) -> torch.Tensor:
    """ln pi - ln pi_ref of an answer; with `ld_alpha`, tokens past the other answer's length count by that."""
    total = 0.0
    for t, (logp, ref) in enumerate(zip(row, reference, strict=True)):
        total = total + (logp - ref.detach()) * (ld_alpha if ld_alpha is not None and t >= other_length else 1.0)
    return total


def sigmoid_pair(chosen, rejected, beta, dpop_lambda=0.0, factor=1.0, cal_dpo=None) -> torch.Tensor:
    """The loss that takes the place of DPO's, for one pair of log-ratios."""
    if cal_dpo is not None:
        squares = (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
        return -torch.log(1 / (1 + torch.exp(-(chosen - rejected)))) + cal_dpo * squares
    margin = chosen - factor * rejected
    if chosen < 0:
        margin = margin - dpop_lambda * -chosen
    return -torch.log(1 / (1 + torch.exp(-beta * margin)))


def loss(policy: list[torch.Tensor], reference: list[torch.Tensor], options: dict, factor: float) -> torch.Tensor:
    """The mean loss of a batch of answers under the options of a config; `factor` is DPO-Shift's at this step."""
    num_pairs, beta = len(policy) // 2, options.get("beta", 0.1)
    types = options.get("loss_type", ["sigmoid"])
    total = 0.0
    for pair in range(num_pairs):
        chosen_row, rejected_row = policy[pair], policy[pair + num_pairs]
        if options.get("gate_dpo"):
            gate = options.get("gate_alpha", 30.0), options.get("gate_tau", 0.1)
            rejected_row = gated(rejected_row, options["gate_dpo"], *gate)
        lengths, ld_alpha = (len(chosen_row), len(rejected_row)), options.get("ld_alpha")
        chosen = log_ratio(chosen_row, reference[pair], lengths[1], ld_alpha)
        rejected = log_ratio(rejected_row, reference[pair + num_pairs], lengths[0], ld_alpha)
        for kind, weight in zip(types, options.get("loss_weights", [1.0] * len(types)), strict=True):
            if kind == "sigmoid":
                one = sigmoid_pair(
                    chosen, rejected, beta, options.get("dpop_lambda", 0.0), factor, options.get("cal_dpo")
                )
            elif kind == "ipo":
                one = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
            elif kind == "sft":
                one = -torch.cat(policy[:num_pairs]).mean()
            total = total + weight * one / num_pairs
    return total


def risk(rows: list[Answer], gradients: list[torch.Tensor], num_pairs: int, valley_prob: float) -> dict[str, float]:
    """The gauge of one micro-batch, term by term; `gradients` are those of the loss by each answer's tokens."""
    sides = {"chosen": range(num_pairs), "rejected": range(num_pairs, 2 * num_pairs)}
    found = {}
    for side, indices in sides.items():
        energies = [num_pairs * gradients[i].abs().sum().item() / len(rows[i].logp) for i in indices]
        found[f"{side}/energy"] = sum(energies) / num_pairs
        squares = []
        for i in indices:
            for p, prob_V in zip(rows[i].probs, rows[i].prob_TV, strict=True):
                squares.append(1 - 2 * p + (prob_V**2).sum().item())
        found[f"{side}/residual_norm"] = math.sqrt(sum(squares) / len(squares))
    probs = [p for i in sides["rejected"] for p in rows[i].probs]
    found["rejected/geometric_prob"] = math.exp(sum(map(math.log, probs)) / len(probs))
    found["rejected/valley_share"] = sum(p < valley_prob for p in probs) / len(probs)
    return {f"squeeze_risk/{name}": value for name, value in found.items()}
