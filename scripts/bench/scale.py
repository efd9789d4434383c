"""A store of many probing steps, aggregated and reported: seconds, peak memory and bytes per record.

    python scripts/bench/scale.py [--quick | --full] [--probes N] [--types N] [--steps N]

The rows are generated, not trained: levels, drifts and noise are plausible, the last bits of every number random, the
worst case for compression. They are written with the store's own `write`. Aggregation and the command
`trl-dynamics report` run as processes of their own, on two cores, with the store dropped from the page cache before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from trl_dynamics.paths import metrics
from trl_dynamics.paths.kinds import RECORDS
from trl_dynamics.paths.records import probe_set_files
from trl_dynamics.probing.schema import RESPONSE_TYPES, Probe, ProbeSet
from trl_dynamics.store.store import DynamicsStore

LIMITS = {
    "report_seconds": 60,
    "report_peak_gb": 4,
    "scalars_seconds": 0.3,
    "late_write_median_ratio": 3,
    "late_write_p99_ratio": 3,
}
GOALS = {name: f"<= {limit}" for name, limit in LIMITS.items()}
# Steps of the run whose late writes are compared with its early ones; a tenth of them with --quick.
LONG = 10_000
FULL = (10_000, 13, 1_000)
# Words per prompt and per response of the copied probe set, as in the published probes.
PROMPT_WORDS, RESPONSE_WORDS = 94, 40
# Nats per token that a type has moved by the end.
DRIFTS = {"chosen": -0.15, "rejected": -1.6}
AGGREGATE = """
import sys
from trl_dynamics.paths.summary import summarise_store
from trl_dynamics.store.store import open_store
print(sum(len(summary.steps) for summary in summarise_store(open_store(sys.argv[1])).values()))
"""
# Measures a command from a process that is small itself: the peak that Linux reports starts with that of the parent.
LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = used.ru_utime + used.ru_stime
print(json.dumps([time.perf_counter() - began, cpu, used.ru_maxrss / 2**20, done.stdout]))
"""


@dataclass(frozen=True)
class Cost:
    """Of one process: wall and CPU seconds, peak resident memory in GiB, and what it printed."""

    wall: float
    cpu: float
    peak_gb: float
    output: str


class Generator:
    """Records of one model, a step at a time, the same for the same seed.

    Args:
        num_probes, num_types, num_steps (`int`): How many.
    """

    def __init__(self, num_probes: int, num_types: int, num_steps: int):
        rng = np.random.default_rng(0)
        self.types = list(RESPONSE_TYPES)[:num_types]
        self.num_probes, self.num_steps = num_probes, num_steps
        self.probe_ids = [f"probe-{index:06d}" for index in range(num_probes)]
        self.num_rows = num_probes * len(self.types)
        self._keys = {
            "model": pa.array(["policy"] * self.num_rows),
            "probe_id": pa.array(np.repeat(self.probe_ids, len(self.types))),
            "response_type": pa.array(self.types * num_probes),
            "num_tokens": rng.integers(20, 200, self.num_rows).astype(np.int32),
            "truncated": rng.random(self.num_rows) < 0.02,
        }
        self._level = -0.8 - 1.2 * rng.random(self.num_rows)
        drift = [DRIFTS.get(name, -0.6) for name in self.types]
        self._drift = np.tile(drift, num_probes) * (1 + 0.3 * rng.standard_normal(self.num_rows))

    def probe_set(self) -> ProbeSet:
        """Texts of the usual length, made of few words."""
        words = np.array("the answer to this question is that one may also see how it was done before".split())
        rng = np.random.default_rng(1)
        prompts = [" ".join(row) for row in words[rng.integers(0, len(words), (self.num_probes, PROMPT_WORDS))]]
        texts = words[rng.integers(0, len(words), (self.num_probes, len(self.types), RESPONSE_WORDS))]
        probes = (
            Probe(probe_id, prompt, {name: " ".join(row) for name, row in zip(self.types, rows, strict=True)})
            for probe_id, prompt, rows in zip(self.probe_ids, prompts, texts, strict=True)
        )
        return ProbeSet(tuple(probes), name="simulated", required_types=())

    def columns(self, step: int) -> dict:
        """Columns of the written schema at one step."""
        rng = np.random.default_rng([2, step])
        done = step / max(self.num_steps - 1, 1)
        noise = 0.05 * rng.standard_normal((3, self.num_rows)) * (step > 0)
        tokens = self._keys["num_tokens"]
        logp = np.minimum(self._level + self._drift * done + noise[0], -0.01)
        prob, spread = np.exp(logp), rng.random((4, self.num_rows))
        top = np.minimum(logp + 0.4 + 0.3 * done + 0.2 * spread[0], -0.001)
        means = {
            "prob_mean": prob,
            "argmax_match_mean": 0.3 + 0.4 * spread[1],
            "entropy_mean": 1.8 - 0.4 * done + noise[1],
            "sum_sq_mean": 0.2 + 0.2 * spread[2],
            "topk_mass_mean": 0.7 + 0.2 * spread[3],
            "rest_mass_mean": (1 - prob) * (0.6 - 0.1 * done),
            "logp_mean": logp,
        }
        sums = {"logp_sum": logp * tokens, "argmax_logp_sum": top * tokens, "star_logp_sum": (top - 0.5) * tokens}
        ends = {"eos_logp": np.where(self._keys["truncated"], np.nan, -0.5 - 0.3 * done + noise[2])}
        return self._keys | {"step": np.full(self.num_rows, step)} | means | sums | ends

    def write(self, folder: Path) -> DynamicsStore:
        """All steps as the store of a finished DPO run."""
        store, probes = DynamicsStore(folder), self.probe_set()
        about = {"name": probes.name, "fingerprint": probes.fingerprint, "num_probes": len(probes)}
        meta = {"method": "dpo", "status": "finished", "probe_set": about | {"counts": probes.counts}}
        store.create(meta, {"beta": 0.1}, probe_set_files(probes))
        for step in range(self.num_steps):
            store.write(step, {RECORDS: RECORDS.table(self.columns(step))})
        return store


def main(argv: list[str] | None = None) -> int:
    """Generate, aggregate, report; print a table and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="10 steps: 1.3 million rows, under 50 s on two cores")
    size.add_argument("--full", action="store_true", help="1,000 steps: 130 million rows, about 10 GB of disk")
    parser.add_argument("--probes", type=int, default=FULL[0])
    parser.add_argument("--types", type=int, default=FULL[1])
    parser.add_argument("--steps", type=int, help="by default 100")
    args = parser.parse_args(argv)
    steps = args.steps or (10 if args.quick else FULL[2] if args.full else 100)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    generator = Generator(args.probes, args.types, steps)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        ratios = measure(generator, Path(folder), LONG // 10 if args.quick else LONG)
    met = all(ratios[name] <= limit for name, limit in LIMITS.items())
    goal = FULL[0] * FULL[1] * FULL[2]
    if ratios["rows"] < goal:
        print(f"The goals are for {goal:,} rows; this run has {ratios['rows']:,}.")
    shown = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps({"name": "scale", "ratios": shown, "goals": GOALS, "met": met}))
    return 0


def measure(generator: Generator, folder: Path, long: int) -> dict[str, float]:
    """Every number of the table, which is printed on the way; `long` steps in the run whose writes are timed."""
    num_rows = generator.num_rows * generator.num_steps
    print(f"{generator.num_probes:,} probes x {len(generator.types)} types x {generator.num_steps:,} steps")
    began = time.perf_counter()
    store = generator.write(folder / "run")
    seconds, num_files = time.perf_counter() - began, len(store.files(RECORDS))
    began = time.perf_counter()
    store.compact()
    merging = time.perf_counter() - began
    num_bytes = sum(path.stat().st_size for path in store.files(RECORDS))
    row("rows", f"{num_rows:,}")
    row("store", f"{num_bytes / 1e9:.2f} GB, {num_bytes / num_rows:.1f} bytes per record")
    row("generated and written", f"{seconds:.1f} s, {seconds / generator.num_steps * 1e3:.0f} ms per step")
    row("merged, as a run's end", f"{num_files:,} files to {len(store.files(RECORDS)):,} in {merging:.1f} s")
    one = one_step(generator, folder / "step") | long_run(folder / "long", long)
    row("load average before", ", ".join(f"{load:.2f}" for load in os.getloadavg()))
    forget(store)
    aggregated = run_apart("-c", AGGREGATE, str(store.output_dir))
    assert int(aggregated.output) == generator.num_steps, "steps were lost"
    row("aggregate", cost(aggregated))
    forget(store)
    page = folder / "page.html"
    reported = run_apart("-m", "trl_dynamics.cli.main", "report", str(store.output_dir), "-o", str(page))
    row("report", f"{cost(reported)}; page of {page.stat().st_size / 1e6:.1f} MB")
    ratios = {"rows": num_rows, "bytes_per_record": num_bytes / num_rows, **one}
    for name, spent in (("aggregate", aggregated), ("report", reported)):
        ratios |= {f"{name}_seconds": spent.wall, f"{name}_cpu_seconds": spent.cpu, f"{name}_peak_gb": spent.peak_gb}
    return ratios


def one_step(generator: Generator, folder: Path) -> dict[str, float]:
    """What the main process does at one probing step besides scoring, in seconds; best of three."""
    before, store, times = RECORDS.table(generator.columns(0)).to_pandas(), DynamicsStore(folder), []
    store.create({}, {}, {})
    for step in (1, 2, 3):
        lists = {name: values.tolist() for name, values in generator.columns(step).items()}
        marks = [time.perf_counter()]
        table = RECORDS.table(lists)
        marks.append(time.perf_counter())
        store.write(step, {RECORDS: table})
        marks.append(time.perf_counter())
        frame = table.to_pandas()
        metrics.scalars(pd.concat([before, frame], ignore_index=True))
        marks.append(time.perf_counter())
        times.append(np.diff(marks))
    names = ("to_table_seconds", "write_seconds", "scalars_seconds")
    found = dict(zip(names, np.min(times, axis=0).tolist(), strict=True))
    row("main process, one step", ", ".join(f"{name.removesuffix('_seconds')} {s:.3f} s" for name, s in found.items()))
    return found


def long_run(folder: Path, num_steps: int) -> dict[str, float]:
    """What a write costs after `num_steps` steps, as a multiple of what it costs after 100: a few rows per step, so
    that all of it is the store's own."""
    small = Generator(2, 4, num_steps + 200)
    store, seconds = DynamicsStore(folder), []
    store.create({}, {}, {})
    for step in range(num_steps + 200):
        table = RECORDS.table(small.columns(step))
        began = time.perf_counter()
        store.write(step, {RECORDS: table})
        seconds.append(time.perf_counter() - began)
    early, late = np.array(seconds[100:300]), np.array(seconds[num_steps:])
    found = {"median": np.median(late) / np.median(early), "p99": np.quantile(late, 0.99) / np.quantile(early, 0.99)}
    for name, times in (("100", early), (f"{num_steps:,}", late)):
        median, p99 = (1e3 * np.quantile(times, q) for q in (0.5, 0.99))
        row(f"write after {name}", f"median {median:.1f} ms, 99 % below {p99:.1f} ms (200 writes)")
    return {f"late_write_{name}_ratio": float(ratio) for name, ratio in found.items()}


def run_apart(*arguments: str) -> Cost:
    """Run Python with `arguments` and measure that process alone."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, *arguments]
    return Cost(*json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def forget(store: DynamicsStore) -> None:
    """Drop the store's files from the page cache, so that they are read from the disk."""
    for path in store.files(RECORDS):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cost(spent: Cost) -> str:
    return f"{spent.wall:.1f} s wall, {spent.cpu:.1f} s CPU, peak {spent.peak_gb:.2f} GB"


def row(label: str, text: str) -> None:
    print(f"{label:<24}{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
