"""Tokenizers of many kinds, made offline, each lossy or awkward in its own way."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from tiny import CHAT_TEMPLATE, END, START

UNKNOWN, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
SPECIAL = [UNKNOWN, BOS, EOS, PAD, START, END]
LETTERS = [*string.ascii_letters, *string.digits, *".,?!:'-\"#<>|/=+é"]
WORDS = ["once", "upon", "a", "time", "why", "able", "un", "unable", "café", "naive"]


def _finish(backend: Tokenizer, **options) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"eos_token": EOS, "bos_token": BOS, "pad_token": PAD} | options,
        additional_special_tokens=[START, END],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _numbered(symbols) -> dict[str, int]:
    return {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}


def _adds(backend: Tokenizer, single: str) -> Tokenizer:
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return backend


def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes, some of them merged."""
    merges = [("a", "b"), ("n", "d"), ("Ġ", "a"), ("u", "n"), ("Ċ", "Ċ"), ("ð", "Ł"), (".", "Ċ")]
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE(vocab=_numbered(symbols), merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return _finish(backend)


def folding() -> PreTrainedTokenizerFast:
    """Bytes of a text in lower case, without accents, in compatibility form, without outer white space."""
    tokenizer = byte_level()
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Strip()])
    return tokenizer


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: words in lower case and their continuations, cleaned up when decoded."""
    pieces = [letter.lower() for letter in LETTERS]
    symbols = [*SPECIAL, *WORDS, *pieces, *(f"##{piece}" for piece in (*pieces, "able"))]
    backend = Tokenizer(models.WordPiece(vocab=_numbered(symbols), unk_token=UNKNOWN))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return _finish(backend, unk_token=UNKNOWN, clean_up_tokenization_spaces=True)


def unigram(closes: bool = False) -> PreTrainedTokenizerFast:
    """As T5's: letters and words with a mark for spaces, the rest unknown; with `closes` EOS behind every text."""
    scores = [*((token, 0.0) for token in SPECIAL), *((letter, -9.0) for letter in ["▁", *LETTERS])]
    backend = Tokenizer(models.Unigram([*scores, *((f"▁{word}", -5.0) for word in WORDS)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _finish(_adds(backend, f"$A {EOS}") if closes else backend, unk_token=UNKNOWN)


def sentence_piece(byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """As Llama's: a BOS token, a mark for spaces, and bytes or an unknown token for other letters."""
    merges = [("a", "b"), ("▁", "a"), ("▁", "t"), ("u", "n"), (".", "a")]
    symbols = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, *map("".join, merges)]
    model = models.BPE(
        vocab=_numbered(symbols), merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=byte_fallback
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _finish(_adds(backend, f"{BOS} $A"), unk_token=UNKNOWN)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: printable ASCII, and a question mark for the rest."""

    def __init__(self, **options):
        self._ids = _numbered(["?", *map(chr, range(32, 127)), "\n"])
        self._letters = {index: letter for letter, index in self._ids.items()}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return self._letters.get(index, "?")

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def letters() -> Letters:
    tokenizer = Letters(eos_token=EOS, bos_token=BOS, pad_token=PAD, additional_special_tokens=[START, END])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


ZOO = {
    "byte level": byte_level,
    "byte level with a space before": lambda: byte_level(add_prefix_space=True),
    "folding": folding,
    "word piece": word_piece,
    "unigram": unigram,
    "unigram that closes": lambda: unigram(closes=True),
    "sentence piece": sentence_piece,
    "sentence piece without bytes": lambda: sentence_piece(byte_fallback=False),
    "letters": letters,
}
