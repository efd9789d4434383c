"""Whether a rephrase is one: each check gives a reason, and nothing is dropped without one."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoTokenizer

from trl_dynamics.probing.generate import Answer
from trl_dynamics.probing.rephrase import SEMANTIC

# Words that nearly every sentence of a language has and the others lack.
FUNCTION_WORDS: dict[str, frozenset[str]] = {
    "English": frozenset("the and of to is that it for you with are this was have be not they his".split()),
    "German": frozenset("der die das und ist nicht ein eine zu den mit auf für sich auch dem werden".split()),
    "French": frozenset("le les et est une des pas que vous dans pour qui sur avec du au sont ce".split()),
    "Spanish": frozenset("el los las es una y por con para del se lo más su al como pero".split()),
    "Italian": frozenset("il che di è gli della una per non con sono come anche più nel alla".split()),
    "Portuguese": frozenset("o os um uma não em para com é do da que as por mais você são".split()),
    "Dutch": frozenset("het een van en niet dat je op te zijn voor met ook maar aan wordt".split()),
}
# Function words needed to name a language, and how many times more of them than of any other.
ENOUGH_WORDS, CLEAR_LEAD = 4, 1.5


@dataclass(frozen=True)
class Gate:
    """Bounds that a rephrase has to keep.

    Args:
        min_length_ratio, max_length_ratio (`float`, *optional*): Characters of the rephrase per character of its
            source.
        similarity (`Callable`, *optional*): Cosine of two texts' embeddings, such as an [`Embedder`].
        threshold (`float`, *optional*): A semantic rephrase has at least this similarity, a format rephrase less.
    """

    min_length_ratio: float = 0.4
    max_length_ratio: float = 2.5
    similarity: Callable[[str, str], float] | None = None
    threshold: float = 0.7

    def __post_init__(self):
        if not 0 <= self.min_length_ratio < self.max_length_ratio:
            raise ValueError(
                f"length ratios {self.min_length_ratio} and {self.max_length_ratio}: expected 0 <= min < max"
            )

    def reject(self, source: str, answer: Answer, kind: str) -> str | None:
        """The first reason why `answer` is no rephrase of `source`; None if there is none.

        Args:
            source (`str`): The text that was to be rephrased.
            answer ([`Answer`]): What came back.
            kind (`str`): `"semantic"` or `"format"`.
        """
        if answer.finish == "refusal":
            return "refused"
        if not answer.text.strip():
            return "empty"
        if answer.finish == "length":
            return "cut at the limit of new tokens"
        if _plain(answer.text) == _plain(source):
            return "the same as its source"
        ratio = len(answer.text.strip()) / max(1, len(source.strip()))
        if not self.min_length_ratio <= ratio <= self.max_length_ratio:
            return "too short" if ratio < self.min_length_ratio else "too long"
        expected, found = language_of(source), language_of(answer.text)
        if expected and found and expected != found:
            return f"in {found} instead of {expected}"
        if self.similarity is not None:
            cosine = self.similarity(source, answer.text)
            if (cosine >= self.threshold) != (kind == SEMANTIC):
                return "another meaning" if kind == SEMANTIC else "the same meaning"
        return None


class Embedder:
    """Cosine of mean-pooled last hidden states, as sentence encoders are used.

    Args:
        path (`str`): Folder or hub name of an encoder that `AutoModel` loads.
    """

    def __init__(self, path: str):
        self.name = path
        self.model = AutoModel.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self._known: dict[str, torch.Tensor] = {}

    def __call__(self, first: str, second: str) -> float:
        return float(self.embed(first) @ self.embed(second))

    @torch.inference_mode()
    def embed(self, text: str) -> torch.Tensor:
        """The text's embedding (D,), of length 1."""
        if text not in self._known:
            limit = getattr(self.model.config, "max_position_embeddings", None)
            encoded = self.tokenizer(
                text,
                return_tensors="pt",
                truncation=limit is not None,
                max_length=limit,
                return_token_type_ids=hasattr(self.model.config, "type_vocab_size"),
            )
            hidden_TD = self.model(**encoded).last_hidden_state[0].float()
            self._known[text] = torch.nn.functional.normalize(hidden_TD.mean(0), dim=0)
        return self._known[text]


def language_of(text: str) -> str | None:
    """The writing system of most letters, or for Latin letters the language; None if the text is too short to tell."""
    letters = [character for character in text if character.isalpha()]
    if len(letters) < 4:
        return None
    scripts = Counter(_script(letter) for letter in letters)
    # Japanese mixes Chinese characters with letters that only it has.
    if kana := scripts["Hiragana"] + scripts["Katakana"]:
        scripts["Japanese"] = kana + scripts["Cjk"]
    script, count = scripts.most_common(1)[0]
    if count < 0.6 * len(letters):
        return None
    return _latin_language(re.findall(r"[^\W\d_]+", text.lower())) if script == "Latin" else script


def _latin_language(words: Sequence[str]) -> str | None:
    counts = Counter({name: sum(word in known for word in words) for name, known in FUNCTION_WORDS.items()})
    (first, most), (_, next_most) = counts.most_common(2)
    return first if most >= ENOUGH_WORDS and most >= CLEAR_LEAD * next_most else None


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].capitalize()


def _plain(text: str) -> str:
    """The text without case, punctuation and white space."""
    return "".join(character for character in text.casefold() if character.isalnum()) or text.strip()
