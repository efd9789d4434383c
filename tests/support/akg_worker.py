"""Trains on every process that a launcher starts, and predicts steps of the run from the pieces of the weights.

usage: akg_worker.py CONFIG FOLDER NUM_PROCESSES SCENARIO...

Predictions are compared in here, with the exact influence on a plain copy of the model that functions of the libraries
put together, since both need the very same state.
"""

import contextlib
import copy
import faulthandler
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from scenarios import Scenario, make
from tiny import tiny_model
from trl_dynamics.akg.one_step import Influence, predict
from trl_dynamics.akg.split import fsdp, zero
from trl_dynamics.akg.split.differences import CentralDifferences
from trl_dynamics.akg.steps import step_of
from trl_dynamics.akg.task import causal_lm, causal_lm_labels, row_of_label
from worker import EXPECTED, prepare_device, run_to_the_end, share_held

OPTIONS = {"max_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "save_strategy": "no"}
PLAIN = Scenario("sft", accumulation=2, options=OPTIONS)
PREDICTED_STEPS = (0, 2)
# As the trainer makes them, without what does not bear on the step.
OPTIMIZERS = {"AdamW": (torch.optim.AdamW, {}), "SGD": (torch.optim.SGD, {"momentum": 0.9})}


@dataclass(frozen=True)
class Run:
    """A scenario, and what is done to it.

    Args:
        scenario ([`Scenario`]): The training.
        predicted (`bool`): Predict some of its steps.
        persistent (`bool`): Leave small weights gathered, as DeepSpeed does by default.
        stage (`int`, *optional*): Of ZeRO, another than the config's.

    In "recorded" and "types" the trainer itself predicts, compares and writes.
    """

    scenario: Scenario
    predicted: bool = True
    persistent: bool = False
    stage: int | None = None


SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}
RUNS = {
    "plain": Run(PLAIN, predicted=False),
    "predicted": Run(PLAIN),
    "persistent": Run(PLAIN, persistent=True),
    "zero1": Run(PLAIN, stage=1),
    "sgd_tied": Run(replace(PLAIN, tied=True, options=OPTIONS | SGD)),
    "recorded": Run(replace(PLAIN, options=OPTIONS | {"akg_every": 2}), predicted=False),
    "types": Run(replace(PLAIN, options=OPTIONS | {"akg_every": 2, "akg_updates": ["chosen"]}), predicted=False),
    "lora": Run(replace(PLAIN, lora=True, options=OPTIONS | {"learning_rate": 1e-2})),
}
# Made before anything asks for ZeRO-3, under which models are split while they are made.
MODELS = {tied: tiny_model("llama", tie_word_embeddings=tied) for tied in (False, True)}


def observers(rank: int) -> dict[str, torch.Tensor]:
    """Other rows, lengths and numbers of labels on each process."""
    rng = torch.Generator().manual_seed(rank)
    ids_BT = torch.randint(0, 250, (3, 20 + 4 * rank), generator=rng)
    labels_BT = ids_BT.clone()
    labels_BT[:, : 10 + 8 * rank] = -100
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": torch.ones_like(ids_BT)}


class Split:
    """A trainer's model and optimiser: the pieces that a process holds, and the whole by the libraries' functions."""

    def __init__(self, trainer):
        self.trainer, self.engine = trainer, trainer.model_wrapped
        self.stage = self.engine.zero_optimization_stage() if hasattr(self.engine, "zero_optimization_stage") else 0
        self.optimizer = self.engine.optimizer.optimizer if self.stage else trainer.optimizer.optimizer
        self.named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

    def pieces(self) -> list[torch.Tensor]:
        """Copies of all that a prediction could disturb."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            own = [piece for p in self.named.values() for piece in (p.ds_tensor, safe_get_local_grad(p))]
            own += self.engine.optimizer.fp32_partitioned_groups_flat
        elif self.stage:
            own = [*self.named.values(), *self.engine.optimizer.single_partition_of_fp32_groups]
        else:
            own = [piece for p in self.named.values() for piece in (p, p.grad)]
        tensors = [tensor for tensor in (*own, *states) if isinstance(tensor, torch.Tensor)]
        return [fsdp.local(tensor.detach()).clone() for tensor in tensors]

    def weight(self, p) -> torch.Tensor:
        if not self.stage:
            return full(p.detach())
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(p)

    def gradient(self, p) -> torch.Tensor:
        if not self.stage:
            return full(p.grad)
        from deepspeed.utils import safe_get_full_grad

        # Where weights are whole, what a parameter itself has is the gradient of this process.
        return safe_get_full_grad(p) if self.stage == 3 else p.get_full_hp_grad()

    def state(self, p) -> dict[str, torch.Tensor]:
        if not self.stage:
            held = {key: value for key, value in self.optimizer.state.get(p, {}).items() if value is not None}
            return {key: full(value).double() if value.ndim else value for key, value in held.items()}
        if self.stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            some = next((state for state in self.optimizer.state.values() if state), {})
            whole = {key: safe_get_full_optimizer_state(p, key).double() for key in some if key != "step"}
            return whole | {key: value for key, value in some.items() if key == "step"}
        return self.state_of_groups(p)

    def state_of_groups(self, p) -> dict[str, torch.Tensor]:
        """A parameter's state where only that is split: the parts of all processes in a row are those of a group."""
        zero_optimizer = self.engine.optimizer
        for index, members in enumerate(zero_optimizer.round_robin_bit16_groups):
            begin = 0
            for member in members:
                if member is p:
                    break
                begin += member.numel()
            else:
                continue
            flat = zero_optimizer.single_partition_of_fp32_groups[index]
            state, whole = self.optimizer.state.get(flat, {}), {}
            for key, value in state.items():
                if key == "step":
                    whole[key] = value
                    continue
                everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
                dist.all_gather(everyone, value)
                whole[key] = torch.cat(everyone)[begin : begin + p.numel()].double()
            return whole
        raise AssertionError("the optimiser has no such parameter")

    def exact(self, observe: dict[str, torch.Tensor]) -> Influence:
        """The influence of the step by forward mode in float64, on a model that is not split."""
        model = copy.deepcopy(MODELS[self.trainer.model.config.tie_word_embeddings]).double()
        if hasattr(self.trainer.model, "peft_config"):
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).double()
        values = dict(model.named_parameters())
        decayed = set(self.trainer.get_decay_parameter_names(model))
        for name, p in self.named.items():
            values[name].data.copy_(self.weight(p))
        groups = [
            {"params": [value], "weight_decay": 0.1 if name in decayed else 0.0} for name, value in values.items()
        ]
        kind, options = OPTIMIZERS[type(self.optimizer).__name__]
        optimizer = kind(groups, lr=self.trainer.lr_scheduler.get_last_lr()[0], **options)
        for name, p in self.named.items():
            state = self.state(p)
            if state:
                optimizer.state[values[name]] = {
                    key: value.view_as(values[name]) if value.ndim else value for key, value in state.items()
                }
        gradients = {name: self.gradient(p).double().view_as(values[name]) for name, p in self.named.items()}
        limit = OPTIONS["max_grad_norm"] if self.stage else None  # otherwise they are clipped already
        # ZeRO-3 puts a function of its own in the place of torch's, without derivatives of forward mode.
        with mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear):
            return predict(causal_lm(model), None, step_of(gradients, values, optimizer, None, limit), observe)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Predictor(TrainerCallback):
    """Predicts steps right before they are taken, and compares."""

    def __init__(self, trainer):
        self.trainer, self.found, self.waiting = trainer, [], contextlib.ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        engine = self.trainer.model_wrapped
        if state.global_step in PREDICTED_STEPS and hasattr(engine, "zero_optimization_stage"):
            self.waiting.enter_context(zero.before_step(engine, self.compare))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step in PREDICTED_STEPS and not hasattr(self.trainer.model_wrapped, "zero_optimization_stage"):
            self.compare()

    def on_step_end(self, args, state, control, **kwargs):
        self.waiting.close()

    def compare(self) -> None:
        split, accelerator = Split(self.trainer), self.trainer.accelerator
        alone = accelerator.num_processes == 1
        for rank in (0, 1) if alone else (accelerator.process_index,):
            observe = observers(rank)
            before = split.pieces()
            predicted, failed = self.predict(split, observe, alone)
            same = [torch.equal(a, b) for a, b in zip(before, split.pieces(), strict=True)]
            exact = split.exact(observe)
            assert predicted.parts.keys() == exact.parts.keys()
            pairs = {name: (predicted.parts[name], exact.parts[name]) for name in exact.parts}
            pairs |= {"total": (predicted.total, exact.total)}
            self.found.append(
                {
                    "step": self.trainer.state.global_step,
                    "observers": rank,
                    "method": predicted.method,
                    "same_bits": all(same) and len(same) > len(split.named),
                    "failed": failed,
                    "clip": predicted.step.clip,
                    "parts": {name: compared(*pair) for name, pair in pairs.items()},
                }
            )

    def predict(self, split: Split, observe: dict, alone: bool) -> tuple[Influence, str]:
        """The prediction; where it is one of differences, after one whose forward failed half way."""
        model = self.trainer.model
        if split.stage in (1, 2):
            return predict(causal_lm(model), None, zero.whole_step(split.engine), observe), ""
        if not split.stage:
            gradients = {name: p.grad for name, p in split.named.items()}
            step = step_of(gradients, split.named, self.trainer.optimizer, None, None)
        if alone:
            return predict(causal_lm(model), None, step, observe), ""
        if split.stage:
            pieces, step = zero.zero_shards(split.engine), zero.piecewise_step(split.engine)
        else:
            pieces, step = fsdp.fsdp_shards(model), fsdp.local_step(step)
        differences, calls, failed = CentralDifferences(pieces, step), [], ""
        label_N, item_N = causal_lm_labels(observe), row_of_label(observe)

        def forward() -> torch.Tensor:
            return fsdp.sharded_label_logp(model, observe)

        def failing() -> torch.Tensor:
            calls.append(1)
            if len(calls) == 4:
                raise FloatingPointError("the fourth forward")
            return forward()

        try:
            differences.predict(failing, label_N, item_N)
        except FloatingPointError as error:
            failed = str(error)
        return differences.predict(forward, label_N, item_N), failed


def compared(predicted, exact) -> dict:
    """How far a prediction is off, over the size of the change and over the error that it states."""
    off_N, size = (predicted.target_N - exact.target_N).abs(), float(exact.target_N.norm())
    facts = {"size": size, "off": float(off_N.norm()) / (size or 1.0), "values": predicted.target_N.tolist()}
    if predicted.error_N is None:
        return facts
    stated_N = predicted.error_N
    facts |= {"stated": float(stated_N.norm()) / (size or 1.0), "errors": stated_N.tolist()}
    # Where nothing moves, nothing is off and nothing is stated.
    shares_N = torch.where(off_N > 0, off_N / stated_N, 0.0)
    return facts | {"outside": int((shares_N > 1).sum()), "most": float(shares_N.max())}


def run(name: str, config: str, folder: Path, num_processes: int, device_options: dict) -> dict:
    planned = RUNS[name]
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    trainer = make(planned.scenario, folder, name, num_processes, **device_options)
    accelerator = trainer.accelerator
    assert accelerator.distributed_type == EXPECTED[config if num_processes > 1 else "single_gpu"], vars(accelerator)
    assert accelerator.num_processes == num_processes
    accelerator.wait_for_everyone()
    if config.startswith("zero"):
        config_of_zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        config_of_zero["stage3_param_persistence_threshold"] = 10**6 if planned.persistent else 0
        config_of_zero["stage"] = planned.stage or int(config[-1])
    predictor = Predictor(trainer)
    if planned.predicted:
        trainer.add_callback(predictor)
    trainer.train()
    split = Split(trainer)
    weights = {key: split.weight(p).clone() for key, p in split.named.items()}
    if accelerator.is_main_process:
        torch.save(weights, folder / f"{name}.pt")
    accelerator.wait_for_everyone()
    special = planned.persistent or planned.stage or planned.scenario.lora
    share = None if special else share_held(trainer, config)
    stage = split.stage
    return {
        "predictions": gather_object([predictor.found]),
        "share_held": share,
        "stage": stage,
        "log": trainer.state.log_history,
    }


def main(config: str, folder: Path, num_processes: int, names: list[str]) -> None:
    device_options = prepare_device(config if num_processes > 1 else "single_gpu")
    for name in names:
        faulthandler.dump_traceback_later(float(os.environ["SCENARIO_LIMIT"]) * 0.9)
        is_main = int(os.environ.get("RANK", 0)) == 0
        if is_main:
            (folder / "progress").write_text(name)
        facts = run(name, config, folder, num_processes, device_options)
        if is_main:
            (folder / f"{name}.part").write_text(json.dumps(facts))
            os.replace(folder / f"{name}.part", folder / f"{name}.json")
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    run_to_the_end(main)
