"""Charts as data: the right numbers, few enough points, the same look everywhere; then the exported files."""

import json
import math
import subprocess
import sys

import pandas as pd
import pytest

from chart_specs import shown_of
from synthetic_runs import ALL_TYPES, SQUEEZED, STEPS, VOCAB_SIZE, records, write_run
from trl_dynamics.drawing import axis, lines, style
from trl_dynamics.drawing.spec import VEGA_LITE
from trl_dynamics.paths.metrics import METRICS
from trl_dynamics.paths.page import charts, levels
from trl_dynamics.paths.page.sections import path_charts, squeezing_charts
from trl_dynamics.paths.summary import summarise
from trl_dynamics.probing.schema import GROUPS, RESPONSE_TYPES
from trl_dynamics.report import load, sections
from trl_dynamics.report.export import export_csv, export_png


@pytest.fixture(scope="module")
def frame():
    return records(SQUEEZED, argmax=0.5, drained=0.1, num_probes=6)


@pytest.fixture(scope="module")
def summary(frame):
    return summarise(frame)


@pytest.fixture(scope="module")
def run(frame, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", frame)


def test_learning_paths_hold_every_measure(summary):
    rows = charts.learning_paths(summary)["data"]["values"]
    assert len(rows) == len(ALL_TYPES) * len(STEPS)
    row = next(row for row in rows if row["response_type"] == "rejected" and row["step"] == 160)
    assert row["token"] == pytest.approx(summary.path().at[160, "rejected"], rel=1e-4)
    assert row["change_token"] == pytest.approx(summary.change_since_start().at[160, "rejected"], rel=1e-4)
    assert row["sequence"] == pytest.approx(summary.path("logp_sum").at[160, "rejected"], rel=1e-4)
    assert row["change_token_lo"] <= row["change_token"] <= row["change_token_hi"]


def test_the_axis_of_learning_paths_covers_what_is_always_seen_and_no_more(summary):
    spec = charts.learning_paths(summary)
    (expression,) = [param["expr"] for param in spec["params"] if param["name"] == "span"]
    spans = json.loads(expression.removeprefix("(").removesuffix(")[measure]"))
    for name, (low, high) in spans.items():
        seen = []
        for row in spec["data"]["values"]:
            seen.append(row[name])
            seen += [row[f"{name}_lo"], row[f"{name}_hi"]] if row["response_type"] in ("chosen", "rejected") else []
        assert (low, high) == pytest.approx((min(seen), max(seen))), name


def test_start_and_end_are_per_sequence_where_the_page_is(summary):
    vl_convert = pytest.importorskip("vl_convert")
    spec = levels.levels(summary) | {"width": 400}
    row = next(row for row in spec["data"]["values"] if row["response_type"] == "rejected")
    for column in ("logp_mean", "logp_sum"):
        path = summary.path(column)["rejected"]
        assert (row[f"{column}_start"], row[f"{column}_end"]) == pytest.approx((path.iloc[0], path.iloc[-1]), rel=1e-4)
    for measure, unit in (("change_token", "per token"), ("sequence", "per sequence")):
        params = [param | ({"value": measure} if param["name"] == "measure" else {}) for param in spec["params"]]
        assert unit in vl_convert.vegalite_to_svg(spec | {"params": params}, vl_version=VEGA_LITE)


@pytest.mark.parametrize("name", METRICS)
def test_an_axis_has_the_unit_of_its_metric_and_no_remark(frame, name):
    spec = charts.metric({"run": summarise(frame, VOCAB_SIZE)}, name)
    title = spec["encoding"]["y"]["axis"]["title"]
    assert title == METRICS[name].axis and METRICS[name].unit.startswith(title) and not {*",;"} & {*title}


def test_charts_are_capped():
    long = summarise(records(num_probes=2, steps=range(1000)))
    assert len(charts.learning_paths(long)["data"]["values"]) <= lines.MAX_POINTS
    curves = {f"run{i}": pd.Series(range(9000), dtype=float) for i in range(2)}
    assert len(lines.metric_by_run(curves, "t", "nats")["data"]["values"]) <= lines.MAX_POINTS


def test_thinning_keeps_both_ends_and_early_steps():
    kept = axis.thin(range(0, 1001), 40)
    assert len(kept) == 40 and kept[:6] == [0, 1, 2, 4, 8, 16] and kept[-1] == 1000
    assert max(b - a for a, b in zip(kept[6:], kept[7:], strict=False)) <= 31
    assert axis.thin(range(0, 1001), 12) == [0, 1, 2, 4, 125, 250, 375, 500, 625, 750, 875, 1000]
    assert axis.thin([5, 1, 3], 10) == [1, 3, 5]
    assert axis.thin(range(7), 7) == list(range(7)) and len(axis.thin(range(8), 7)) <= 7


def test_a_chart_that_leaves_out_steps_says_so(summary):
    long = summarise(records(num_probes=2, steps=range(1000)))
    drawn = len(charts.drawn_steps(long))
    assert f"({drawn} of 1,000 steps drawn)" in charts.learning_paths(long)["title"]["text"]
    assert (
        "(2,500 of 9,000 steps drawn)"
        in lines.metric_by_run({f"run{i}": pd.Series(range(9000), dtype=float) for i in range(2)}, "t", "nats")[
            "title"
        ]["text"]
    )
    assert "drawn" not in charts.learning_paths(summary)["title"]["text"]


def test_log_spaced_schedules_start_with_stretched_steps():
    assert axis.log_steps([0, 1, 2, 4, 8, 16, 32, 64, 128, 256])["value"]
    assert not axis.log_steps(range(0, 401, 20))["value"]
    assert not axis.log_steps([0])["value"]


def test_every_known_type_has_its_own_look():
    looks = {(style.TYPE_COLORS[name], tuple(style.type_dash(name))) for name in RESPONSE_TYPES}
    assert len(looks) == len(RESPONSE_TYPES) == len(set(style.TYPE_COLORS.values()))
    assert set(style.GROUP_DASHES) == set(GROUPS)


def test_types_look_the_same_whatever_else_is_there():
    alone, together = style.type_colors(["rejected"]), style.type_colors([*ALL_TYPES, "mine", "yours"])
    assert alone["rejected"] == together["rejected"]
    assert together["mine"] != together["yours"] and together["mine"] not in style.TYPE_COLORS.values()


def test_scalar_curves_leave_out_what_is_not_a_curve():
    log = [
        {"step": 1, "loss": 2.0, "epoch": 0.1, "note": "text"},
        {"step": 2, "loss": float("nan"), "grad_norm": 1.0, "eval_loss": None, "kl": float("inf")},
        {"step": 3, "loss": 1.0},
        {"step": 3, "train_runtime": 9.0, "train_loss": 1.5},
        {"total": 3},
    ]
    curves = sections.scalar_curves(log)
    assert set(curves) == {"loss", "grad_norm"} and curves["loss"].dropna().to_dict() == {1: 2.0, 3: 1.0}
    assert list(curves["loss"].index) == [1, 2, 3], "a gap where the loss is not finite"


def test_known_scalars_come_first(run):
    assert list(sections.scalar_charts(load.load_runs([run]))) == [
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "learning_rate",
    ]


def test_a_flat_curve_is_drawn_flat():
    spec = lines.metric_by_run({"run": pd.Series([0.5, 0.501], index=[0, 1])}, "t", "nats", min_span=0.1)
    low, high = spec["encoding"]["y"]["scale"]["domain"]
    assert high - low == pytest.approx(0.1) and low < 0.5 < 0.501 < high
    constant = lines.metric_by_run({"run": pd.Series([1e-6, 1e-6], index=[0, 1])}, "t", "")
    low, high = constant["encoding"]["y"]["scale"]["domain"]
    assert low < 1e-6 < high < 1e-5


def test_vega_has_nothing_to_warn_of(summary):
    """It warns of charts that fill the width with a height in steps, and of one field with two unequal legends."""
    curves = {name: pd.Series([0.5, 0.7], index=[0, 1]) for name in ("a", "b")}
    channels = lines.metric_by_run(curves, "t", "nats")["encoding"]
    assert channels["color"]["legend"] == channels["strokeDash"]["legend"] is not None
    for spec in (levels.levels(summary), levels.levels_by_run({"a": summary, "b": summary})):
        assert isinstance(spec["height"], int)


def test_argmax_and_chosen_enclose_the_gap(summary):
    rows = charts.argmax_and_chosen(summary)["data"]["values"]
    gap = summary.metric("argmax_minus_chosen")
    for row in rows:
        assert row["argmax"] - row["chosen"] == pytest.approx(gap[row["step"]], abs=1e-3)


def test_specs_are_json_and_compile(run):
    vl_convert = pytest.importorskip("vl_convert")
    (shown,) = shown_of([run])
    drawn = path_charts(shown.subject) | squeezing_charts(shown)
    assert {"learning_paths", "levels", "argmax_and_chosen", "rejected", "drained_mass", "margin"} <= set(drawn)
    for spec in drawn.values():
        json.dumps(spec, allow_nan=False)
        signals = vl_convert.vegalite_to_vega(spec | {"width": 400}, vl_version=VEGA_LITE)["signals"]
        wanted = {param["name"] for param in spec.get("params", ())}
        assert wanted <= {signal["name"] for signal in signals}


def test_png_export(run, tmp_path):
    pytest.importorskip("vl_convert")
    other = write_run(tmp_path / "other", records(num_probes=4, steps=[0, 5]))
    written = export_png([run, other], tmp_path / "png")
    assert len(written) == len(set(written)) >= 25
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 3000
        assert min(int.from_bytes(content[at : at + 4], "big") for at in (16, 20)) > 200
    assert {"run-learning_paths.png", "comparison-entropy.png", "training-rewards_margins.png"} <= {
        path.name for path in written
    }


def test_csv_export_needs_no_extra(run, summary, tmp_path):
    code = (
        "import sys; sys.modules['vl_convert'] = sys.modules['jinja2'] = None\n"
        "from trl_dynamics.report.export import export_csv\n"
        f"export_csv([{str(run)!r}], {str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    paths, values = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("paths", "metrics"))
    assert list(paths.columns[:3]) == ["run", "model", "measure"] and set(paths["run"]) == {"run"}
    assert set(paths["measure"]) == {"logp_mean", "logp_mean_change", "logp_sum", "logp_sum_change"}
    chosen = paths[(paths["measure"] == "logp_sum") & (paths["response_type"] == "chosen")].set_index("step")["mean"]
    assert chosen.to_dict() == pytest.approx(summary.path("logp_sum")["chosen"].to_dict())
    entropy = values[values["metric"] == "entropy"].set_index("step")["value"]
    assert entropy.to_dict() == pytest.approx(summary.metric("entropy").to_dict())
    assert all(math.isfinite(value) for value in values["value"])


def test_csv_keeps_models_apart(tmp_path):
    frames = [records(model=name, num_probes=3, seed=seed) for seed, name in enumerate(["a", "b"])]
    run = write_run(tmp_path / "run", pd.concat(frames), method="track")
    table = pd.read_csv(export_csv([run], tmp_path / "csv")[1])
    assert set(table["model"]) == {"a", "b"}
    assert table.groupby("model").size().nunique() == 1
