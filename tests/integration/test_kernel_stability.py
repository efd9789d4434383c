"""The study of the kernel's stability, on a handful of steps, and its tables on rankings that are known."""

import gzip
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "kernel_stability"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules; other recipes have some of the same names."""
    names = [path.stem for path in RECIPE.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(RECIPE))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(RECIPE))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with digits of a kind: noise, and a bright row whose height is the class."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    labels = rng.integers(0, 10, size=300).astype(np.uint8)
    pixels = rng.integers(0, 60, size=(300, 28, 28)).astype(np.uint8)
    pixels[np.arange(300), 2 * labels + 4] = 255
    for name, values, header in (("images-idx3", pixels, 16), ("labels-idx1", labels, 8)):
        with gzip.open(folder / f"t10k-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + values.tobytes())
    monkeypatch.setenv("TRL_DYNAMICS_DATA", str(tmp_path / "data"))


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".npz", ".safetensors")}


def test_networks_are_trained_ranked_and_skipped_once_they_have_finished(recipe, data, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.images, "NUM_TRAIN", 150)
    monkeypatch.setattr(recipe.images, "NUM_HELD_OUT", 150)
    out = tmp_path / "out"
    words = ["--output_dir", str(out), "--seeds", "0", "1", "--systems", "mlp", "--epochs", "0", "2", "8"]
    recipe.study.main(words)
    page = (out / "summary.md").read_text()
    assert "| mlp | size of K | means of class pairs |" in page and "| mlp | head only |" in page
    with np.load(out / "seed1" / "mlp.npz") as found:
        assert found["kernel"].shape == found["influence"].shape == (3, 20, 20)
        assert found["steps"].tolist() == [0, 2, 8] and found["same"].sum() == 40
        assert found["quality"][-1] > 0.4 > found["quality"][0]
    assert {path.name for path in (out / "charts").iterdir()} == {"kernel.png", "influence.png"}
    before = times_of(out)
    recipe.study.main(words)
    assert times_of(out) == before and (out / "summary.md").read_text() == page
    with pytest.raises(ValueError, match="choose another folder"):
        recipe.study.main([*words, "--num_products", "7"])


def test_language_models_are_trained_ranked_and_predicted_step_by_step(recipe, tmp_path, monkeypatch):
    for module, name, value in [
        ("language", "NUM_PAIRS", 8),
        ("language", "NUM_UPDATED", 2),
        ("language", "NUM_OBSERVED", 2),
        ("proxies", "TRAINED_TYPES", ("chosen", "other_test")),
        ("proxies", "NUM_STEPS", 1),
        ("proxies", "NUM_PROBES", 1),
        ("running", "NUM_STEPS", 4),
        ("running", "SAMPLE", 3),
        ("running", "NUM_PROBES", 1),
    ]:
        monkeypatch.setattr(getattr(recipe, module), name, value)
    out, systems = tmp_path / "out", ["embedded sft", "embedded dpo"]
    words = ["--output_dir", str(out), "--seeds", "0", "--steps", "0", "1", "2", "--num_products", "6"]
    recipe.study.main([*words, "--systems", *systems])
    page = (out / "summary.md").read_text()
    for system in systems:
        with np.load(out / "seed0" / f"{system}.npz") as found:
            assert found["kernel"].shape == (3, 8, 4) and (found["kernel"] > 0).all()
            assert found["steps"].tolist() == [0, 1, 2] and found["same"].sum() == 16
        assert f"## {system}: predicted and observed, 4 steps" in page
    for name in ("embedded base", "embedded sft", "embedded dpo"):
        assert f"| {name} | blocks |" in page
    assert "| embedded | adamw_torch |" in page and "nan" not in page
    with np.load(out / "seed0" / "bounds-embedded.npz") as found:
        assert found["adamw_torch/lbk"].shape == found["kernel"].shape == (len(found["types"]), 2)
        row = found["types"].tolist().index("chosen")
        assert found["adamw_torch/sign_delta"][row, 0] > 0 and found["-influence"][row, 0] > 0
    whole = recipe.running.sums(out / "seed0" / "running-embedded sft", 1)
    assert whole.loc["chosen", "predicted"] == pytest.approx(whole.loc["chosen", "observed"], rel=0.5)


def test_the_table_counts_the_stretches_that_are_below(recipe, tmp_path):
    rng = np.random.default_rng(0)
    first, other = rng.normal(size=(2, 20, 20))
    for seed in (0, 1):
        arrays = {"influence": np.stack([first, first, other]), "kernel": np.exp([first, 2 * first, first])}
        same = np.kron(np.eye(10), np.ones((2, 2)))
        recipe.proxies.keep(
            tmp_path / f"seed{seed}" / "mlp.npz", arrays | {"steps": [0, 5, 9], "same": same, "quality": [0, 1, 1]}
        )
    lines = recipe.summary.write_summary(tmp_path, [0, 1], ["mlp"], tmp_path / "summary.md").read_text().splitlines()
    (kernel,) = (line for line in lines if line.startswith("| mlp | size of K | all |"))
    assert "| 1.00 (1.00 to 1.00) | 0 of 4 | 0 of 4 |" in kernel
    (influence,) = (line for line in lines if line.startswith("| mlp | influence | different"))
    assert "| 2 of 4 | 2 of 4 |" in influence
    assert any(line.startswith("| mlp | influence | 0-5: 1.00, 5-9: **") for line in lines)


def test_a_heat_map_has_every_two_checkpoints(recipe):
    import pandas as pd

    matrix = pd.DataFrame([[1.0, 0.4], [0.4, 1.0]], [0, 7], [0, 7])
    spec = recipe.charts.heat_map("mlp", matrix)
    found = {(row["before"], row["after"]): row["value"] for row in spec["data"]["values"]}
    assert found == {(0, 0): 1.0, (0, 7): 0.4, (7, 0): 0.4, (7, 7): 1.0}
