"""Versions outside the ranges are refused, newer ones accepted where every private name is there; env never fails."""

import configparser
import importlib
import importlib.metadata
import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from packaging.requirements import Requirement

import trl_dynamics
from trl_dynamics import compat, versions
from trl_dynamics.cli import env

ROOT = Path(__file__).parents[2]
FITTING = {
    "torch": "2.13.0+cpu",
    "transformers": "5.23.1",
    "trl": "1.16.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "peft": "0.21.2",
}


@pytest.fixture
def pretend(monkeypatch):
    """Sets the version that a package says it has."""
    real = importlib.metadata.version

    def set_version(package: str, found: str) -> None:
        fake = {package: found}
        monkeypatch.setattr(versions, "version", lambda name: fake[name] if name in fake else real(name))

    yield set_version
    monkeypatch.undo()
    importlib.reload(compat)


@pytest.mark.parametrize("found", ["1.15.0", "2.0.0", None])
def test_other_versions_are_refused_with_one_command(found):
    with pytest.raises(ImportError) as refused:
        versions.check_versions(FITTING | {"trl": found, "peft": "1.0"})
    said = str(refused.value)
    assert f"trl>=1.16,<2 (found {found or 'none'})" in said and "\n" not in said
    assert said.endswith("pip install 'trl>=1.16,<2' 'peft>=0.21,<1'") and said.count("pip install") == 1


@pytest.mark.parametrize(
    "newer", [{"trl": "1.17.0"}, {"transformers": "5.24.0"}, {"torch": "2.14.1"}, {"accelerate": "1.16.0.dev0"}]
)
def test_every_minor_below_the_next_major_is_accepted(newer):
    versions.check_versions(FITTING | newer)


def test_setup_and_this_package_agree_on_the_ranges_and_the_tested_set_is_within():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = [Requirement(line) for line in setup["options"]["install_requires"].split()]
    ranges = {requirement.name: requirement.specifier for requirement in wanted}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, accepted in versions.ACCEPTED.items():
        assert ranges[name] == Requirement(f"{name}{accepted}").specifier
    lower = {name.lower(): pin for name, pin in pins.items()}
    assert all(lower[name] in allowed for name, allowed in ranges.items())
    versions.check_versions({name: pins[name] for name in versions.ACCEPTED})
    assert versions.untested(pins) is None


def test_importing_the_trainers_checks_the_versions(pretend):
    pretend("transformers", "5.22.0")
    with pytest.raises(ImportError, match="transformers>=5.23,<6 .found 5.22.0."):
        importlib.reload(compat)


def test_a_command_refuses_versions_in_one_line():
    code = (
        "import sys\n"
        "from trl_dynamics import versions\n"
        "versions.version = lambda name: '0.9'\n"
        "from trl_dynamics.cli.main import main\n"
        "sys.exit(main(['track']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("trl-dynamics ") and "trl>=1.16,<2 (found 0.9)" in line


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("trl_dynamics")]


def test_a_newer_minor_is_accepted_with_one_warning(pretend, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        importlib.reload(compat)
        assert warnings_of(caplog) == []
        pretend("trl", "1.17.0")
        importlib.reload(compat)
        (told,) = warnings_of(caplog)
        assert "trl 1.17.0 (tested up to 1.16)" in told
        # One warning per run, not per process.
        monkeypatch.setenv("RANK", "1")
        importlib.reload(compat)
        assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    ("holder", "name", "told"),
    [
        (trl.DPOTrainer, "_compute_loss", "trl.DPOTrainer._compute_loss, which trl 1.17.0"),
        (importlib.import_module("trl.trainer.utils"), "add_fused_lm_head", "trl.trainer.utils.add_fused_lm_head"),
    ],
    ids=["method", "function"],
)
def test_a_newer_minor_without_a_private_name_is_refused(holder, name, told, pretend, monkeypatch):
    pretend("trl", "1.17.0")
    with monkeypatch.context() as patch:
        patch.delattr(holder, name)
        with pytest.raises(ImportError) as refused:
            importlib.reload(compat)
    assert told in str(refused.value) and str(refused.value).endswith("pip install 'trl==1.16.*'")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trl", "SFTTrainer.no_such_method"),
        ("trl", "NoSuchTrainer._compute_loss"),
        ("trl", "SFTTrainer.__init__:no_such_attribute"),
        ("trl.trainer.no_such_module", "name"),
    ],
)
def test_what_is_missing_is_seen(module, name):
    assert not versions.has_name(module, name)


def test_a_package_that_cannot_be_imported_is_not_said_to_lack_a_name(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(versions, "PRIVATE_NAMES", {"half_installed": ("name",)})
    with pytest.raises(ImportError, match="cannot import half_installed .*: No module named 'no_such_dependency'"):
        versions.check_private_names(FITTING)


def test_a_trainer_that_cannot_be_loaded_keeps_no_other_from_use(tmp_path, monkeypatch):
    """As TRL's lazy module does it, where GRPO finds a broken vLLM."""
    (tmp_path / "lazy_trainers.py").write_text(
        "def __getattr__(name):\n"
        "    raise RuntimeError('Failed to import') if name == 'GRPO' else AttributeError(name)\n"
        "class SFT:\n    _method = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(versions.TESTED, "lazy_trainers", "1.0")
    monkeypatch.setattr(versions, "PRIVATE_NAMES", {"lazy_trainers": ("GRPO._method", "SFT._method")})
    versions.check_private_names(FITTING)
    monkeypatch.setattr(versions, "PRIVATE_NAMES", {"lazy_trainers": ("GRPO._method", "SFT._other")})
    with pytest.raises(ImportError, match="lazy_trainers.SFT._other"):
        versions.check_private_names(FITTING)


def test_every_private_method_that_a_trainer_overrides_is_listed():
    """A method that TRL no longer calls would be silently idle."""
    for name in ("SFTTrainer", "DPOTrainer", "GRPOTrainer"):
        theirs, ours = getattr(trl, name), getattr(trl_dynamics, name)
        bases = [base for base in inspect.getmro(ours) if base.__module__.startswith("trl_dynamics")]
        overridden = {key for base in bases for key in vars(base) if key.startswith("_") and key[1] != "_"}
        for key in overridden & set(dir(theirs)) - {"_abc_impl"}:
            assert f"{name}.{key}" in versions.PRIVATE_NAMES["trl"]


def test_env_prints_what_is_wrong_and_ends_well(pretend, capsys, monkeypatch):
    assert env.run([]) == 0
    assert "- problems: none" in capsys.readouterr().out
    pretend("trl", "1.15.0")
    monkeypatch.delitem(sys.modules, "trl_dynamics.compat")
    assert env.run([]) == 0
    said = capsys.readouterr().out
    assert "- trl: 1.15.0" in said and "ImportError: trl-dynamics needs trl>=1.16,<2 (found 1.15.0)" in said


def test_env_ends_well_without_torch_trl_and_the_rest():
    """In a process that cannot import them, through the command line."""
    code = (
        "import sys\n"
        "for name in ('torch', 'trl', 'transformers', 'peft', 'tqdm', 'packaging', 'pandas', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "from trl_dynamics.cli.main import main\n"
        "sys.exit(main(['env']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in result.stdout.splitlines())
    assert lines["python"] and "torch" in lines["devices"] and lines["problems"].startswith("ModuleNotFoundError")
