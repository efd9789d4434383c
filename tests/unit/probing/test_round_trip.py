"""What is scored is the answer: for tokenizers that lose text, templates that change it, and processors."""

import pathlib
import re

import pytest
import trl
from transformers import AutoTokenizer, ProcessorMixin

from tiny import END, START, tiny_tokenizer
from tokenizer_zoo import BOS, EOS, ZOO, byte_level, sentence_piece, word_piece
from trl_dynamics import ProbeSet, embedded
from trl_dynamics.probing.encode import LengthLimits, encode, encode_prompts
from trl_dynamics.probing.round_trip import RoundTrip
from trl_dynamics.probing.schema import Probe

PROMPTS = ["Once upon a time", "Why?\n\nAnswer:", "Größe? 🙂 ", "3 + 4 = ", "tab\t"]
ANSWERS = [
    " there was a boy",
    "  two  spaces  ",
    "\n\nab\nabc\n",
    "\tx\t",
    " 🙂🙃 ok",
    " 漢字, 漢",
    " שלום עולם مرحبا",
    " e\u0301 \u0301x ﬁ ①",
    " zero\u200bwidth\ufeff",
    " a\u00a0b\u3000c",
    " ΟΔΟΣ İstanbul ÀÉÎ",
    " don't do not . , ?",
    " 1234567",
    " ▁under Ġg <0x41> ##able #hash",
    " line\r\nline\x00end",
    " <think>hm</think>ok",
    " [unk] [SEP] <|endoftext|>",
    " word" * 300,
]
USER = {"role": "user", "content": "What is 1 plus 2?"}
TALKS = {
    "one turn": [USER],
    "turns": [USER, {"role": "assistant", "content": "Three."}, {"role": "user", "content": "Why?"}],
}
TEMPLATES = sorted((pathlib.Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL = re.compile(r"<\|[^|<>]+\|>|<｜[^｜<>]+｜>|<(?:start_of_turn|end_of_turn|end_of_utterance)>|</s>")


def one(prompt, answer: str) -> ProbeSet:
    return ProbeSet((Probe("p", prompt, {"answer": answer}),), required_types=())


def item_of(prompt, answer, tokenizer, **options):
    (item,) = encode(one(prompt, answer), tokenizer, **options).items
    return item


def bare(text: str) -> str:
    return "".join(text.split())


def chat_tokenizer(template: str):
    """Bytes, and the special tokens that a template writes."""
    tokenizer = tiny_tokenizer()
    found = sorted(set(SPECIAL.findall(template)) | {START, END})
    tokenizer.add_special_tokens({"eos_token": "<eos>", "bos_token": "<bos>", "additional_special_tokens": found})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", ZOO)
def test_a_lossy_tokenizer_is_no_reason_to_refuse(name, chat):
    """Each answer is scored as the tokenizer reads it alone, and its end is the end of the turn."""
    tokenizer = ZOO[name]()
    end = tokenizer.convert_tokens_to_ids(END if chat else EOS)
    for prompt in PROMPTS:
        probes = [
            Probe(str(i), [{"role": "user", "content": prompt}] if chat else prompt, {"answer": answer})
            for i, answer in enumerate(ANSWERS)
        ]
        for item, answer in zip(
            encode(ProbeSet(tuple(probes), required_types=()), tokenizer).items, ANSWERS, strict=True
        ):
            # Where white space is an unknown letter, the prompt's end may take that of the answer's start.
            alone = {
                bare(tokenizer.decode(tokenizer(text=text, add_special_tokens=False)["input_ids"]))
                for text in (answer, answer.lstrip())
            }
            assert bare(tokenizer.decode(item.response_ids)) in alone
            assert (item.eos_id, item.response_cut, item.added) == (end, False, "")


def test_a_piece_that_continues_a_word_of_the_prompt_is_the_answer():
    tokenizer = ZOO["word piece"]()
    item = item_of("c", "able", tokenizer)
    assert tokenizer.convert_ids_to_tokens(item.response_ids) == ["##able"]
    with pytest.raises(ValueError, match=r"'p', response 'answer': the prompt ends with the tokens \['un'\], which"):
        encode(one("un", "able"), tokenizer)


def test_tokens_shared_with_the_prompt_are_refused_but_for_white_space():
    with pytest.raises(ValueError, match=r"\['a'\], which become \['ab'\] .* white space"):
        encode(one("(a", "bc"), byte_level())
    assert item_of("why ", "a time", sentence_piece()).response_cut is False
    # A word of both that is unknown reads as the answer alone does.
    assert word_piece()(text="a🙂")["input_ids"] == word_piece()(text="🙂")["input_ids"]
    with pytest.raises(ValueError, match=r"\['a'\], which become \['<unk>'\]"):
        encode(one("why a", "🙂"), word_piece())
    # A letter that is lost in the prompt's unknown token would not be scored.
    with pytest.raises(ValueError, match="its tokens read 'abc</s>', the response alone '<unk>abc'"):
        encode(one("漢", "漢 abc"), ZOO["sentence piece without bytes"]())


def test_an_end_that_the_tokenizer_does_not_know_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.split_special_tokens = True
    with pytest.raises(ValueError, match=r"does not read its EOS token '<\|im_end\|>' as one token"):
        encode(one("Why?", " So."), tokenizer)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_that_trl_ships_are_scored_right_or_refused(path):
    """An answer stands in the scored tokens behind what the template writes, or the error says what it lost."""
    tokenizer = chat_tokenizer(path.read_text())
    for talk in TALKS.values():
        for answer in ("Because it is so.", "  two\n\nlines \n"):
            item = item_of(talk, answer, tokenizer)
            text = tokenizer.decode(item.response_ids)
            assert text.strip().endswith(answer.strip()) and not item.response_cut
            assert bare(text) == item.added + bare(answer)
        answer = "<think>\nhm\n</think>\n\nSo."
        try:
            item = item_of(talk, answer, tokenizer)
        except ValueError as error:
            assert re.search(r"the chat template (leaves out|writes) .*think>", str(error))
        else:
            assert bare(tokenizer.decode(item.response_ids)) == item.added + bare(answer)


def test_reasoning_that_a_template_drops_is_scored_with_one_that_keeps_it():
    """The two ways out that the error names."""
    dropping = chat_tokenizer(next(path for path in TEMPLATES if path.stem == "deepseek_r1_distill").read_text())
    answer = "<think>\nhm\n</think>\n\nSo."
    with pytest.raises(ValueError, match=r"leaves out '<think>\\nhm\\n</think>\\n\\n'; write it .* 'So.', or set a"):
        encode(one([USER], answer), dropping)
    item = item_of([USER], "So.", dropping)
    assert dropping.decode(item.prompt_ids).endswith("<｜Assistant｜>") and dropping.decode(item.response_ids) == "So."
    keeping = chat_tokenizer(
        next(path for path in TEMPLATES if path.stem == "deepseek_r1_distill_training").read_text()
    )
    item = item_of([USER], answer, keeping)
    # Its generation prompt holds the answer's first line, which is scored none the less.
    assert keeping.decode(item.response_ids) == answer
    (prompt,) = encode_prompts(one([USER], answer), keeping)
    assert keeping.decode(prompt.input_ids).endswith("<｜Assistant｜><think>\n")


CHANGES = {
    "upper": ("{{ m.content | upper }}", r"writes 'ECAUSE, WHY\\nNOT' in place of 'ecause, why\\nnot'"),
    "drop": ("{{ m.content.split('c')[-1] }}", "leaves out 'Bec'"),
    "lines": ("{{ m.content | replace('\\n', ' ') }}", r"writes ' ' in place of '\\n'"),
    "twice": ("{{ m.content }} {{ m.content }}", r"adds ' Because, why\\nnot\?'"),
    "elsewhere": ("<|im_end|>{{ m.content[4:] }}{{ m.content[:4] }}", "writes|leaves out"),
    "nothing": ("", "leaves out 'Because, why"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_template_that_changes_answers_is_named(change):
    written, said = CHANGES[change]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + written
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(ValueError, match=f"probe 'p', response 'answer': the chat template ({said})"):
        encode(one([USER], "Because, why\nnot?"), tokenizer)


def test_a_template_that_refuses_a_message_says_why():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('No system here') }}"
    with pytest.raises(ValueError, match="1 of 1 responses .* the chat template refuses the messages: No system here"):
        encode(one([USER], "So."), tokenizer)


def test_what_a_template_writes_before_every_answer_is_no_answer():
    """Without a generation prompt its header asks for the answer; text behind an answer is not scored either."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}## {{ m.role }}: {{ m.content }}\n## end\n{% endfor %}"
    item = item_of([USER], "So.", tokenizer)
    assert tokenizer.decode(item.prompt_ids).endswith("## end\n## assistant:")
    assert (tokenizer.decode(item.response_ids), item.eos_id, item.response_cut) == (" So.", None, False)


class TextProcessor(ProcessorMixin):
    """What is left of a vision model's processor without images."""

    @classmethod
    def get_attributes(cls):
        return ["tokenizer"]

    def __call__(self, text=None, **options):
        return super().__call__(text=[text] if isinstance(text, str) else text, **options)


TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = TEXT.replace(
    "{{ m.content }}",
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
)


def test_the_end_of_a_turn_is_no_answer():
    tokenizer = tiny_tokenizer()
    last = "{{ message['content'] }}{% if loop.last %} (end of talk){% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message['content'] }}", last)
    with pytest.raises(ValueError, match="ends the prompt in another way"):
        encode(one([USER], "3"), tokenizer)


def test_content_becomes_parts_where_the_template_reads_parts():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEXT
    as_text = encode(one(TALKS["turns"], "So."), tokenizer)
    processor = TextProcessor(tiny_tokenizer(), chat_template=PARTS)
    tokenizer.chat_template = PARTS
    for reader in (tokenizer, processor):
        assert encode(one(TALKS["turns"], "So."), reader) == as_text
        (prompt,) = encode_prompts(one(TALKS["turns"], "So."), reader)
        assert prompt.input_ids == as_text.items[0].prompt_ids


def test_a_processor_is_read_as_trl_reads_it():
    """It adds a BOS token where its template writes none, which its tokenizer alone would not."""
    tokenizer = sentence_piece()
    tokenizer.chat_template = None
    processor = TextProcessor(tokenizer, chat_template=PARTS)
    (item,) = encode(one([USER], "so"), processor).items
    messages = trl.data_utils.prepare_multimodal_messages([USER, {"role": "assistant", "content": "so"}])
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    assert list(item.input_ids) == theirs[: len(item.input_ids)] and theirs[0] == tokenizer.bos_token_id
    assert tokenizer.decode(item.response_ids) == "so"


def test_reasoning_tags_that_are_special_tokens_end_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<eos>", "additional_special_tokens": [START, END, "<think>", "</think>"]}
    )
    item = item_of([USER], "<think>hm</think>Because.", tokenizer)
    assert tokenizer.decode(item.response_ids) == "<think>hm</think>Because."
    assert (item.eos_id, item.response_cut) == (tokenizer.convert_tokens_to_ids(END), False)


@pytest.mark.parametrize("prompt", ["Why?", [USER]], ids=["plain", "chat"])
def test_an_answer_that_goes_on_behind_its_end_is_cut(prompt):
    tokenizer = tiny_tokenizer()
    encoded = encode(one(prompt, f" Because{END} it is so."), tokenizer)
    (item,) = encoded.items
    assert tokenizer.decode(item.response_ids) == " Because" and item.eos_id == tokenizer.eos_token_id
    assert item.response_cut and encoded.cuts["answer"] == {"prompt": 0, "response": 1, "of": 1}
    for ending in (END, f"{END}\n", f"{END}{END}"):
        assert not item_of(prompt, f" Because{ending}", tokenizer).response_cut


def test_an_end_of_turn_that_is_nobodys_eos_cuts_as_well():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>", "additional_special_tokens": [START, END]})
    item = item_of([USER], f"So{END} and on", tokenizer)
    assert (tokenizer.decode(item.response_ids), item.response_cut) == ("So", True)
    assert item.eos_id == tokenizer.convert_tokens_to_ids(END)


def test_one_error_counts_all_and_names_the_first_three_probes():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHANGES["upper"][0].join(
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n", "<|im_end|>\n{% endfor %}")
    )
    long = "SO AND SO ON AND ON" * 9
    rows = {str(i): {"chosen": "So." if i else "SO.", "rejected": "NO." if i < 5 else long} for i in range(7)}
    probes = ProbeSet(tuple(Probe(name, [USER], answers) for name, answers in rows.items()))
    with pytest.raises(ValueError) as refused:
        encode(probes, tokenizer, LengthLimits(context_length=120))
    said = str(refused.value)
    assert said.startswith("8 of 14 responses cannot be scored") and "\n" not in said
    assert re.findall(r"probe '(\d)', response '(\w+)'", said) == [("1", "chosen"), ("2", "chosen"), ("3", "chosen")]
    assert "`trl-dynamics probes check` lists all" in said


def test_two_bos_tokens_are_told(caplog):
    encode(one("Once", " upon a time"), sentence_piece())
    assert not caplog.messages
    encode(one(f"{BOS}Once", " upon a time"), sentence_piece())
    assert "1 of 1 prompts start with two BOS tokens" in caplog.text


def test_the_shipped_probe_set_is_scored_on_the_same_tokens_as_ever():
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    assert encode(embedded.probe_set(40), tokenizer).fingerprint[:16] == "06e3618f1318d6e6"


def test_the_published_probe_set_is_scored_on_the_same_tokens_as_ever(data_dir):
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "stories260k")
    probes = ProbeSet.from_jsonl(data_dir / "probing_helpful_base" / "formal_prob_train.jsonl").select(60)
    assert encode(probes, tokenizer).fingerprint[:16] == "3914ff6cfa7e8029"


def test_white_space_never_counts():
    trip = RoundTrip(tiny_tokenizer())
    assert trip.of(" a\n b\t\u3000c ") == "abc" == trip.decode(tiny_tokenizer()("a b c")["input_ids"])
