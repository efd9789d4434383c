"""trl-dynamics probes build: preference or prompt/completion data -> a probe set's folder."""

import logging
from pathlib import Path

import trl

from trl_dynamics import loading
from trl_dynamics.cli import inputs, options, sources
from trl_dynamics.cli.probes.columns import parse_columns
from trl_dynamics.cli.probes.generation import BuildArguments, DataArguments, generation_of
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.build import DEFAULT_PROBES, Built, build, read_lines, settle_seams
from trl_dynamics.probing.cache import AnswerCache

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """Build a set, check its boundaries if a model is given, and write it with its card.

    Raises:
        ValueError: If an option, the data or a row is wrong; then nothing is written but answers already paid for.
    """
    args, mixture = parse(BuildArguments, argv, "build")
    probe_io.refuse_existing(args.output_dir, args.overwrite)
    built = build_from(args, mixture)
    folder = built.save(args.output_dir, overwrite=args.overwrite)
    for line in built.lines():
        print(line)
    if args.num_probes is None and len(built.probe_set) < DEFAULT_PROBES:
        print(f"these are all usable rows; without --num_probes a set takes up to {DEFAULT_PROBES}")
    print(f"probe set: {folder}")
    return 0


def parse(arguments: type, argv: list[str], action: str) -> tuple:
    """The options of an action, from the line and its --config file, and the data mixture in the latter.

    Raises:
        ValueError: If an option is unknown or the output folder is not given.
    """
    name = f"probes {action}"
    args, mixture, unknown = options.parse(options.parser_of((arguments, trl.DatasetMixtureConfig), name), argv)
    options.refuse_unknown(unknown, name)
    if not args.output_dir:
        raise ValueError("-o (--output_dir) is missing: the folder to write")
    return args, mixture


def build_from(args: BuildArguments, mixture: trl.DatasetMixtureConfig) -> Built:
    """The set that the options describe."""
    columns = parse_columns(args.columns)
    sentences = read_lines(args.human_text, "--human_text") if args.human_text else ()
    dictionary = read_lines(args.dictionary, "--dictionary") if args.dictionary else ()
    splits = inputs.load_splits(args, mixture)
    rows = inputs.take_split(splits, args.split)
    rows = rows if args.dataset_num_rows is None else rows.take(args.dataset_num_rows)
    held_out, held_out_source = _held_out(args, splits)
    cache_path = args.cache or f"{args.output_dir.rstrip('/')}.answers.jsonl"
    with AnswerCache(cache_path if args.model or args.rephraser else None) as cache:
        generation = generation_of(args, cache)
        built = build(
            rows,
            held_out=held_out,
            types=args.types or None,
            num_probes=args.num_probes,
            seed=args.seed,
            select=args.select,
            extra_columns=columns,
            generation=generation,
            sentences=sentences,
            dictionary=dictionary,
            name=args.name or Path(args.output_dir).name,
            metadata={
                "source": _source_name(args, mixture),
                "held_out_source": held_out_source,
                "license": args.license or _stated_license(args, rows),
            },
        )
    if args.model:
        model = sources.find_model(args.model)
        tokenizer = loading.load_tokenizer(model, trust_remote_code=args.trust_remote_code)
        built = settle_seams(built, tokenizer)
    return built


def _held_out(args: BuildArguments, splits) -> tuple[object, str | None]:
    if args.held_out:
        same = {"dataset_config": args.dataset_config, "dataset_data_dir": args.dataset_data_dir}
        other = DataArguments(dataset_name=args.held_out, **(same if args.held_out == args.dataset_name else {}))
        found = inputs.load_splits(other, trl.DatasetMixtureConfig())
        # A file has the one split `train`, whatever it holds.
        name = next(iter(found)) if len(found) == 1 else args.held_out_split
        return inputs.take_split(found, name), f"{Path(args.held_out).name}, split {name}"
    if args.held_out_split in splits and args.held_out_split != args.split:
        return splits[args.held_out_split], f"the same, split {args.held_out_split}"
    return None, None


def _source_name(args: BuildArguments, mixture: trl.DatasetMixtureConfig) -> str:
    if mixture.datasets:
        return "mixture of " + ", ".join(str(part.path) for part in mixture.datasets) + f", split {args.split}"
    name = Path(args.dataset_name).name if Path(args.dataset_name).exists() else args.dataset_name
    return f"{name}, split {args.split}"


def _stated_license(args: BuildArguments, rows) -> str:
    if args.dataset_name == sources.EMBEDDED:
        return "apache-2.0"
    return getattr(getattr(rows, "info", None), "license", None) or "unknown"
