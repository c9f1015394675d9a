"""Rows to conversations, and conversations to text."""

import pytest

from corelora.data.columns import Column
from corelora.data.forms import FORMS, fitting_forms
from corelora.data.prompts import PROMPTS, Piece
from corelora.errors import CoreLoraError
from data.conftest import CHATML, byte_tokenizer

PAIRS = {
    "metamath": ("query", "response"),
    "code_feedback": ("query", "answer"),
    "evol_instruct": ("instruction", "output"),
    "gsm8k": ("question", "answer"),
    "word_problems": ("question", "solution"),
    "alpaca": ("instruction", "output"),
    "commonsense": ("instruction", "output"),
}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


@pytest.mark.parametrize("name", PAIRS)
def test_a_question_and_a_reply(name):
    form = FORMS[name]
    question, reply = PAIRS[name]
    row = dict.fromkeys(form.columns) | {question: "q", reply: "r"}
    assert form.read(row) == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    for column in (question, reply):
        assert form.columns[column].read(column, " \n")[1], "an empty one is a mistake"


def test_every_form_is_tested_here():
    assert set(FORMS) == {*PAIRS, "chat", "conversations"}


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_an_alpaca_input_of_blanks_is_none(text):
    row = {"instruction": "i", "input": text, "output": "o"}
    assert "input" not in FORMS["alpaca"].read(row)[0]
    assert FORMS["alpaca"].columns["input"].read("input", text) == (text, None)
    assert FORMS["alpaca"].read(row | {"input": "x"})[0] == {"role": "user", "content": "i", "input": "x"}


def test_both_ways_to_write_turns_read_the_same():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    share = [{"from": names[t["role"]], "value": t["content"]} for t in TURNS]
    column = Column(kind="turns")
    assert column.read("messages", TURNS) == (TURNS, None)
    assert column.read("conversations", share) == (TURNS, None)
    assert FORMS["chat"].read({"messages": TURNS}) == FORMS["conversations"].read({"conversations": TURNS}) == TURNS


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ("text", "a list of turns is expected, found a text"),
        ([], "found an empty one"),
        (["hello"], "turn 1: an object is expected"),
        (TURNS[:1], "ends without a reply"),
        (TURNS[:2], "ends without a reply"),
        (TURNS[1:4], "ends without a reply"),
        (TURNS[2:], "turn 1 is the assistant's, where the user's is expected"),
        ([*TURNS, TURNS[-1]], "turn 6 is the assistant's, where the user's is expected"),
        ([*TURNS[1:3], TURNS[0], *TURNS[3:]], "turn 3 is the system's"),
        ([{"role": "usr", "content": "x"}], "turn 1: unknown role 'usr'. Did you mean 'user'?"),
        ([{"content": "x"}], "unknown role None"),
        ([{"role": ["user"], "content": "x"}], "unknown role ['user']"),
        ([TURNS[1], {"role": "assistant", "content": " "}], r"turn 2 (assistant) is empty"),
        ([TURNS[1], {"role": "assistant", "content": None}], "turn 2: content must be a text, found null"),
        ([TURNS[1], {"role": "assistant", "content": "\ud83d"}], "turn 2: half of a surrogate pair"),
    ],
)
def test_broken_conversations(turns, words):
    value, problem = Column(kind="turns").read("messages", turns)
    assert value is None
    assert problem.startswith("column 'messages': ")
    assert words in problem


def test_forms_that_fit_columns():
    assert fitting_forms({"query", "response", "type"}) == ["metamath"]
    assert set(fitting_forms({"instruction", "output"})) == {"alpaca", "commonsense", "evol_instruct"}
    assert fitting_forms({"text"}) == []


# -- prompts ---------------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "Add {1} and 2."}, {"role": "assistant", "content": "3 {}"}]
WITH_INPUT = [QUESTION[0] | {"input": "in {x}"}, QUESTION[1]]


def test_the_papers_wording():
    """As in the authors' training script; braces of a row are left alone."""
    asked, reply = PROMPTS["paper"].pieces(QUESTION, None)
    assert asked == Piece(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Response:",
        False,
    )
    assert reply == Piece("3 {}", True)
    assert PROMPTS["paper"].pieces(WITH_INPUT, None)[0].text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Input:\nin {x}\n\n### Response:"
    )


def test_plain_is_the_question_alone():
    assert PROMPTS["plain"].pieces(QUESTION, None) == [("Add {1} and 2.\n", False), ("3 {}", True)]
    assert PROMPTS["plain"].question(WITH_INPUT, None) == "Add {1} and 2.\n\nin {x}\n"


@pytest.mark.parametrize("name", ["paper", "plain"])
def test_one_question_has_no_place_for_more(name):
    assert PROMPTS[name].problem(QUESTION) is None
    assert "has a system turn; use prompt 'chat'" in PROMPTS[name].problem(TURNS[:3])
    assert "has 4 turns; use prompt 'chat'" in PROMPTS[name].problem(TURNS[1:])


def test_chat_trains_every_reply_and_its_stop_token():
    pieces = PROMPTS["chat"].pieces(TURNS, byte_tokenizer())
    assert pieces == [
        ("<|begin|>system\nBe brief.<|end|>\n<|begin|>user\nOne?<|end|>\n<|begin|>assistant\n", False),
        ("1<|end|>", True),
        ("\n<|begin|>user\nTwo?<|end|>\n<|begin|>assistant\n", False),
        ("2<|end|>", True),
    ]


def test_chat_puts_an_input_below_its_instruction():
    assert "Add {1} and 2.\n\nin {x}<|end|>" in PROMPTS["chat"].question(WITH_INPUT[:1], byte_tokenizer())


def test_a_reply_that_shows_a_stop_token_ends_at_its_own():
    turns = [QUESTION[0], {"role": "assistant", "content": "Write <|end|> last."}]
    assert PROMPTS["chat"].pieces(turns, byte_tokenizer())[-1].text == "Write <|end|> last.<|end|>"


def test_a_model_without_a_template_is_told_of_the_paper_prompt():
    tokenizer = byte_tokenizer()
    assert PROMPTS["chat"].tokenizer_problem(tokenizer) is None
    tokenizer.chat_template = None
    assert "no chat template; use prompt 'paper'" in PROMPTS["chat"].tokenizer_problem(tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    """As templates do that drop the thoughts of earlier replies."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|begin|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
    )
    assert len(PROMPTS["chat"].pieces(TURNS[1:3], tokenizer)) == 2
    with pytest.raises(CoreLoraError, match="rewrites earlier turns"):
        PROMPTS["chat"].pieces(TURNS[1:], tokenizer)


def test_a_template_that_opens_a_reply_otherwise_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(CoreLoraError, match="opens a reply in another way than it writes one"):
        PROMPTS["chat"].pieces(TURNS[1:3], tokenizer)


def test_a_template_may_trim_replies_and_end_them_with_a_token_of_its_own():
    """As Llama 3's and Gemma's, whose stop token is not the tokenizer's end token."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | trim")
    turns = [QUESTION[0], {"role": "assistant", "content": "\n 3 \n"}]
    assert tokenizer.eos_token == "<|stop|>"
    assert PROMPTS["chat"].pieces(turns, tokenizer)[-1] == Piece("3<|end|>", True)


def test_a_template_without_a_stop_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(CoreLoraError, match="without a stop token"):
        PROMPTS["chat"].pieces(TURNS[1:3], tokenizer)
