"""From preference or prompt/completion data to a validated probe set."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trl_dynamics.probing.builders import BUILDERS, NEED_HELD_OUT, CannotBuild, Material, build_one, shipped_text
from trl_dynamics.probing.rows import Pair, count_reasons, read_pairs
from trl_dynamics.probing.schema import Probe, ProbeSet, order_types

SELECTIONS = ("random", "first")
# Held-out answers kept to draw from; more would cost memory and add nothing.
MAX_HELD_OUT = 2000


def build_probe_set(
    rows: Iterable[Mapping],
    *,
    held_out: Iterable[Mapping] | None = None,
    types: Sequence[str] | None = None,
    num_probes: int = 500,
    seed: int = 0,
    select: str = "random",
    extra_columns: Mapping[str, str] | None = None,
    sentences: Sequence[str] = (),
    dictionary: Sequence[str] = (),
    name: str = "probes",
    metadata: Mapping | None = None,
) -> ProbeSet:
    """A probe set over the given training rows, made without any generator.

    Args:
        rows (`Iterable[Mapping]`): Training rows in one of TRL's formats (see [`read_pairs`]); read once.
        held_out (`Iterable[Mapping]`, *optional*): Rows that are not trained on, for `other_test` and its permutation.
        types (`Sequence[str]`, *optional*): Response types; by default all that the data allows.
        num_probes (`int`, *optional*): Pairs to probe.
        seed (`int`, *optional*): Of the selection and of every draw.
        select (`str`, *optional*): `"random"` takes pairs by a hash of seed and content, so that the order of the rows
            does not matter; `"first"` takes the first ones, as the published sets do.
        extra_columns (`Mapping[str, str]`, *optional*): Column to response type, for answers already in the data.
        sentences, dictionary (`Sequence[str]`, *optional*): Instead of the sentences and words of this package.
        name (`str`, *optional*): Of the set.
        metadata (`Mapping`, *optional*): Added to the set's own.

    Raises:
        ValueError: If a row is malformed, a type is unknown or cannot be built from this data, or fewer than
            `num_probes` usable rows exist; the row, the field and the remedy are named.
    """
    _check_arguments(types, num_probes, select, extra_columns or {})
    unusable: list[str] = []
    pairs, num_rows, num_repeated = _select(
        read_pairs(rows, extra_columns=extra_columns), num_probes, seed, select, unusable
    )
    if len(pairs) < num_probes:
        raise ValueError(
            f"{num_probes} probes were asked for, but of {num_rows} rows only {len(pairs)} are usable "
            f"({_listed(count_reasons(unusable) | {'repeated': num_repeated})}); ask for fewer or give more data"
        )
    held_out_answers, leaked = _held_out_answers(held_out, pairs, seed)
    wanted = _wanted_types(types, pairs, held_out_answers)
    material = Material(
        seed,
        tuple(sorted({pair.chosen.strip() for pair in pairs})),
        held_out_answers,
        tuple(sentences) or shipped_text("prose"),
        tuple(dictionary) or shipped_text("words"),
    )
    missing: Counter[str] = Counter()
    probes = tuple(build_probe(pair, wanted, material, missing) for pair in pairs)
    required = tuple(name for name in ("chosen", "rejected") if all(name in p.responses for p in probes))
    about = dict(metadata or {}) | {
        "seed": seed,
        "select": select,
        "num_rows": num_rows,
        "unusable_rows": count_reasons(unusable) | ({"repeated": num_repeated} if num_repeated else {}),
        "held_out_answers": len(held_out_answers),
        "held_out_answers_dropped_as_train_answers": leaked,
        "not_built": dict(sorted(missing.items())),
    }
    return ProbeSet(probes, name, about, required)


def build_probe(pair: Pair, types: Sequence[str], material: Material, missing: Counter | None = None) -> Probe:
    """The probe of one pair; what cannot be built is left out and counted in `missing` by type and reason."""
    responses = {}
    for response_type in types:
        try:
            responses[response_type] = build_one(response_type, pair, material)
        except CannotBuild as reason:
            if missing is not None:
                missing[f"{response_type}: {reason}"] += 1
    return Probe(pair.key[:16], pair.prompt, responses | dict(pair.extra))


def read_lines(path: str | Path, what: str) -> tuple[str, ...]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: If the file does not exist, is not UTF-8 or has none.
    """
    try:
        lines = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error}; expected a UTF-8 text file") from error
    if not lines:
        raise ValueError(f"{what} {str(path)!r} has no text; expected one entry per line")
    return lines


def _check_arguments(types: Sequence[str] | None, num_probes: int, select: str, extra: Mapping[str, str]) -> None:
    if num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}, expected at least 1")
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}, expected one of {', '.join(SELECTIONS)}")
    unknown = [name for name in types or () if name not in BUILDERS]
    if unknown:
        raise ValueError(
            f"response type {unknown[0]!r} cannot be built; expected some of {', '.join(BUILDERS)}. Answers that your "
            "data has already become a type with --columns COLUMN=TYPE"
        )
    taken = [name for name in extra.values() if name in BUILDERS]
    if taken:
        raise ValueError(f"a column cannot become response type {taken[0]!r}, which is built; choose another name")


def _rank(seed: int, pair: Pair) -> str:
    return hashlib.sha256(f"{seed}/{pair.key}".encode()).hexdigest()


def _select(
    read: Iterable[Pair | str], num_probes: int, seed: int, select: str, unusable: list[str]
) -> tuple[list[Pair], int, int]:
    """The pairs to probe, the number of rows read, and how many repeated an earlier one word for word."""
    num_rows, seen = 0, set()

    def usable():
        nonlocal num_rows
        for item in read:
            num_rows += 1
            if isinstance(item, str):
                unusable.append(item)
            elif item.key in seen:
                continue
            else:
                seen.add(item.key)
                yield item

    if select == "random":
        chosen = heapq.nsmallest(num_probes, usable(), key=lambda pair: _rank(seed, pair))
    else:
        chosen = [pair for index, pair in enumerate(usable()) if index < num_probes]
    return chosen, num_rows, num_rows - len(seen) - len(unusable)


def _held_out_answers(held_out: Iterable[Mapping] | None, pairs: list[Pair], seed: int) -> tuple[tuple[str, ...], int]:
    """Distinct held-out answers that no probed pair has, sorted, and how many such pairs had were left out."""
    if held_out is None:
        return (), 0
    usable = (pair for pair in read_pairs(held_out, source="held-out data") if isinstance(pair, Pair))
    answers = {pair.chosen.strip() for pair in heapq.nsmallest(MAX_HELD_OUT, usable, key=lambda p: _rank(seed, p))}
    trained = {pair.chosen.strip() for pair in pairs}
    return tuple(sorted(answers - trained)), len(answers & trained)


def _wanted_types(types: Sequence[str] | None, pairs: list[Pair], held_out_answers: Sequence[str]) -> list[str]:
    impossible = {name: "held-out data: pass --held_out" for name in NEED_HELD_OUT if not held_out_answers}
    if any(pair.rejected is None for pair in pairs):
        impossible["rejected"] = "a rejected answer in every row"
    if types is None:
        return order_types(name for name in BUILDERS if name not in impossible)
    for name in types:
        if name in impossible:
            raise ValueError(f"response type {name!r} needs {impossible[name]}, or leave it out of --types")
    return order_types(["chosen", *types])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in counts.items() if count) or "no reason"
