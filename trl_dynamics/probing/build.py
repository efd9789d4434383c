"""From preference or prompt/completion data to a validated probe set."""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trl_dynamics.probing import card
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.builders import (
    BUILDERS,
    NEED_HELD_OUT,
    CannotBuild,
    Material,
    build_one,
    has_permutation,
    shipped_text,
)
from trl_dynamics.probing.check import seam_case
from trl_dynamics.probing.generated import (
    OWN_ANSWERS,
    Generation,
    Rejected,
    generate_responses,
    is_generated,
)
from trl_dynamics.probing.rephrase import REPHRASES
from trl_dynamics.probing.rows import Pair, count_reasons, read_pairs
from trl_dynamics.probing.schema import REQUIRED_TYPES, WITHOUT_REJECTED, Probe, ProbeSet, order_types

SELECTIONS = ("random", "first")
# Held-out answers kept to draw from; more would cost memory and add nothing.
MAX_HELD_OUT = 2000
# Probes of a set whose size nobody gave.
DEFAULT_PROBES = 500


@dataclass(frozen=True)
class Built:
    """A probe set, and the generated responses that were not kept."""

    probe_set: ProbeSet
    rejected: tuple[Rejected, ...] = ()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the set, its card and the list of rejected responses; see [`probing.io.write_folder`]."""
        files = {card.CARD_NAME: card.dataset_card(self.probe_set)}
        if self.rejected:
            lines = [json.dumps(asdict(item), ensure_ascii=False) for item in self.rejected]
            files[card.REJECTED_FILE] = "\n".join(lines) + "\n"
        return probe_io.write_folder(self.probe_set, folder, files, overwrite=overwrite)

    def lines(self) -> list[str]:
        """What was built and what is missing, for the terminal."""
        about, total = self.probe_set.metadata, len(self.probe_set)
        found = [f"{total} probes", *(f"  {name:<28} {count:>6}" for name, count in self.probe_set.counts.items())]
        for key, what in (
            ("unusable_rows", "rows that could not be used"),
            ("not_built", "responses that could not be built"),
            ("rejected", f"generated and not kept, listed in {card.REJECTED_FILE}"),
            ("failures", "left out because no answer came"),
        ):
            if about.get(key):
                found += [f"{what}:", *(f"  {count:>6}  {reason}" for reason, count in about[key].items())]
        for part in (about.get("own_answers"), *about.get("rephrases", ())):
            if part:
                found.append(
                    f"answers of {part['by'] if 'by' in part else part['model']}: "
                    f"{part['generated']} new, {part['from_cache']} from the cache"
                )
        if "rejected" not in self.probe_set.response_types:
            found.append(f"no rejected answers: {WITHOUT_REJECTED}")
        return found


def build(
    rows: Iterable[Mapping],
    *,
    held_out: Iterable[Mapping] | None = None,
    types: Sequence[str] | None = None,
    num_probes: int | None = None,
    seed: int = 0,
    select: str = "random",
    extra_columns: Mapping[str, str] | None = None,
    generation: Generation | None = None,
    sentences: Sequence[str] = (),
    dictionary: Sequence[str] = (),
    name: str = "probes",
    metadata: Mapping | None = None,
) -> Built:
    """A probe set over training data.

    Args:
        rows (`Iterable[Mapping]`): Training rows in one of TRL's formats (see [`read_pairs`]); read once.
        held_out (`Iterable[Mapping]`, *optional*): Rows that are not trained on, for `other_test` and its permutation.
        types (`Sequence[str]`, *optional*): Response types; by default all that the data and `generation` allow, but
            for `sampled_k`.
        num_probes (`int`, *optional*): Pairs to probe. None: 500, or all where the data has fewer.
        seed (`int`, *optional*): Of the selection and of every draw.
        select (`str`, *optional*): `"random"` takes pairs by a hash of seed and content, so that the order of the rows
            does not matter; `"first"` takes the first ones, as the published sets do.
        extra_columns (`Mapping[str, str]`, *optional*): Column to response type, for answers already in the data.
        generation ([`Generation`], *optional*): Who writes the types that a model has to write.
        sentences, dictionary (`Sequence[str]`, *optional*): Instead of the sentences and words of this package.
        name (`str`, *optional*): Of the set.
        metadata (`Mapping`, *optional*): Added to the set's own.

    Raises:
        ValueError: If a row is malformed, a type is unknown or cannot be built from this data, fewer usable rows
            exist than `num_probes` asks for, or a model gave no answer; the row, the field and the remedy are named.
    """
    generation = generation or Generation()
    extra_columns = dict(extra_columns or {})
    _check_arguments(types, num_probes, select, extra_columns)
    read = read_pairs(rows, extra_columns=extra_columns)
    if types is None or any(name.endswith("_permuted") for name in types):
        read = map(_without_one_word_answers, read)
    chosen = _select(read, num_probes, seed, select)
    pairs = chosen.pairs
    held_out_answers, num_leaked = _held_out_answers(held_out, chosen.answers, seed)
    wanted = _wanted_types(types, pairs, held_out_answers, generation)
    wanted = [name for name in wanted if name not in extra_columns.values()]
    material = Material(
        seed,
        tuple(sorted({pair.chosen.strip() for pair in pairs})),
        held_out_answers,
        tuple(sentences) or shipped_text("prose"),
        tuple(dictionary) or shipped_text("words"),
    )
    missing: Counter[str] = Counter()
    free = [name for name in wanted if not is_generated(name)]
    probes = [build_probe(pair, free, material, missing) for pair in pairs]
    made = generate_responses(pairs, [name for name in wanted if is_generated(name)], generation, seed)
    for pair, probe in zip(pairs, probes, strict=True):
        probe.responses.update({n: made.texts[pair.key, n] for n in wanted if (pair.key, n) in made.texts})
    required = tuple(name for name in REQUIRED_TYPES if all(name in p.responses for p in probes))
    about = {
        "seed": seed,
        "select": select,
        "num_rows": chosen.num_rows,
        "unusable_rows": chosen.unusable,
        **(
            {}
            if held_out is None
            else {
                "held_out_answers": len(held_out_answers),
                "held_out_answers_dropped_as_train_answers": num_leaked,
            }
        ),
        "not_built": dict(sorted(missing.items())),
        "versions": card.versions(),
    }
    return Built(
        ProbeSet(tuple(probes), name, dict(metadata or {}) | about | made.about, required), tuple(made.rejected)
    )


def build_probe(pair: Pair, types: Sequence[str], material: Material, missing: Counter | None = None) -> Probe:
    """The probe of one pair; what cannot be built is left out and counted in `missing` by type and reason."""
    responses = {}
    for response_type in types:
        try:
            responses[response_type] = build_one(response_type, pair, material)
        except CannotBuild as reason:
            if missing is not None:
                missing[f"{response_type}: {reason}"] += 1
    return Probe(pair.probe_id, pair.prompt, responses | dict(pair.extra))


def settle_seams(built: Built, tokenizer: PreTrainedTokenizerBase) -> Built:
    """The set without generated responses whose first letters join the prompt's last token; they become rejected ones.

    Raises:
        ValueError: If a response of the data does so: with the probe, the response type and the two token strings.
    """
    rejected = list(built.rejected)
    for probe in built.probe_set:
        for name in order_types(probe.responses):
            case = seam_case(probe, name, tokenizer)
            if case and is_generated(name):
                rejected.append(
                    Rejected(probe.probe_id, name, "joins the prompt's last token", probe.responses.pop(name))
                )
            elif case:
                raise ValueError(
                    f"{case}. Begin the responses, or end the prompts, with white space that the tokenizer keeps apart"
                )
    joined = rejected[len(built.rejected) :]
    if joined:
        counts = Counter(f"{item.response_type}: {item.reason}" for item in joined)
        about = built.probe_set.metadata.get("rejected", {}) | dict(sorted(counts.items()))
        built.probe_set.metadata["rejected"] = about
    return Built(built.probe_set, tuple(rejected))


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


def _check_arguments(
    types: Sequence[str] | None, num_probes: int | None, select: str, extra: Mapping[str, str]
) -> None:
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}, expected at least 1")
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}, expected one of {', '.join(SELECTIONS)}")
    unknown = [name for name in types or () if name not in BUILDERS and not is_generated(name)]
    if unknown:
        known = [*BUILDERS, *OWN_ANSWERS, *REPHRASES, "sampled_1, sampled_2, ..."]
        raise ValueError(
            f"response type {unknown[0]!r} cannot be built; expected some of {', '.join(known)}. Answers that your "
            "data has already become a type with --columns COLUMN=TYPE"
        )
    taken = [name for name in extra.values() if name in REQUIRED_TYPES]
    if taken:
        raise ValueError(f"a column cannot become response type {taken[0]!r}; rename the column itself to it")


def _rank(seed: int, pair: Pair) -> str:
    return hashlib.sha256(f"{seed}/{pair.key}".encode()).hexdigest()


def _without_one_word_answers(item: Pair | str) -> Pair | str:
    # They have no permutation, so that their probes would lack types that all others have.
    if isinstance(item, str) or has_permutation(item.chosen):
        return item
    return f"{item.where} has a chosen without two different words to permute"


@dataclass
class _Selection:
    pairs: list[Pair]
    num_rows: int
    unusable: dict[str, int]
    # Digests of every usable training answer, so that no held-out answer is one of them.
    answers: set[bytes]


def _select(read: Iterable[Pair | str], num_probes: int | None, seed: int, select: str) -> _Selection:
    most = DEFAULT_PROBES if num_probes is None else num_probes
    num_rows, keys, answers, reasons = 0, set(), set(), []

    def usable() -> Iterator[Pair]:
        """Pairs that no earlier row has; counts all rows, collects reasons of the unusable and digests of answers."""
        nonlocal num_rows
        for item in read:
            num_rows += 1
            if isinstance(item, str):
                reasons.append(item)
            elif (key := bytes.fromhex(item.key)) not in keys:
                keys.add(key)
                answers.add(_digest(item.chosen))
                yield item

    if select == "random":
        pairs = heapq.nsmallest(most, usable(), key=lambda pair: _rank(seed, pair))
    else:
        pairs = [pair for index, pair in enumerate(usable()) if index < most]
    num_repeated = num_rows - len(keys) - len(reasons)
    unusable = count_reasons(reasons) | ({"repeats an earlier row": num_repeated} if num_repeated else {})
    if len(pairs) < (1 if num_probes is None else num_probes):
        listed = "; ".join([f"{what}: {count}" for what, count in unusable.items()] + reasons[:1])
        raise ValueError(
            f"{num_probes or 'some'} probes were asked for, but of {num_rows} rows only {len(pairs)} are usable"
            f"{f' ({listed})' if listed else ''}; give more data, or leave --num_probes out to take all that there are"
        )
    return _Selection(pairs, num_rows, unusable, answers)


def _held_out_answers(
    held_out: Iterable[Mapping] | None, trained: set[bytes], seed: int
) -> tuple[tuple[str, ...], int]:
    """Distinct held-out answers that are no training answers, sorted, and how many others were left out."""
    if held_out is None:
        return (), 0
    read = map(_without_one_word_answers, read_pairs(held_out, source="held-out data"))
    usable = (pair for pair in read if isinstance(pair, Pair))
    answers = {pair.chosen.strip() for pair in heapq.nsmallest(MAX_HELD_OUT, usable, key=lambda p: _rank(seed, p))}
    kept = tuple(sorted(text for text in answers if _digest(text) not in trained))
    return kept, len(answers) - len(kept)


def _digest(answer: str) -> bytes:
    return hashlib.sha256(answer.strip().encode("utf-8", "surrogatepass")).digest()[:16]


def _wanted_types(
    types: Sequence[str] | None, pairs: list[Pair], held_out_answers: Sequence[str], generation: Generation
) -> list[str]:
    impossible = {name: "held-out data: pass --held_out" for name in NEED_HELD_OUT if not held_out_answers}
    if any(pair.rejected is None for pair in pairs):
        impossible |= {
            name: "a rejected answer in every row"
            for name in ("rejected", *(name for name, kind in REPHRASES.items() if kind.source == "rejected"))
        }
    generated = {name for name in (*OWN_ANSWERS, *REPHRASES, *(types or ())) if is_generated(name)}
    impossible |= {name: what for name in generated if (what := generation.missing_for(name))}
    if types is None:
        return order_types(name for name in (*BUILDERS, *OWN_ANSWERS, *REPHRASES) if name not in impossible)
    for name in types:
        if name in impossible:
            raise ValueError(f"response type {name!r} needs {impossible[name]}, or leave it out of --types")
    return order_types(["chosen", *types])
