"""trl-dynamics dpo: direct preference optimisation with a tracked probe set."""

from trl_dynamics.cli.training import TrainingCommand


def command() -> TrainingCommand:
    """The command with its trainer and config."""
    from trl_dynamics.trainers.config import DPOConfig
    from trl_dynamics.trainers.dpo import DPOTrainer

    return TrainingCommand("dpo", DPOTrainer, DPOConfig)


def run(argv: list[str]) -> int:
    """Train in this process, or through `accelerate launch` when launch options are given."""
    return command().run(argv)
