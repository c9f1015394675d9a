"""Prompts: how a conversation becomes text, in pieces of which each is trained or not.

`paper` is the wording that the NLoRA authors' scripts train with (PiSSA's, which is Alpaca's), with Alpaca's second
wording where a row has an input. Their scripts end a reply with a line break and the text "<|EOT|>", which LLaMA-2
knows as ordinary letters; here it ends with the tokenizer's own end token, which is what generation stops at.
LLM-Adapters, where the commonsense rows are from, indents this wording and leaves a code comment in it by mistake;
that is not repeated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from corelora.data.forms import Message
from corelora.errors import CoreLoraError
from corelora.registry import Registry


class Piece(NamedTuple):
    """A part of a text, and whether the loss is on it."""

    text: str
    trained: bool


class Prompt(ABC):
    """One way to write a conversation.

    Attributes:
        special_tokens: the tokenizer puts its begin token in front; else the text has it already.
        ends: the text has its stop token already; else the tokenizer's end token is put behind it.
    """

    special_tokens: bool
    ends: bool

    def tokenizer_problem(self, tokenizer: Any) -> str | None:
        """Why this prompt cannot be used with a tokenizer, or None."""
        if not self.ends and tokenizer.eos_token_id is None:
            return "the tokenizer has no end token, so a reply could not end"
        return None

    @abstractmethod
    def problem(self, messages: Sequence[Message]) -> str | None:
        """Why a conversation cannot be written so, or None."""

    @abstractmethod
    def question(self, messages: Sequence[Message], tokenizer: Any) -> str:
        """The text that a model is to go on from, given all turns but the reply."""

    @abstractmethod
    def pieces(self, messages: Sequence[Message], tokenizer: Any) -> list[Piece]:
        """The whole text with its reply or replies."""


PROMPTS: Registry[Prompt] = Registry("prompt")


class OneQuestion(Prompt):
    """A prompt around one question, with no place for a second one."""

    special_tokens, ends = True, False

    def __init__(self, name: str, plain: str, with_input: str) -> None:
        self.name, self.plain, self.with_input = name, plain, with_input

    def problem(self, messages: Sequence[Message]) -> str | None:
        """More than a question and a reply."""
        roles = [m["role"] for m in messages]
        if roles == ["user", "assistant"]:
            return None
        what = "a system turn" if roles[0] == "system" else f"{len(roles)} turns"
        return f"prompt {self.name!r} holds one question and one reply, this row has {what}; use prompt 'chat'"

    def question(self, messages: Sequence[Message], tokenizer: Any = None) -> str:
        """The wording around the question."""
        first = messages[0]
        if "input" in first:
            return self.with_input.format(instruction=first["content"], input=first["input"])
        return self.plain.format(instruction=first["content"])

    def pieces(self, messages: Sequence[Message], tokenizer: Any = None) -> list[Piece]:
        """The question, not trained, and the reply."""
        return [Piece(self.question(messages), False), Piece(messages[-1]["content"], True)]


PROMPTS.add(
    "paper",
    OneQuestion(
        "paper",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
)
PROMPTS.add("plain", OneQuestion("plain", "{instruction}\n", "{instruction}\n\n{input}\n"))


class Chat(Prompt):
    """The model's own chat template, which writes begin and stop tokens itself."""

    special_tokens, ends = False, True

    def tokenizer_problem(self, tokenizer: Any) -> str | None:
        """No template."""
        if tokenizer.chat_template:
            return None
        return "this model has no chat template; use prompt 'paper', or a model that was trained to chat"

    def problem(self, messages: Sequence[Message]) -> str | None:
        """Nothing that the checks of a row let pass."""
        return None

    def question(self, messages: Sequence[Message], tokenizer: Any) -> str:
        """The turns, and the template's opening of a reply."""
        return _render(messages, tokenizer, add_generation_prompt=True)

    def pieces(self, messages: Sequence[Message], tokenizer: Any) -> list[Piece]:
        """All turns; each reply up to its stop token is trained, as generation would write it.

        Raises:
            CoreLoraError: the template changes what it wrote before, opens a reply in another way than it writes it,
                or ends one without a stop token.
        """
        made, done = [], ""
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opening = self.question(messages[:n], tokenizer)
            whole = _render(messages[: n + 1], tokenizer, add_generation_prompt=False)
            if not opening.startswith(done):
                raise CoreLoraError(REWRITES)
            if not whole.startswith(opening):
                raise CoreLoraError(OPENS_OTHERWISE)
            reply = whole[len(opening) :]
            end = _stop_at(reply, message["content"], tokenizer)
            made += [Piece(opening[len(done) :], False), Piece(reply[:end], True)]
            done = opening + reply[:end]
        return made


PROMPTS.add("chat", Chat())

REWRITES = (
    "the chat template rewrites earlier turns as a conversation grows, so what a model would see before each reply "
    "cannot be told; use rows of one question and one reply, or prompt 'paper'"
)
OPENS_OTHERWISE = (
    "the chat template opens a reply in another way than it writes one (some put thoughts in between), so a trained "
    "reply would not be what generation goes on from; use another chat template, or prompt 'paper'"
)


def _render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    """The template's text; an input is put below its instruction."""
    turns = [
        {"role": m["role"], "content": "\n\n".join([m["content"], *([m["input"]] if "input" in m else [])])}
        for m in messages
    ]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)


def _stop_at(reply: str, content: str, tokenizer: Any) -> int:
    """Where a rendered reply ends: behind the first special token that follows its content."""
    content = content.strip()
    begin = reply.index(content) + len(content) if content in reply else 0
    found = [(at, len(t)) for t in special_tokens(tokenizer) if (at := reply.find(t, begin)) >= 0]
    if not found:
        raise CoreLoraError("the chat template ends a reply without a stop token; use prompt 'paper'")
    # At the same place the longest: one token's text may begin another's.
    at, length = min(found, key=lambda f: (f[0], -f[1]))
    return at + length


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's special tokens, those of its template included."""
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
