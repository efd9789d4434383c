"""trl-dynamics squeeze-demo: the toy's numbers as published, from ops.squeeze, on a page that fetches nothing."""

import json
import re
import struct
import sys
from dataclasses import replace

import pytest
import torch

from trl_dynamics.cli import squeeze_demo
from trl_dynamics.cli.main import main
from trl_dynamics.ops import squeeze
from trl_dynamics.report.squeeze_demo import build_page, factors, number_rows, picture, probabilities

CASES = {case.name: case for case in squeeze_demo.cases()}


def ends(case, label):
    return case.before[label], case.after[label]


def test_the_peaked_cases_have_the_numbers_of_the_toy():
    """arXiv 2407.10490, the toy with its seeds: cases C (likely label), D (valley) and D with a positive step."""
    assert ends(CASES["peaked"], CASES["peaked"].rejected) == pytest.approx((0.0293, 4.6e-6), rel=0.02)
    assert ends(CASES["peaked"], 0) == pytest.approx((0.7627, 0.9871), abs=1e-3)
    valley = CASES["valley"]
    assert ends(valley, valley.rejected) == pytest.approx((4.0e-10, 5.5e-14), rel=0.03)
    assert ends(valley, 0) == pytest.approx((0.7627, 0.9863), abs=1e-3)
    rest = [1 - side[0] - side[valley.rejected] for side in (valley.before, valley.after)]
    assert rest == pytest.approx([0.2373, 0.0137], abs=1e-3)
    assert [CASES[name].rising for name in ("peaked", "valley")] == [(1, 49), (1, 49)]
    both = CASES["both"]
    assert ends(both, both.rejected) == pytest.approx((4.0e-10, 2.2e-12), rel=0.03)
    assert ends(both, 0) == pytest.approx((0.7627, 0.7627), abs=1e-4)
    assert ends(both, both.chosen) == pytest.approx((2.2e-8, 4.0e-6), rel=0.1)


def test_the_flat_case_lifts_everybody_and_the_positive_one_nobody_else():
    flat, positive = CASES["flat"], CASES["positive"]
    assert ends(flat, flat.rejected) == pytest.approx((0.0233, 0.00106), rel=0.05)
    assert ends(flat, flat.rival) == pytest.approx((0.0278, 0.0291), abs=2e-4)
    assert flat.rising == (49, 49) and flat.drained < 0
    assert positive.rising == (0, 49) and positive.after[positive.chosen] > 0.5


def test_cases_are_single_steps_and_their_drained_mass_is_that_of_the_closed_form():
    logits = {"flat": squeeze_demo.flat_logits(), "peaked": squeeze_demo.peaked_logits()}
    logits["valley"] = logits["peaked"]
    for name, row in logits.items():
        case = CASES[name]
        label = torch.tensor([case.rejected])
        assert case.after == pytest.approx(squeeze.step(row[None], label, -case.strength).softmax(-1)[0].tolist())
        assert case.drained == pytest.approx(squeeze.drained_mass(row[None], label, -case.strength).item())
        assert case.rival == squeeze.rival(row[None], label).item() and case.before == sorted(case.before)[::-1]
    row, both = logits["peaked"].clone().requires_grad_(), CASES["both"]
    logp = row.log_softmax(0)
    (pull,) = torch.autograd.grad(logp[both.chosen] - logp[both.rejected], row)
    assert both.after == pytest.approx((row + both.strength * pull).softmax(0).tolist())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_table_accounts_for_all_probability(case):
    rows = number_rows(case)
    assert rows[-1][0] == "all others"
    for column in (1, 2):
        assert sum(float(row[column]) for row in rows) == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_charts_hold_every_label_with_its_role_and_direction(case):
    rows = probabilities(case)["data"]["values"]
    assert [row["label"] for row in rows] == list(range(50)) and rows == factors(case)["data"]["values"]
    signs = {row["sign"]: row["label"] for row in rows if "sign" in row}
    named = {"y−": case.rejected, "y+": case.chosen, "y*": case.rival}
    assert signs == {sign: label for sign, label in named.items() if label is not None}
    assert sum(row["role"] == "all others" for row in rows) == 50 - len(signs)
    rising = {row["label"] for row in rows if row["direction"] == "rises"}
    assert rising == {v for v in range(50) if case.after[v] > case.before[v] * 1.0001}
    low, high = factors(case)["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert all(low <= row["factor"] <= high for row in rows)


def test_the_page_is_complete_and_fetches_nothing(tmp_path, capsys):
    path = tmp_path / "new" / "squeeze.html"
    assert main(["squeeze-demo", "-o", str(path)]) == 0
    page, printed = path.read_text(), capsys.readouterr().out
    assert printed.strip().endswith(str(path))
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', page)[1])
    places = re.findall(r'data-chart="(.*?)"', page)
    assert len(places) == 10 and set(places) == set(data["charts"])
    head = page[: page.index('id="page-data"')]
    assert "default-src 'none'" in head and not re.search(r"(src|href)=|url\(|@import", head)
    for case in CASES.values():
        assert case.title in head and case.counted in head and f"{case.drained:+.4f}" in head
        assert case.title in printed and case.counted in printed
        for label, before, after in number_rows(case):
            assert f'<td>{label}</td><td class="n">{before}</td><td class="n">{after}</td>' in head
            assert re.search(rf"{re.escape(label)} +{re.escape(before)} -> {re.escape(after)}", printed)


def test_texts_on_the_page_are_text(tmp_path):
    evil = replace(CASES["flat"], title="<script>alert(1)</script>", text="</p><img src=x>")
    page = build_page([evil], tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "<img" not in page[: page.index('id="page-data"')]


def test_the_picture_has_all_cases(tmp_path):
    path = tmp_path / "squeeze.png"
    assert main(["squeeze-demo", "--format", "png", "-o", str(path)]) == 0
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and height > width > 1000
    rows = picture(list(CASES.values()))["vconcat"]
    assert [row["title"]["text"] for row in rows] == [case.title for case in CASES.values()]
    assert "4.0e-10 → 5.4e-14" in rows[2]["title"]["subtitle"][0]


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert main(["squeeze-demo", "-o", str(tmp_path / "page.html")]) == 1
    shown = capsys.readouterr()
    assert "pip install 'trl-dynamics[report]'" in shown.err and not (tmp_path / "page.html").exists()
