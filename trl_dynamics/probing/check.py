"""Whether a probe set is fit for a model's tokenizer: boundaries, lengths, ends, repetitions and leakage."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from transformers import PreTrainedTokenizerBase

from trl_dynamics.probing.encode import EncodedResponse, LengthLimits, encode_response, find_seam
from trl_dynamics.probing.schema import Probe, ProbeSet, order_types

# Findings of one kind that are told in full.
MOST_SHOWN = 3


@dataclass
class CheckReport:
    """What was found: `errors` make the numbers wrong, `warnings` may be wanted; each kind maps to its cases.

    `lengths` holds, per response type, the number of responses and the mean, median and greatest number of response
    tokens (without the end-of-turn token), and how many responses were cut.
    """

    errors: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)

    def error(self, kind: str, case: str) -> None:
        self.errors.setdefault(kind, []).append(case)

    def warn(self, kind: str, case: str) -> None:
        self.warnings.setdefault(kind, []).append(case)

    def lines(self) -> list[str]:
        """The findings as text, the first few cases of each kind."""
        lines = []
        for level, findings in (("error", self.errors), ("warning", self.warnings)):
            for kind, cases in findings.items():
                lines.append(f"{level}: {kind} ({len(cases)})")
                lines += [f"    {case}" for case in cases[:MOST_SHOWN]]
                if len(cases) > MOST_SHOWN:
                    lines.append(f"    and {len(cases) - MOST_SHOWN} more")
        return lines or ["no findings"]


def check(
    probe_set: ProbeSet,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits = LengthLimits(),
    end_ids: Sequence[int] = (),
    held_out: ProbeSet | None = None,
) -> CheckReport:
    """All findings on a probe set.

    Args:
        probe_set ([`ProbeSet`]): What would be tracked.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model that would be tracked.
        limits ([`LengthLimits`], *optional*): As in training.
        end_ids (`Sequence[int]`, *optional*): End-of-turn token ids besides the tokenizer's EOS.
        held_out ([`ProbeSet`], *optional*): A set over prompts that are not trained on; nothing may be in both.
    """
    report = CheckReport()
    if tokenizer.eos_token_id is None:
        report.error("the tokenizer has no EOS token, which ends every response", "set tokenizer.eos_token")
        return report
    encoded = []
    for probe in probe_set:
        for name in order_types(probe.responses):
            item = _check_response(probe, name, tokenizer, limits, {tokenizer.eos_token_id, *end_ids}, report)
            encoded += [item] if item else []
    report.lengths = _lengths(encoded)
    _check_repetitions(probe_set, report)
    _check_leakage(probe_set, held_out, report)
    return report


def _check_response(
    probe: Probe,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: LengthLimits,
    ends: set[int],
    report: CheckReport,
) -> EncodedResponse | None:
    where = f"probe {probe.probe_id!r}, response {name!r}"
    try:
        item = encode_response(probe, name, tokenizer, limits, ends)
    except ValueError as error:
        report.error("a response cannot be scored", str(error))
        return None
    if case := seam_case(probe, name, tokenizer):
        report.error("prompt and response share a token, so part of the prompt is scored as response", case)
    if item.prompt_cut:
        report.warn("the prompt is cut", where)
    if item.response_cut:
        report.warn("the response is cut", where)
    if item.eos_id is None and not item.response_cut:
        report.warn("the chat template ends the response with no end-of-turn token, so its end is not scored", where)
    if num_unknown := sum(token == tokenizer.unk_token_id for token in item.response_ids):
        case = f"{where}: {num_unknown} of {len(item.response_ids)} tokens"
        report.warn(f"a response has letters that the tokenizer only knows as {tokenizer.unk_token!r}", case)
    special = next((token for token in tokenizer.all_special_tokens if token in probe.responses[name]), None)
    if special is not None:
        report.error("a response holds a special token, which may end it early", f"{where}: {special!r}")
    return item


def seam_case(probe: Probe, name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How a prompt's end and a response's start become other tokens together; None if they stay as they are."""
    seam = find_seam(probe, name, tokenizer)
    if seam is None:
        return None
    return (
        f"probe {probe.probe_id!r}, response {name!r}: the prompt ends with the tokens {list(seam.prompt_tokens)}, "
        f"which become {list(seam.joined_tokens)} when the response follows"
    )


def _check_repetitions(probe_set: ProbeSet, report: CheckReport) -> None:
    prompts = Counter(_text(probe.prompt) for probe in probe_set)
    for probe in probe_set:
        if prompts[_text(probe.prompt)] > 1:
            report.warn("a prompt stands in several probes", f"probe {probe.probe_id!r}")
        by_text: dict[str, str] = {}
        for name in order_types(probe.responses):
            text = probe.responses[name].strip()
            if text in by_text:
                # Own answers may well repeat each other; that chosen is rejected cannot be meant.
                found = report.error if (by_text[text], name) == ("chosen", "rejected") else report.warn
                found(
                    "two responses of a probe are the same", f"probe {probe.probe_id!r}: {by_text[text]!r}, {name!r}"
                )
            by_text.setdefault(text, name)
            if text == _text(probe.prompt).strip():
                report.warn("a response repeats its prompt", f"probe {probe.probe_id!r}, response {name!r}")


def _check_leakage(probe_set: ProbeSet, held_out: ProbeSet | None, report: CheckReport) -> None:
    trained = {probe.responses["chosen"].strip(): probe.probe_id for probe in probe_set if "chosen" in probe.responses}
    for probe in probe_set:
        other = probe.responses.get("other_test", "").strip()
        if other in trained:
            case = f"probe {probe.probe_id!r}: it is the chosen response of probe {trained[other]!r}"
            report.error("other_test is no held-out answer", case)
    if held_out is None:
        return
    prompts = {_text(probe.prompt).strip() for probe in probe_set}
    for probe in held_out:
        if _text(probe.prompt).strip() in prompts:
            report.error("a held-out prompt is probed as a training prompt", f"held-out probe {probe.probe_id!r}")
        answer = probe.responses.get("chosen", "").strip()
        if answer in trained:
            case = f"held-out probe {probe.probe_id!r}: chosen of probe {trained[answer]!r}"
            report.warn("a held-out answer is a training answer", case)


def _lengths(encoded: Sequence[EncodedResponse]) -> dict[str, dict[str, float]]:
    lengths = {}
    for name in order_types(item.response_type for item in encoded):
        items = [item for item in encoded if item.response_type == name]
        tokens = [len(item.response_ids) for item in items]
        lengths[name] = {
            "responses": len(items),
            "mean_tokens": mean(tokens),
            "median_tokens": median(tokens),
            "max_tokens": max(tokens),
            "cut": sum(item.response_cut for item in items),
        }
    return lengths


def _text(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
