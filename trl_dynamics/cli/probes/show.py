"""trl-dynamics probes show: a probe set as readable text."""

import shutil
import textwrap
from dataclasses import dataclass

from trl_dynamics.cli import sources
from trl_dynamics.cli.options import argument, option, read
from trl_dynamics.probing.schema import Probe, ProbeSet, group_of, order_types


@dataclass
class ShowArguments:
    """Options of `trl-dynamics probes show`."""

    probe_set: str = argument("folder, .jsonl or .parquet file, hub dataset, or 'embedded'")
    num: int = option(3, "probes to show (default 3)", "-n")
    probe_id: list[str] | None = option(None, "show these instead of the first ones")
    types: list[str] | None = option(None, "show these response types only")
    full: bool = option(False, "whole texts instead of one line each")


def run(argv: list[str]) -> int:
    """Print the set's types and some of its probes.

    Raises:
        ValueError: If there is no such set or probe.
    """
    args = read(ShowArguments, argv, "probes show", __doc__)
    probe_set = sources.find_probe_set(args.probe_set, None)
    if args.num < 0:
        raise ValueError(f"--num is {args.num}, expected at least 0")
    print(*overview(probe_set), sep="\n")
    for probe in _selected(probe_set, args.probe_id, args.num):
        print("", *table(probe, args.types, args.full, shutil.get_terminal_size((120, 24)).columns), sep="\n")
    return 0


def overview(probe_set: ProbeSet) -> list[str]:
    """Name, size, fingerprint and a line per response type."""
    lines = [f"{probe_set.name}: {len(probe_set)} probes, fingerprint {probe_set.fingerprint[:12]}"]
    lines += [f"  {name:<28} {group_of(name):<16} {count:>6}" for name, count in probe_set.counts.items()]
    return lines


def table(probe: Probe, types: list[str] | None, full: bool, width: int) -> list[str]:
    """One probe: its prompt and a line, or the whole text, per response type."""
    prompt = probe.prompt
    if probe.is_conversational:
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    names = [name for name in order_types(probe.responses) if not types or name in types]
    rows = {"prompt": prompt, **{name: probe.responses[name] for name in names}}
    lines = [f"probe {probe.probe_id}"]
    for name, text in rows.items():
        if full:
            lines += [f"  {name}:", textwrap.indent(text.strip("\n"), "    ")]
        else:
            # The end of a dialogue says what is asked.
            text, room = " ".join(text.split()), max(20, width - 32)
            cut = f"…{text[-room + 1 :]}" if name == "prompt" else f"{text[: room - 1]}…"
            lines.append(f"  {name:<28} {text if len(text) <= room else cut}")
    return lines


def _selected(probe_set: ProbeSet, probe_ids: list[str] | None, num: int) -> list[Probe]:
    if probe_ids is None:
        return list(probe_set)[:num]
    by_id = {probe.probe_id: probe for probe in probe_set}
    unknown = [probe_id for probe_id in probe_ids if probe_id not in by_id]
    if unknown:
        raise ValueError(f"the set has no probe {unknown[0]!r}; its ids begin {list(by_id)[:3]}")
    return [by_id[probe_id] for probe_id in probe_ids]
