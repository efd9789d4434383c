"""The tokenizer of the embedded world: whole words, and bytes for everything the world does not know.

Built from the word lists, not trained, so that it is the same on every machine, and any text survives the round trip.
"""

import hashlib
import json
import re
from typing import TYPE_CHECKING

from trl_dynamics.embedded import vocabulary
from trl_dynamics.embedded.vocabulary import ATTRIBUTES, CHECKS, GREETINGS, PEOPLE, REQUESTS, STYLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CONTEXT_LENGTH = 256

# Every turn is its role, its text and the end token; the prompt of an answer ends with the assistant's role token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{ASSISTANT}" "{% generation %}" "{{ message['content'] }}" f"{END}" "{% endgeneration %}"
    "{% else %}"
    f"{USER}" "{{ message['content'] }}" f"{END}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" f"{ASSISTANT}" "{% endif %}"
)  # fmt: skip


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer with its chat template; the end token is EOS and end of turn, distinct from the pad token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = list(dict.fromkeys([*SPECIAL_TOKENS, *alphabet, *_word_pieces()]))
    # A word of the vocabulary is taken whole; without merges, any other falls apart into its bytes.
    bpe = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over vocabulary, EOS, pad token and chat template: equal if and only if text becomes the same ids."""
    parts = [tokenizer.get_vocab(), tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _word_pieces() -> list[str]:
    """Every word and punctuation mark of the world, as it stands at the start of a text and after a space."""
    words = sorted({word for phrase in _phrases() for word in re.findall(r"'s|[A-Za-z]+|[.,!?]", phrase)})
    return [form for word in words for form in ([word, f"Ġ{word}"] if word.isalpha() else [word])]


def _phrases() -> list[str]:
    phrases = [*PEOPLE, *GREETINGS, *REQUESTS, *CHECKS, "that the The"]
    for attribute in ATTRIBUTES:
        phrases += [*attribute.values, *attribute.clauses, *attribute.questions, attribute.indirect]
    for style in STYLES:
        phrases += [style.statement, *style.openers, *style.closers]
    for name, words in vars(vocabulary).items():
        if name.startswith(("SOURCE_", "PROSE_")):
            phrases += words
    return [re.sub(r"\{\w+\}", "", phrase) for phrase in phrases]
