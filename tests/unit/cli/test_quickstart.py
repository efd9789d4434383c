"""What the quickstart prints of its runs, without training them."""

from synthetic_influence import influence, write_influence
from synthetic_runs import SQUEEZED, records, write_run
from trl_dynamics.cli.quickstart import found_text
from trl_dynamics.findings.verdicts import findings_of, judge
from trl_dynamics.store.store import DynamicsStore


def test_findings_of_every_chapter_are_printed(tmp_path):
    run = write_influence(write_run(tmp_path / "run", records(SQUEEZED, argmax=0.5)), influence(error=0.6))
    judged = judge(DynamicsStore(run))
    found = findings_of(judged)
    assert {"squeezing", "step_too_large"} <= {finding.name for finding in found}
    lines = found_text("run", judged).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [finding.severity for finding in found]
