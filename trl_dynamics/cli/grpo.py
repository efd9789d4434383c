"""trl-dynamics grpo: reinforcement learning from rewards with a tracked probe set."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import trl
from accelerate import PartialState
from datasets import Dataset
from trl import rewards

from trl_dynamics.cli import sources
from trl_dynamics.cli.options import option
from trl_dynamics.cli.training import DynamicsScriptArguments, TrainingCommand
from trl_dynamics.trainers.data import check_answers

REWARDS = {
    "accuracy_reward": rewards.accuracy_reward,
    "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward,
    "think_format_reward": rewards.think_format_reward,
    "get_soft_overlong_punishment": rewards.get_soft_overlong_punishment(
        max_completion_len=1280, soft_punish_cache=256
    ),
}


@dataclass
class GRPOScriptArguments(DynamicsScriptArguments):
    """Where the data and the rewards come from; the rewards are named as in TRL's own script."""

    reward_funcs: list[str] | None = option(
        None,
        f"Reward functions: {', '.join(REWARDS)}, or your own as module.function or module:function, "
        "found in the working directory or installed. Their rewards are added up, weighted by reward_weights.",
    )
    reward_model_name_or_path: str | None = option(None, "A reward model as well or instead: a folder or a hub name.")


class GRPOCommand(TrainingCommand):
    """GRPO on the command line: prompts and rewards instead of answers."""

    script_class = GRPOScriptArguments

    def trainer_arguments(self, script_args: GRPOScriptArguments) -> dict:
        """The rewards.

        Raises:
            ValueError: If there is none, or one does not exist.
        """
        chosen = [find_reward(name) for name in script_args.reward_funcs or []]
        if script_args.reward_model_name_or_path:
            chosen.insert(0, sources.require_folder(script_args.reward_model_name_or_path, "reward model"))
        if not chosen:
            raise ValueError(
                "no reward given: pass --reward_funcs (a name or module.function), --reward_model_name_or_path or both"
            )
        return {"reward_funcs": chosen}

    def check_rows(self, dataset: Dataset, script_args: GRPOScriptArguments) -> Dataset:
        """Rows with a prompt, which preference pairs may hold implicitly; the other columns go to the rewards."""
        if "prompt" not in dataset.column_names:
            with PartialState().main_process_first():
                dataset = dataset.map(trl.extract_prompt)
        return check_answers(dataset, columns=("prompt",), drop_invalid_rows=script_args.drop_invalid_rows)


def find_reward(name: str) -> Callable:
    """A reward function of TRL by its name, or any by its import path.

    Args:
        name (`str`): A key of `REWARDS`, or `module.function` or `module:function` with a dotted module name.

    Raises:
        ValueError: If there is no such name, module or function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, function_name = name.replace(":", ".").rpartition(".")
    if not module_name:
        raise ValueError(
            f"reward function {name!r} is not known; expected one of {', '.join(REWARDS)}, or module.function"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module is there; something that it imports is not.
        raise ValueError(
            f"reward function {name!r}: there is no module {error.name!r}, neither in {os.getcwd()} nor installed"
        ) from error
    if not callable(getattr(module, function_name, None)):
        raise ValueError(f"reward function {name!r}: {module.__file__} defines no function {function_name!r}")
    return getattr(module, function_name)


def command() -> GRPOCommand:
    """The command with its trainer and config."""
    from trl_dynamics.trainers.config import GRPOConfig
    from trl_dynamics.trainers.grpo import GRPOTrainer

    return GRPOCommand("grpo", GRPOTrainer, GRPOConfig)


def run(argv: list[str]) -> int:
    """Train in this process, or through `accelerate launch` when launch options are given."""
    return command().run(argv)
