"""trl-dynamics diagnose: what the records of finished or running runs say, in plain words; an exit status for CI."""

import argparse
import json
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass
from functools import cached_property

from trl_dynamics.cli.options import argument, option, read
from trl_dynamics.findings.finding import ALERT, INFO, SEVERITIES, WARNING, Finding
from trl_dynamics.findings.verdicts import Judged, by_model, calm_of, findings_of, judge
from trl_dynamics.store.store import DynamicsStore, open_store, run_names

# 1 and 2 are what every command ends with after an error or wrong usage; a typo must not look like a finding.
NOT_JUDGED = 3
STATUS = {INFO: 10, WARNING: 20, ALERT: 30}
EPILOG = f"""exit status:
  {STATUS[ALERT]}  the worst finding of any run is an alert
  {STATUS[WARNING]}  it is a warning (with --fail_on warning or info)
  {STATUS[INFO]}  it is information (with --fail_on info)
  {NOT_JUDGED}   nothing as severe as --fail_on, but a run could not be judged: no records, too few to compare,
      damaged, or of a newer version
  0   nothing as severe as --fail_on, and every run was judged; always with --fail_on never
  1 and 2 are errors of the command itself, as everywhere in trl-dynamics.

Information says nothing against the training.
A run that is still training is judged as of its last probing step."""
MAX_WIDTH = 110
# The model of a training run, which the run's name stands for.
DEFAULT_MODEL = "policy"


@dataclass(frozen=True)
class Diagnosis:
    """What the records of one model of a run say.

    Args:
        run (`str`): Its name among those judged together.
        model (`str`): As in the records.
        path (`str`): The run's output directory.
        meta (`dict`): Its meta.json.
        judged (`list[Judged]`): What each chapter says, at least one.
    """

    run: str
    model: str
    path: str
    meta: dict
    judged: list[Judged]

    @cached_property
    def findings(self) -> list[Finding]:
        """Of all chapters, the most severe first."""
        return findings_of(self.judged)

    @property
    def is_judged(self) -> bool:
        """Whether there are changes to judge, or a finding about a level."""
        return any(not one.overview.lack for one in self.judged) or bool(self.findings)

    @property
    def scope(self) -> str:
        """What was recorded."""
        return "; ".join(one.overview.scope for one in self.judged)

    @property
    def steps(self) -> list[int]:
        """Where answers were scored."""
        return sorted({step for one in self.judged for step in one.overview.scored})

    @property
    def start(self) -> str | None:
        """The model that this one was compared with, where that is another one."""
        return next((one.overview.compared_with for one in self.judged if one.overview.compared_with), None)


@dataclass
class DiagnoseArguments:
    """Options of `trl-dynamics diagnose`."""

    runs: list[str] = argument("output directories of runs (or their dynamics/ folders)")
    format: str = option("text", "", choices=["text", "json"])
    verbose: bool = option(False, "also the exact rule behind every finding")
    fail_on: str = option(
        "alert",
        "least severity that ends in an exit status other than 0; default: alert, as warnings are often false",
        choices=[*reversed(SEVERITIES), "never"],
    )


def run(argv: list[str]) -> int:
    """Print the findings and return the exit status."""
    how = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    args = read(DiagnoseArguments, argv, "diagnose", __doc__, **how)
    found, failures = diagnose(args.runs)
    worst = min((f.severity for one in found for f in one.findings), key=SEVERITIES.index, default=None)
    status = exit_status(worst, args.fail_on, failures)
    if args.format == "json":
        print(json.dumps(as_json(found, failures, worst, status), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        texts = [as_text(one, args.verbose) for one in found] + [*map(not_judged_text, failures, failures.values())]
        print("\n\n".join(texts))
    # On a terminal both streams show in one place.
    shown = failures if args.format == "json" or not sys.stdout.isatty() else {}
    for path, reason in shown.items():
        print(f"trl-dynamics diagnose: {not_judged_text(path, reason)}", file=sys.stderr)
    return status


def diagnose(paths: list[str]) -> tuple[list[Diagnosis], dict[str, str]]:
    """Every model of every run judged; and for each run that could not be, why.

    Raises:
        ValueError: If a run is given twice.
    """
    stores, failures = {}, {}
    for path in paths:
        try:
            stores[path] = open_store(path)
        except ValueError as error:
            failures[path] = str(error)
    names = dict(zip(stores, run_names(list(stores.values())), strict=True)) if stores else {}
    found = []
    for path, store in stores.items():
        try:
            found += _of_run(names[path], store)
        except FileNotFoundError as error:
            failures[path] = f"changed while it was read ({error.filename} is gone); try again"
        except (ValueError, OSError) as error:
            failures[path] = str(error)
    return found, failures


def exit_status(worst: str | None, fail_on: str, failures: dict[str, str]) -> int:
    """The status that [`EPILOG`] describes; a finding outweighs a run that was not judged."""
    if fail_on == "never":
        return 0
    if worst is not None and SEVERITIES.index(worst) <= SEVERITIES.index(fail_on):
        return STATUS[worst]
    return NOT_JUDGED if failures else 0


def as_json(found: list[Diagnosis], failures: dict[str, str], worst: str | None, status: int) -> dict:
    """The same as data: `runs` (one entry per run and model), `not_judged` (one per run that could not be), `worst`,
    `exit_status`; a number that is not finite is null."""
    return {
        "runs": [
            {
                "run": one.run,
                "model": one.model,
                "path": one.path,
                "method": one.meta.get("method"),
                "trained_with": one.meta.get("trained_with", {}).get(one.model),
                "compared_with": one.start,
                "status": one.meta.get("status"),
                "steps": one.steps,
                "findings": [asdict(f) | {"evidence": _finite(f.evidence)} for f in one.findings],
                "alerts": one.meta.get("alerts", []),
            }
            for one in found
        ],
        "not_judged": [{"path": path, "reason": reason} for path, reason in failures.items()],
        "worst": worst,
        "exit_status": status,
    }


def as_text(one: Diagnosis, verbose: bool = False) -> str:
    """One model of a run in words."""
    label = one.run if one.model == DEFAULT_MODEL else f"{one.run}: {one.model}"
    state = "not finished, judged as of now" if one.meta.get("status") == "running" else "finished"
    trained = one.meta.get("trained_with", {}).get(one.model)
    method = one.meta.get("method", "unknown method") + (f" of {trained}" if trained else "")
    lines = [f"{label} ({method}, {state}): {one.scope}"]
    if not one.is_judged:
        return lines[0]
    for judged in one.judged:
        lines += _filled(judged.overview.moved)
    if not one.findings:
        lines += ["", *_filled(f"No finding: {calm_of(one.judged)}.")]
    for finding in one.findings:
        lines += ["", f"{finding.severity.upper()}  {finding.title}", *_filled(finding.text)]
        known = _finite(finding.evidence).items()
        evidence = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in known if value is not None)
        lines += _filled(f"Evidence: {evidence}.")
        lines += _filled(f"Rule: {finding.rule}") if verbose else []
        lines += _filled(f"What to do: {finding.remedy}")
    return "\n".join(lines)


def not_judged_text(path: str, reason: str) -> str:
    """A run that could not be judged, in words."""
    where = "" if path in reason else f"{path}: "
    return f"not judged: {where}{reason}"


def _of_run(name: str, store: DynamicsStore) -> list[Diagnosis]:
    try:
        meta = store.read_meta()
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{store.root / 'meta.json'} is damaged ({error!r}); copy the run again") from error
    path, running = str(store.output_dir), meta.get("status") == "running"
    found = [Diagnosis(name, model, path, meta, judged) for model, judged in by_model(judge(store)).items()]
    if not found:
        wait = "the run has recorded nothing yet, try again later" if running else "nothing was ever recorded"
        raise ValueError(f"no records in {store.root}: {wait}")
    if not any(one.is_judged for one in found):
        wait = "; the run has not finished, try again later" if running else ""
        raise ValueError(f"{found[0].scope}{wait}")
    return found


def _filled(text: str) -> list[str]:
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _finite(evidence: dict[str, float]) -> dict[str, float | None]:
    return {name: value if abs(value) < float("inf") else None for name, value in evidence.items()}
