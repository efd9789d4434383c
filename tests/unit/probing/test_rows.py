"""Every format that TRL trains on becomes the same pairs; whatever cannot is refused with row, field and remedy."""

import pytest

from trl_dynamics.probing.rows import Pair, count_reasons, read_pairs, read_prompts

USER = [{"role": "user", "content": "Why?"}]


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


def pair_of(row, **options):
    (pair,) = read_pairs([row], **options)
    return pair


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why?", "chosen": " A", "rejected": " B"}, ("Why?", " A", " B")),
        ({"prompt": "Why?", "completion": " A", "label": True}, ("Why?", " A", None)),
        ({"prompt": "Why?", "completion": " A"}, ("Why?", " A", None)),
        ({"prompt": USER, "chosen": said("A"), "rejected": said("B")}, (USER, "A", "B")),
        ({"prompt": USER, "chosen": "A", "rejected": "B"}, (USER, "A", "B")),
        ({"prompt": USER, "completion": said("A")}, (USER, "A", None)),
        ({"messages": USER + said("A")}, (USER, "A", None)),
        ({"chosen": USER + said("A"), "rejected": USER + said("B")}, (USER, "A", "B")),
        ({"chosen": "Q: 1+1? It is 2", "rejected": "Q: 1+1? It is 3"}, ("Q: 1+1? It is", " 2", " 3")),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello there", "rejected": "\n\nHuman: Hi\n\nAssistant: Hello you"},
            ("\n\nHuman: Hi\n\nAssistant:", " Hello there", " Hello you"),
        ),
        ({"prompt": "Why?", "chosen": "A", "rejected": None}, ("Why?", "A", None)),
        ({"prompt": "Why?", "chosen": USER + said("A"), "rejected": USER + said("B")}, (USER, "A", "B")),
        ({"prompt": USER, "chosen": USER + said("A"), "rejected": USER + said("B")}, (USER, "A", "B")),
    ],
)
def test_formats(row, expected):
    pair = pair_of(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?", "answer": "A"}, r"row 0 has the columns \['answer', 'question'\].*rename"),
        ({"prompt": None, "chosen": "A", "rejected": "B"}, "row 0, field 'prompt' is null"),
        ({"prompt": "Why?", "chosen": None, "rejected": "B"}, "row 0, field 'chosen' is null"),
        ({"prompt": "Why?", "chosen": 3, "rejected": "B"}, "row 0, field 'chosen' is 3; expected text"),
        ({"prompt": 3, "completion": "B"}, "row 0, field 'prompt' is 3; expected text or a list"),
        ({"prompt": USER + said("A"), "completion": "B"}, "row 0, field 'prompt' ends with an assistant message"),
        ({"prompt": USER, "chosen": USER, "rejected": said("B")}, "field 'chosen' is a message of role 'user'"),
        ({"prompt": USER, "chosen": said("A") * 2, "rejected": said("B")}, "one assistant message.*into 'prompt'"),
        ({"messages": USER}, "row 0, field 'messages': expected at least"),
        ({"chosen": "A", "rejected": said("B")}, "field 'chosen' is 'A'; expected text or messages, like the other"),
        (
            {"prompt": "Why?", "completion": "A", "images": ["x.png"]},
            "field 'images': probe sets do not support images",
        ),
        ({"prompt": USER, "completion": "A", "tools": [{"name": "f"}]}, "field 'tools': .* do not support tools"),
        (
            {"prompt": USER, "completion": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            "holds tool calls",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "A"}, "not text.*text only"),
        ({"prompt": [{"role": "user"}], "completion": "A"}, "'role' and 'content'"),
    ],
)
def test_what_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        pair_of(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?", "chosen": "A", "rejected": " \n"}, "row 0 has a blank rejected"),
        ({"prompt": " ", "chosen": "A", "rejected": "B"}, "row 0 has a blank prompt"),
        ({"prompt": "Why?", "completion": ""}, "row 0 has a blank chosen"),
        ({"prompt": "Why?", "completion": "A", "label": False}, "row 0 has a dispreferred completion (label false)"),
        (
            {"chosen": "left", "rejected": "right"},
            "row 0 has a chosen and a rejected with no beginning in common, and no prompt column",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
            "row 0 has a chosen and a rejected that do not answer the same prompt",
        ),
        ({"prompt": "Why?", "completion": "a\ud800"}, "row 0 has broken Unicode (a lone surrogate) in chosen"),
        (
            {"prompt": said("\udfff", "user"), "completion": "A"},
            "row 0 has broken Unicode (a lone surrogate) in prompt",
        ),
    ],
)
def test_unusable_rows_are_told_not_lost(row, reason):
    assert pair_of(row) == reason


def test_numbers_in_columns_of_answers_are_left_over():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    left_over = {"chosen": 0.5, "rejected": 0.1}
    pairs = list(read_pairs([{"prompt": "a", "completion": " b"} | left_over, {"messages": chat} | left_over]))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        ("a", " b", None),
        (chat[:1], "Hello", None),
    ]


def test_a_whole_chat_without_a_rejected_one():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for prompt in ("Hi", chat[:1]):
        (pair,) = read_pairs([{"prompt": prompt, "chosen": chat}])
        assert (pair.prompt, pair.chosen, pair.rejected) == (chat[:1], "Hello", None)


def test_reasons_are_counted_by_kind():
    rows = [{"prompt": "Why?", "completion": text} for text in ("", "A", " ", "\ud800")]
    reasons = [item for item in read_pairs(rows) if isinstance(item, str)]
    assert count_reasons(reasons) == {"a blank chosen": 2, "broken Unicode (a lone surrogate) in chosen": 1}


def test_columns_of_the_users_own():
    row = {"prompt": "Why?", "completion": "A", "best": "B", "none": None, "blank": " "}
    assert pair_of(row, extra_columns={"best": "mine", "none": "n", "blank": "b"}).extra == {"mine": "B"}
    with pytest.raises(ValueError, match="row 0 has no column 'worst'; found"):
        pair_of(row, extra_columns={"worst": "mine"})


def test_the_key_is_the_content():
    a, b = Pair("p", "c", "r", where="row 1"), Pair("p", "c", "r", {"x": "y"}, where="row 2")
    assert a.key == b.key and a.probe_id == a.key[:16]
    assert len({a.key, Pair("p", "c").key, Pair("p", "r", "c").key, Pair("pc", "", "r").key}) == 4


def test_prompts_come_with_and_without_answers():
    rows = [
        {"prompt": "Why?"},
        {"prompt": USER, "topic": "sky"},
        {"prompt": "Why?", "chosen": "", "rejected": "No."},
        {"messages": [*USER, *said("So.")]},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {"prompt": " "},
        {"prompt": "\ud800"},
    ]
    prompts, reasons = read_prompts(rows)
    assert prompts == ["Why?", USER, "Why?", USER, "\n\nHuman: Why?\n\nAssistant:"]
    assert reasons == ["row 5 has a blank prompt", "row 6 has broken Unicode (a lone surrogate) in prompt"]
    for row, message in (
        ({"question": "Why?"}, "row 0 has no prompt; found the columns"),
        ({"prompt": said("So.")}, "ends with an assistant message"),
        ({"prompt": "Why?", "images": ["x"]}, "images, video or sound"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts([row])
