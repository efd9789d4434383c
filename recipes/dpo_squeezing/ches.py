"""Claim C16: does CHES tell, before any training, which chosen answers one step of DPO displaces most?

    python recipes/dpo_squeezing/ches.py --model embedded --num_pairs 200 --seed 0 --output_dir runs/ches

Each pair by itself: one SGD step of DPO's sigmoid loss on that pair alone (`own`), from the same weights every time;
and one step on the mean loss of all pairs (`all`). The reference is the model itself. Measured: -Delta ln pi(y+|x) in
nats, without the end-of-turn token, which CHES leaves out too (the loss counts it, as TRL's does). Written: ches.csv,
a row per pair, and ches.md, rank correlations with 95 % bootstrap intervals over pairs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import trl
from torch import nn

from trl_dynamics import embedded, loading, stats_head
from trl_dynamics.cli import inputs, sources
from trl_dynamics.cli.probes.screen import ScreenArguments
from trl_dynamics.ops import preference
from trl_dynamics.probing.encode import EncodedProbes, EncodedResponse, LengthLimits, encode
from trl_dynamics.probing.layouts import PaddedLayout, ProbeBatch
from trl_dynamics.probing.rows import Pair, read_pairs
from trl_dynamics.probing.schema import Probe, ProbeSet
from trl_dynamics.tokens import displacement

# Rates of plain SGD for the embedded model: the change is linear in the rate; the margin of the pair stepped on gains
# some nats, as in a real step; the first pairs are displaced. Other models need other rates, so look at the margins.
RATES = (0.001, 0.03, 1.0)
NUM_RESAMPLES, THRESHOLD = 1000, 0.3
SCORES = ("ches", "ches_normalized", "jaccard", "num_chosen", "minus_logp_rejected", "last_hidden", "head_form")
LENGTHS = ("num_chosen", "num_rejected")
EncodedPair = tuple[EncodedResponse, EncodedResponse]


def main(argv: list[str] | None = None) -> None:
    """Score and step every pair of one model; write the table and the values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="'embedded', or a folder")
    parser.add_argument(
        "--dataset", default="embedded", help="pairs: 'embedded' (those of the seed), a file or folder"
    )
    parser.add_argument("--num_pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the embedded pairs and of the bootstrap")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="of SGD")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max_prompt_length", type=int)
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ches"))
    args = parser.parse_args(argv)
    path = sources.find_model(args.model)
    model = loading.load_causal_lm(path, dtype="float32")
    stats_head.install(model)
    context = loading.context_length(path)
    limits = LengthLimits(args.max_prompt_length, args.max_length or context, context)
    tokenizer = loading.load_tokenizer(path)
    items = encode(ProbeSet(tuple(probes_of(args))), tokenizer, limits, loading.end_ids(path)).items
    pairs = list(zip(items[0::2], items[1::2], strict=True))
    began = time.perf_counter()
    frame = pd.concat([scores(model, pairs), changes(model, pairs, args.rates, args.beta)], axis=1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.output_dir / "ches.csv", index_label="pair")
    head = f"# CHES and one step of DPO: {args.model}, {len(frame)} pairs, seed {args.seed}, beta {args.beta:g}"
    lines = [head, "", f"{time.perf_counter() - began:.0f} s.", "", *tables(frame, np.random.default_rng(args.seed))]
    (args.output_dir / "ches.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


def probes_of(args: argparse.Namespace) -> Iterator[Probe]:
    """The usable ones of the first `num_pairs` rows."""
    if args.dataset == sources.EMBEDDED:
        rows = embedded.preference_rows(args.num_pairs, args.seed)
    else:
        splits = inputs.load_splits(ScreenArguments(dataset_name=args.dataset), trl.DatasetMixtureConfig())
        rows = inputs.take_split(splits, "train")
        rows = rows.select(range(min(args.num_pairs, len(rows))))
    for index, pair in enumerate(read_pairs(rows)):
        if isinstance(pair, Pair):
            yield Probe(str(index), pair.prompt, {"chosen": pair.chosen, "rejected": pair.rejected})


def scores(model: nn.Module, pairs: list[EncodedPair]) -> pd.DataFrame:
    """What is known of each pair before training; every score is larger where more displacement is expected."""
    rows = []
    for chosen, rejected in pairs:
        sums = displacement.score_responses(model, batch_of((chosen, rejected)), 2)
        hidden_PD, lengths_P = sums.hidden_ID[:, None], sums.num_tokens_I[:, None]
        words = [set(answer.response_ids) for answer in (chosen, rejected)]
        last = [last_state(model, answer) for answer in (chosen, rejected)]
        rows.append(
            {
                "ches": float(displacement.ches(*hidden_PD)),
                "ches_normalized": float(displacement.ches_normalized(*hidden_PD, *lengths_P)),
                "jaccard": len(words[0] & words[1]) / len(words[0] | words[1]),
                "num_chosen": len(chosen.response_ids),
                "num_rejected": len(rejected.response_ids),
                "minus_logp_rejected": -float(sums.logp_sum_I[1]),
                "last_hidden": float(last[0] @ last[1]),
                "head_form": head_form(model, chosen, rejected),
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def last_state(model: nn.Module, answer: EncodedResponse) -> torch.Tensor:
    """The final hidden state (D,) after the answer's last token before its end of turn, float64."""
    ids = torch.tensor([answer.prompt_ids + answer.response_ids])
    return model.base_model(input_ids=ids).last_hidden_state[0, -1].double()


@torch.no_grad()
def head_form(model: nn.Module, chosen: EncodedResponse, rejected: EncodedResponse) -> float:
    """What CHES becomes when it also weighs how alike two tokens' errors are; 2 / beta times the slope of the own step
    if an untied LM head alone is trained.

    The sum of <g, g'> <h, h'> over tokens of y+ and y-, less that over tokens of y+ twice, with g = e_y - pi and h the
    state that predicts y. CHES is this with every <g, g'> set to 1.
    """
    (h_ND, g_NV), (other_ND, other_NV) = (_states_and_errors(model, answer) for answer in (chosen, rejected))
    own = slice(len(chosen.response_ids))
    alike, itself = ((g_NV[own] @ g.T) * (h_ND[own] @ h.T) for g, h in ((other_NV, other_ND), (g_NV, h_ND)))
    return float(alike.sum() - itself.sum())


def _states_and_errors(model: nn.Module, answer: EncodedResponse) -> tuple[torch.Tensor, torch.Tensor]:
    ids, num_prompt = torch.tensor([answer.input_ids]), len(answer.prompt_ids)
    h_ND = model.base_model(input_ids=ids).last_hidden_state[0, num_prompt - 1 : -1]
    prob_NV = model.get_output_embeddings()(h_ND).softmax(-1)
    return h_ND, nn.functional.one_hot(ids[0, num_prompt:], prob_NV.shape[1]) - prob_NV


def batch_of(pair: EncodedPair) -> ProbeBatch:
    """Both answers of a pair as one batch; item 0 is chosen."""
    (batch,) = PaddedLayout(2).batches(EncodedProbes(pair))
    return batch


def changes(model: nn.Module, pairs: list[EncodedPair], rates: list[float], beta: float) -> pd.DataFrame:
    """-Delta ln pi(y+|x) of each pair after one step of each kind, nats; the weights are put back.

    Columns: `own/RATE` and `all/RATE`, the same with `/per_token`, and `margin/RATE`, by how much the own step widens
    ln pi(y+) - ln pi(y-). `slope`: what own/RATE is per unit of the rate as that goes to 0.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    mean_gradient = [torch.zeros_like(parameter) for parameter in parameters]
    batches, rows = [batch_of(pair) for pair in pairs], []
    before = [displacement.score_responses(model, batch, 2).logp_sum_I for batch in batches]
    for batch, old_I in zip(batches, before, strict=True):
        gradient, slope = pair_gradient(model, batch, parameters, beta)
        for total, part in zip(mean_gradient, gradient, strict=True):
            total += part / len(pairs)
        row = {"slope": slope}
        for rate in rates:
            step(parameters, start, gradient, rate)
            delta_I = displacement.score_responses(model, batch, 2).logp_sum_I - old_I
            row |= {f"own/{rate:g}": -float(delta_I[0]), f"margin/{rate:g}": float(delta_I[0] - delta_I[1])}
        step(parameters, start, gradient, 0.0)
        rows.append(row)
    for rate in rates:
        step(parameters, start, mean_gradient, rate)
        for row, batch, old_I in zip(rows, batches, before, strict=True):
            row[f"all/{rate:g}"] = float((old_I - displacement.score_responses(model, batch, 2).logp_sum_I)[0])
    step(parameters, start, mean_gradient, 0.0)
    frame = pd.DataFrame(rows)
    lengths = np.array([len(chosen.response_ids) for chosen, _ in pairs])
    for name in outcomes(frame):
        frame[f"{name}/per_token"] = frame[name] / lengths
    return frame


def pair_gradient(
    model: nn.Module, batch: ProbeBatch, parameters: list[nn.Parameter], beta: float
) -> tuple[list[torch.Tensor], float]:
    """Gradient of DPO's loss on one pair at the reference itself, and its product with that of ln pi(y+|x)."""
    logits_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logp_NV = logits_BTV[batch.rows_N, batch.cols_N].log_softmax(-1)
    logp_N = logp_NV.gather(1, batch.target_N[:, None])[:, 0]
    logp_I = torch.zeros(2, dtype=logp_N.dtype).index_add(0, batch.item_N, logp_N)
    ratio_I = logp_I - logp_I.detach()
    measured = logp_N[(batch.item_N == 0) & ~batch.is_eos_mask_N].sum()
    observed = torch.autograd.grad(measured, parameters, retain_graph=True)
    gradient = torch.autograd.grad(preference.dpo(*ratio_I, beta), parameters)
    return list(gradient), sum(float((a * b).sum()) for a, b in zip(observed, gradient, strict=True))


@torch.no_grad()
def step(parameters: list[nn.Parameter], start: list[torch.Tensor], gradient: list[torch.Tensor], rate: float) -> None:
    """Set the weights to `start - rate * gradient`."""
    for parameter, value, direction in zip(parameters, start, gradient, strict=True):
        parameter.copy_(value - rate * direction)


def outcomes(frame: pd.DataFrame) -> list[str]:
    """The columns of summed changes."""
    return [name for name in frame if name.startswith(("own/", "all/")) and not name.endswith("per_token")]


def rank_correlation(first_RN: np.ndarray, second_RN: np.ndarray, controls: tuple[np.ndarray, ...] = ()) -> np.ndarray:
    """Spearman's correlation of each row, (R,); given controls (R, N), of what their ranks do not explain linearly.

    Shapes: R resamples, N pairs; NaN where a column is constant.
    """
    ranks = [pd.DataFrame(values_RN.T).rank().to_numpy().T for values_RN in (first_RN, second_RN, *controls)]
    ranks = [rank_RN - rank_RN.mean(-1, keepdims=True) for rank_RN in ranks]
    if controls:
        controls_RNC = np.stack(ranks[2:], axis=-1)
        fit = np.linalg.pinv(controls_RNC)
        ranks = [rank - (controls_RNC @ (fit @ rank[..., None]))[..., 0] for rank in ranks[:2]]
    a_RN, b_RN = ranks
    with np.errstate(invalid="ignore"):
        return (a_RN * b_RN).sum(-1) / np.sqrt((a_RN**2).sum(-1) * (b_RN**2).sum(-1))


def interval(frame: pd.DataFrame, names: tuple[str, ...], rng: np.random.Generator) -> tuple[float, float, float]:
    """Rank correlation of the first two columns given the others, with a 95 % percentile interval over pairs."""
    values = [frame[name].to_numpy(float) for name in names]
    index_RN = rng.integers(len(frame), size=(NUM_RESAMPLES, len(frame)))

    def of(pick: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        first, second, *controls = map(pick, values)
        return rank_correlation(first, second, tuple(controls))

    low, high = np.nanquantile(of(lambda column: column[index_RN]), [0.025, 0.975])
    return float(of(lambda column: column[None])[0]), float(low), float(high)


def tables(frame: pd.DataFrame, rng: np.random.Generator) -> list[str]:
    """Markdown: how far each step moves, and every score's rank correlation with the change, whole and per token."""
    names = outcomes(frame)
    lines = [*_header("step", ["pairs displaced", "median -Delta, nats", "10 to 90 %", "median margin gained"])]
    for name in names:
        low, median, high = frame[name].quantile([0.1, 0.5, 0.9])
        margin = f"margin/{name.split('/')[1]}"
        gained = f"{frame[margin].median():+.3g}" if name.startswith("own/") else "-"
        lines.append(
            _row(name, [f"{(frame[name] > 0).mean():.0%}", f"{median:+.3g}", f"{low:+.3g} to {high:+.3g}", gained])
        )
    for suffix, title in (("", "the answer's -Delta ln pi(y+)"), ("/per_token", "-Delta ln pi(y+) per token")):
        lines += ["", f"Spearman with {title} [95 % interval], bold if all of it is above {THRESHOLD:g}:", ""]
        lines += _header("score", names)
        for score in SCORES:
            cells = [interval(frame, (score, name + suffix), rng) for name in names]
            lines.append(_row(score, map(_shown, cells)))
        for score in (score for score in SCORES if score not in LENGTHS):
            cells = [interval(frame, (score, name + suffix, *LENGTHS), rng) for name in names]
            lines.append(_row(f"{score}, given both lengths", map(_shown, cells)))
    return lines


def _shown(cell: tuple[float, float, float]) -> str:
    value, low, high = cell
    mark = "**" if low > THRESHOLD else ""
    return f"{mark}{value:+.2f}{mark} [{low:+.2f}, {high:+.2f}]"


def _header(first: str, heads: list[str]) -> list[str]:
    return [_row(first, heads), _row("---", ["---"] * len(heads))]


def _row(first: str, cells) -> str:
    return f"| {' | '.join([first, *cells])} |"


if __name__ == "__main__":
    main()
