"""trl-dynamics probes build: preference or prompt/completion data -> a probe set's folder."""

import logging
from dataclasses import dataclass
from pathlib import Path

import trl

from trl_dynamics import loading
from trl_dynamics.cli import sources
from trl_dynamics.cli.options import option
from trl_dynamics.cli.options import parse as parse_options
from trl_dynamics.probing import card
from trl_dynamics.probing import io as probe_io
from trl_dynamics.probing.build import DEFAULT_PROBES, Built, build, read_lines, settle_seams
from trl_dynamics.probing.cache import AnswerCache
from trl_dynamics.probing.files import parse_mapping, read_mapping
from trl_dynamics.probing.generate import LocalModel, Sampling
from trl_dynamics.probing.generated import Generation
from trl_dynamics.probing.quality import Embedder, Gate
from trl_dynamics.probing.rephrase import FileRephraser, GeneratedRephraser, Rephraser
from trl_dynamics.probing.schema import WITHOUT_REJECTED
from trl_dynamics.probing.server import OpenAIServer

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Where the pairs come from, and where the set goes."""

    dataset_name: str | None = option(None, "File, folder, hub dataset, or 'embedded'.", "--dataset")
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_data_dir: str | None = option(None, "Folder inside a hub dataset, such as helpful-base of hh-rlhf.")
    split: str = option("train", "Split that is trained on.")
    dataset_num_rows: int | None = option(None, "Use the first so many rows only. None: all.")
    dataset_streaming: bool = option(False, "Read a hub dataset without downloading all of it.")
    held_out: str | None = option(None, "Data that is not trained on; by default the dataset's own held-out split.")
    held_out_split: str = option("test", "Split of the held-out data.")
    output_dir: str | None = option(None, "Folder of the new set.", "-o")
    overwrite: bool = option(False, "Replace a probe set in that folder.")
    name: str | None = option(None, "Name of the set; by default that of its folder.")
    license: str | None = option(None, "Licence of the source, for the card.")


@dataclass
class BuildArguments(DataArguments):
    """Options of `trl-dynamics probes build`."""

    types: list[str] = option([], "Response types; by default all that the data and the models given allow.")
    num_probes: int | None = option(None, "Prompts to probe. None: 500, or all where the data has fewer.")
    seed: int = option(0, "Of the selection and of every draw.")
    select: str = option("random", "'random', or 'first' for the first rows of the data.")
    columns: list[str] = option([], "COLUMN=TYPE: answers that the data already has.")
    human_text: str | None = option(None, "Text file, one fluent sentence per line, for human_unrelated.")
    dictionary: str | None = option(None, "Text file, one word per line, for random_words.")
    model: str | None = option(None, "The model to be tracked: its own answers, its tokenizer's boundaries.")
    dtype: str = option("auto", "Dtype of local models' weights.")
    batch_size: int = option(16, "Prompts that a local model answers at a time.")
    trust_remote_code: bool = option(False, "Run model code that comes from the hub.")
    max_new_tokens: int = option(256, "Longest answer or rephrase, in tokens.")
    max_prompt_length: int | None = option(
        None,
        "For own answers: a longer prompt keeps its last tokens. Rephrases are of whole texts: one too long for "
        "the model's context has none.",
    )
    stop: list[str] = option([], "Texts before which the model's own answers end.")
    rephraser: str | None = option(
        None, "Who rephrases: a server's URL (OpenAI-compatible), a file of ready rephrases, or a model as in --model."
    )
    rephraser_model: str | None = option(None, "Name of the model on the server.")
    temperature: float = option(0.7, "Of rephrases.")
    attempts: int = option(3, "Rephrases to ask for until one passes the checks.")
    instructions: str | None = option(
        None, "YAML file with prompts of your own: 'semantic' and 'format', each with {text}."
    )
    concurrency: int = option(8, "Requests under way at a time.")
    requests_per_minute: float | None = option(None, "Rate limit.")
    timeout: float = option(120.0, "Seconds without a byte from the server.")
    max_retries: int = option(5, "Further attempts of a request that failed.")
    server_options: str | None = option(None, "JSON object added to every request.")
    cache: str | None = option(None, "File of answers so far; by default OUTPUT_DIR.answers.jsonl.")
    allow_failures: bool = option(False, "Leave out responses that got no answer, instead of stopping.")
    min_length_ratio: float = option(0.4, "Shortest rephrase, in characters per character of its source.")
    max_length_ratio: float = option(2.5, "Longest rephrase.")
    embedding_model: str | None = option(None, "Encoder that compares meanings; none: they are not compared.")
    similarity: float = option(0.7, "Cosine that semantic rephrases reach and format rephrases do not.")


def run(argv: list[str]) -> int:
    """Build a set, check its boundaries if a model is given, and write it with its card.

    Raises:
        ValueError: If an option, the data or a row is wrong; then nothing is written but answers already paid for.
    """
    args, mixture = parse(BuildArguments, argv, "build")
    probe_io.refuse_existing(args.output_dir, args.overwrite)
    built = build_from(args, mixture)
    folder = built.save(args.output_dir, overwrite=args.overwrite)
    for line in summary(built):
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
    parser = trl.TrlParser((arguments, trl.DatasetMixtureConfig), prog=f"trl-dynamics probes {action}")
    args, mixture, unknown = parse_options(parser, argv)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; see trl-dynamics probes {action} --help")
    if not args.output_dir:
        raise ValueError("-o (--output_dir) is missing: the folder to write")
    return args, mixture


def build_from(args: BuildArguments, mixture: trl.DatasetMixtureConfig) -> Built:
    """The set that the options describe."""
    columns = parse_columns(args.columns)
    sentences = read_lines(args.human_text, "--human_text") if args.human_text else ()
    dictionary = read_lines(args.dictionary, "--dictionary") if args.dictionary else ()
    splits = sources.load_splits(args, mixture)
    rows = sources.take_split(splits, args.split)
    rows = rows if args.dataset_num_rows is None else rows.take(args.dataset_num_rows)
    held_out, held_out_source = _held_out(args, splits)
    cache_path = args.cache or f"{args.output_dir.rstrip('/')}.answers.jsonl"
    with AnswerCache(cache_path if args.model or args.rephraser else None) as cache:
        generation = _generation(args, cache)
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


def summary(built: Built) -> list[str]:
    """What was built and what is missing, for the terminal."""
    about, total = built.probe_set.metadata, len(built.probe_set)
    lines = [f"{total} probes", *(f"  {name:<28} {count:>6}" for name, count in built.probe_set.counts.items())]
    for key, what in (
        ("unusable_rows", "rows that could not be used"),
        ("not_built", "responses that could not be built"),
        ("rejected", f"generated and not kept, listed in {card.REJECTED_FILE}"),
        ("failures", "left out because no answer came"),
    ):
        if about.get(key):
            lines += [f"{what}:", *(f"  {count:>6}  {reason}" for reason, count in about[key].items())]
    for part in (about.get("own_answers"), *about.get("rephrases", ())):
        if part:
            lines.append(
                f"answers of {part['by'] if 'by' in part else part['model']}: "
                f"{part['generated']} new, {part['from_cache']} from the cache"
            )
    if "rejected" not in built.probe_set.response_types:
        lines.append(f"no rejected answers: {WITHOUT_REJECTED}")
    return lines


def parse_columns(given: list[str]) -> dict[str, str]:
    """`COLUMN=TYPE` options as a mapping.

    Raises:
        ValueError: If one has no `=`, or a type is given twice.
    """
    columns: dict[str, str] = {}
    for item in given:
        column, equals, response_type = item.partition("=")
        if not (column and equals and response_type):
            raise ValueError(f"--columns {item!r}: expected COLUMN=TYPE")
        if response_type in columns.values():
            raise ValueError(f"--columns gives {response_type!r} twice; expected one column per type")
        columns[column] = response_type
    return columns


def _held_out(args: BuildArguments, splits) -> tuple[object, str | None]:
    if args.held_out:
        same = {"dataset_config": args.dataset_config, "dataset_data_dir": args.dataset_data_dir}
        other = DataArguments(dataset_name=args.held_out, **(same if args.held_out == args.dataset_name else {}))
        found = sources.load_splits(other, trl.DatasetMixtureConfig())
        # A file has the one split `train`, whatever it holds.
        name = next(iter(found)) if len(found) == 1 else args.held_out_split
        return sources.take_split(found, name), f"{Path(args.held_out).name}, split {name}"
    if args.held_out_split in splits and args.held_out_split != args.split:
        return splits[args.held_out_split], f"the same, split {args.held_out_split}"
    return None, None


def _generation(args: BuildArguments, cache: AnswerCache) -> Generation:
    model = None
    if args.model:
        model = _local(sources.find_model(args.model), args)
    similarity = _embedder(args.embedding_model) if args.embedding_model else None
    return Generation(
        model=model,
        rephraser=_rephraser(args, model),
        cache=cache,
        gate=Gate(args.min_length_ratio, args.max_length_ratio, similarity, args.similarity),
        sampling=Sampling(args.max_new_tokens, stop=tuple(args.stop), max_prompt_length=args.max_prompt_length),
        self_sampling=Sampling(args.max_new_tokens, args.temperature),
        attempts=args.attempts,
        allow_failures=args.allow_failures,
        progress=_progress,
    )


def _embedder(name: str) -> Embedder:
    with loading.naming(sources.require_folder(name, "embedding model")):
        return Embedder(name)


def _rephraser(args: BuildArguments, model: LocalModel | None) -> Rephraser | None:
    if not args.rephraser:
        return None
    if Path(args.rephraser).suffix in (".jsonl", ".parquet"):
        return FileRephraser(args.rephraser)
    sampling = Sampling(args.max_new_tokens, args.temperature, seed=args.seed)
    instructions = read_mapping(args.instructions, "--instructions") if args.instructions else None
    if args.rephraser.startswith(("http://", "https://")):
        generator = OpenAIServer(
            args.rephraser,
            args.rephraser_model or "",
            concurrency=args.concurrency,
            timeout=args.timeout,
            max_retries=args.max_retries,
            requests_per_minute=args.requests_per_minute,
            options=parse_mapping(args.server_options, "--server_options") if args.server_options else None,
        )
    elif args.rephraser == args.model:
        generator = model
    else:
        generator = _local(sources.find_model(args.rephraser), args)
    return GeneratedRephraser(generator, sampling, instructions)


def _local(path: str, args: BuildArguments) -> LocalModel:
    return LocalModel.load(
        path, dtype=args.dtype, batch_size=args.batch_size, trust_remote_code=args.trust_remote_code
    )


def _source_name(args: BuildArguments, mixture: trl.DatasetMixtureConfig) -> str:
    if mixture.datasets:
        return "mixture of " + ", ".join(str(part.path) for part in mixture.datasets) + f", split {args.split}"
    name = Path(args.dataset_name).name if Path(args.dataset_name).exists() else args.dataset_name
    return f"{name}, split {args.split}"


def _stated_license(args: BuildArguments, rows) -> str:
    if args.dataset_name == sources.EMBEDDED:
        return "apache-2.0"
    return getattr(getattr(rows, "info", None), "license", None) or "unknown"


def _progress(done: int, total: int) -> None:
    if done % max(50, total // 20) == 0 or done == total:
        logger.info("answers: %d of %d", done, total)
