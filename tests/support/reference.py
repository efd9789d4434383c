"""Slow, obvious references: one response at a time, the whole log-softmax; and models that compute in float64."""

import contextlib
import functools
import types

import torch


def score_slowly(model, encoded, star_ids=None, top_k=10) -> list[dict]:
    """What the engine must give: per response a dict of the record columns, plus `star_ids` and per-token `logp`."""
    rows = []
    with torch.no_grad():
        for index, item in enumerate(encoded.items):
            logits = model(torch.tensor([item.input_ids])).logits[0]
            logp_TV = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
            rows.append(_row(item, logp_TV, None if star_ids is None else star_ids[index], top_k))
    return rows


def _row(item, logp_TV, star_ids, top_k) -> dict:
    start, count = len(item.prompt_ids), len(item.response_ids)
    sums = dict.fromkeys(("logp", "prob", "argmax", "match", "entropy", "sum_sq", "top", "star", "rest"), 0.0)
    stars, per_token = [], []
    for offset, token in enumerate(item.response_ids):
        logp_V = logp_TV[start + offset - 1].double()
        others = logp_V.clone()
        others[token] = -torch.inf
        star = others.argmax().item() if star_ids is None else star_ids[offset]
        stars.append(star)
        per_token.append(logp_V[token].item())
        prob_V = logp_V.exp()
        sums["logp"] += logp_V[token].item()
        sums["prob"] += prob_V[token].item()
        sums["argmax"] += logp_V.max().item()
        sums["match"] += float(logp_V.argmax().item() == token)
        sums["entropy"] += -(prob_V * logp_V).sum().item()
        sums["sum_sq"] += (prob_V**2).sum().item()
        sums["top"] += prob_V.sort(descending=True).values[:top_k].sum().item()
        sums["star"] += logp_V[star].item()
        sums["rest"] += 1 - prob_V[token].item() - prob_V[star].item()
    return {
        "num_tokens": count,
        "logp_sum": sums["logp"],
        "logp_mean": sums["logp"] / count,
        "prob_mean": sums["prob"] / count,
        "argmax_logp_sum": sums["argmax"],
        "argmax_match_mean": sums["match"] / count,
        "entropy_mean": sums["entropy"] / count,
        "sum_sq_mean": sums["sum_sq"] / count,
        "topk_mass_mean": sums["top"] / count,
        "star_logp_sum": sums["star"],
        "rest_mass_mean": sums["rest"] / count,
        "eos_logp": torch.nan if item.eos_id is None else logp_TV[start + count - 1, item.eos_id].item(),
        "star_ids": stars,
        "logp": per_token,
    }


@contextlib.contextmanager
def true_float64(model):
    """The model in float64 throughout: neither its RMS norms nor its eager softmax pass through float32."""
    model.double()
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = types.MethodType(_plain_rms_norm, norm)
    softmax = torch.nn.functional.softmax
    torch.nn.functional.softmax = functools.partial(_plain_softmax, softmax)
    try:
        yield model
    finally:
        torch.nn.functional.softmax = softmax
        for norm in norms:
            del norm.forward


def _plain_softmax(softmax, scores, *args, dtype=None, **kwargs):
    return softmax(scores, *args, dtype=None if scores.dtype == torch.float64 else dtype, **kwargs)


def _plain_rms_norm(norm, hidden):
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    scaled = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
    return scaled * (1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight)
