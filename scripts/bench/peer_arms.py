"""One other tool on the pairs that peers.py wrote down, run by the interpreter of the environment that has the tool.

    PEERS_PYTHON scripts/bench/peer_arms.py TOOL FOLDER UPDATE_BATCH OBSERVE_BATCH ATTENTION

Prints one JSON object with CPU seconds and MB, and leaves the products in FOLDER. Imports nothing of this project but
its clock, so that the environment needs torch, transformers and the tool alone.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import AutoModelForCausalLM


def main(tool: str, folder: str, update_batch: str, observe_batch: str, attention: str) -> int:
    """Measure one tool in forks of its own: once for its time, once for its memory."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", attn_implementation=attention).eval()
    update, observe = (TensorDataset(torch.load(Path(folder) / f"{side}.pt")) for side in ("update", "observe"))
    sizes = int(update_batch), int(observe_batch)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        call = TOOLS[tool](model, scratch)
        few = [Subset(side, range(2)) for side in (update, observe)]
        run = measure.time_and_memory(
            lambda: call(update, observe, *sizes, "all").numpy(), lambda: call(*few, 2, 2, "few")
        )
    torch.save(torch.from_numpy(run.result), Path(folder) / f"{tool}.pt")
    print(json.dumps({"seconds": run.seconds, "megabytes": run.megabytes, "torch": torch.__version__}))
    return 0


def negative_logp(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """The sum of -ln pi of all tokens but the first of each row."""
    logits_NV, label_N = logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits_NV, label_N, reduction="sum")


def kronfluence(model: torch.nn.Module, scratch: str) -> Callable[..., torch.Tensor]:
    """Pairwise scores with the identity for the Hessian, over linear layers: (O, U)."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Rows(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return negative_logp(model(input_ids=batch[0], use_cache=False).logits, batch[0])

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = Rows()
    analyzer = Analyzer("rows", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=scratch)

    def scores(update, observe, update_batch: int, observe_batch: int, name: str) -> torch.Tensor:
        name = f"{name}-{os.getpid()}"  # it takes up what it finds on disk
        analyzer.compute_pairwise_scores(
            scores_name=name,
            factors_name="identity",
            query_dataset=observe,
            train_dataset=update,
            per_device_query_batch_size=observe_batch,
            per_device_train_batch_size=update_batch,
        )
        return analyzer.load_pairwise_scores(name)["all_modules"]

    analyzer.fit_all_factors(
        "identity", TensorDataset(torch.zeros(1, 2).long()), factor_args=FactorArguments("identity")
    )
    return scores


def dattri(model: torch.nn.Module, scratch: str) -> Callable[..., torch.Tensor]:
    """TracIn with one checkpoint of weight 1 over all parameters, its random projection off: (O, U)."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(parameters, data):
        ids_1T = data[0][None]
        logits = torch.func.functional_call(model, parameters, (), {"input_ids": ids_1T, "use_cache": False}).logits
        return negative_logp(logits, ids_1T)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = TracInAttributor(task=task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None  # None given above would leave its default, 512 dimensions, in place

    def scores(update, observe, update_batch: int, observe_batch: int, name: str) -> torch.Tensor:
        sides = DataLoader(update, update_batch), DataLoader(observe, observe_batch)
        return attributor.attribute(*sides).T

    return scores


TOOLS = {"kronfluence": kronfluence, "dattri": dattri}


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
