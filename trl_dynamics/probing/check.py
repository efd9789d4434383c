"""Whether a probe set is fit for a model's tokenizer: boundaries, lengths, ends, repetitions and leakage."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from transformers import PreTrainedTokenizerBase

from trl_dynamics.probing.chat import shorten, tokenizer_of
from trl_dynamics.probing.encode import NO_EOS, EncodedResponse, Encoder, LengthLimits, doubled_bos, find_seam
from trl_dynamics.probing.prompts import SharedTokenError, where_of
from trl_dynamics.probing.schema import Probe, ProbeSet, order_types

# How many findings of one kind are printed; of those that training refuses, all are.
MOST_SHOWN = 3
UNSCORABLE = "a response cannot be scored"
SHARED = "prompt and response share a token, so part of the prompt is scored as response"


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
        """The findings as text: all responses that training refuses, and the first few cases of each other kind."""
        lines = []
        for level, findings in (("error", self.errors), ("warning", self.warnings)):
            for kind, cases in findings.items():
                lines.append(f"{level}: {kind} ({len(cases)})")
                shown = len(cases) if kind in (UNSCORABLE, SHARED) else MOST_SHOWN
                lines += [f"    {case}" for case in cases[:shown]]
                if len(cases) > shown:
                    lines.append(f"    and {len(cases) - shown} more")
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
    if tokenizer_of(tokenizer).eos_token_id is None:
        report.error("the tokenizer has no EOS token, which ends every response", NO_EOS)
        return report
    encoder, encoded = Encoder(tokenizer, limits, end_ids), []
    for probe in probe_set:
        _check_prompt(probe, encoder, report)
        for name in order_types(probe.responses):
            item = _check_response(probe, name, encoder, report)
            encoded += [item] if item else []
    report.lengths = _lengths(encoded)
    _check_repetitions(probe_set, report)
    _check_leakage(probe_set, held_out, report)
    return report


def _check_prompt(probe: Probe, encoder: Encoder, report: CheckReport) -> None:
    where, tokenizer = f"probe {probe.probe_id!r}", encoder.tokenizer
    try:
        ids = encoder.prompts.ids(probe.prompt, where)
        history = encoder.prompts.frame(probe.prompt, where).history if probe.is_conversational else None
    except ValueError:
        return  # every response of it is an error as well
    if doubled_bos(ids, tokenizer.bos_token_id):
        case = f"{where}: the tokenizer adds {tokenizer.bos_token!r} to the one in the prompt; leave it out there"
        report.error("a prompt starts with two BOS tokens", case)
    for message in probe.prompt if probe.is_conversational else ():
        if message["content"].strip() not in history:
            case = f"{where}, message of the {message['role']}: {shorten(message['content'])}"
            report.warn("the chat template does not write a message of the prompt as it is", case)


def _check_response(probe: Probe, name: str, encoder: Encoder, report: CheckReport) -> EncodedResponse | None:
    where, tokenizer = where_of(probe, name), encoder.tokenizer
    try:
        item, seam = encoder.response(probe, name), encoder.prompts.seam(probe, name)
    except ValueError as error:
        if isinstance(error, SharedTokenError):
            report.error(SHARED, error.case)
        else:
            report.error(UNSCORABLE, str(error))
        return None
    if seam:
        report.warn("prompt and response share white space in a token", f"{where}: {seam.text}")
    if item.prompt_cut:
        report.warn("the prompt is cut", where)
    if item.response_cut and item.eos_id is not None:
        end = tokenizer.decode([item.eos_id])
        report.error("a response holds a special token, which may end it early", f"{where}: {end!r}")
    elif item.response_cut:
        report.warn("the response is cut", where)
    elif special := next((token for token in tokenizer.all_special_tokens if token in probe.responses[name]), None):
        report.warn("a response holds a special token", f"{where}: {special!r}")
    if item.eos_id is None and not item.response_cut:
        report.warn("the chat template ends the response with no end-of-turn token, so its end is not scored", where)
    if item.added:
        report.warn(
            "the chat template writes text that is scored with the response", f"{where}: {shorten(item.added)}"
        )
    if num_unknown := sum(token == tokenizer.unk_token_id for token in item.response_ids):
        case = f"{where}: {num_unknown} of {len(item.response_ids)} tokens"
        report.warn(f"a response has letters that the tokenizer only knows as {tokenizer.unk_token!r}", case)
    return item


def seam_case(probe: Probe, name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How a prompt's end and a response's start become other tokens together; None if only white space moves."""
    seam = find_seam(probe, name, tokenizer)
    if seam is None or seam.is_blank:
        return None
    return f"{where_of(probe, name)}: {seam.text}"


def _check_repetitions(probe_set: ProbeSet, report: CheckReport) -> None:
    prompts = Counter(_text(probe.prompt) for probe in probe_set)
    for probe in probe_set:
        if prompts[_text(probe.prompt)] > 1:
            report.warn("several probes have the same prompt", f"probe {probe.probe_id!r}")
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
