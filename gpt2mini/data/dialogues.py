"""Dialogues: messages with roles -> text, and the turns of the assistant in it.

A dialogue is written as in Anthropic's HH: turns that begin with "Human:" and "Assistant:", with an
empty line between them; what the system says stands first, as it is. The forms that are read:

    [{"role": "user", "content": "Why?"}, ...]     OpenAI, Hugging Face
    [{"from": "human", "value": "Why?"}, ...]      ShareGPT
    "\\n\\nHuman: Why?\\n\\nAssistant: So."            HH, a text

One message outside a list is read as a list of one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gpt2mini.data.records import shorten
from gpt2mini.data.templates import divide

ASSISTANT = "Assistant: "  # the template of a response
LAST_SPEAKER = "\n\nAssistant:"  # precedes the response in a dialogue
BEGINNINGS = {"system": "", "user": "Human: ", "assistant": ASSISTANT}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}


class Message(NamedTuple):
    """One turn. role: "system", "user" or "assistant"."""

    role: str
    content: str
    learned: bool = True  # False: OpenAI's "weight": 0


def holds_messages(value: Any) -> bool:
    """Is this a message or a list of messages, in either form?"""
    return is_message(value) or (
        isinstance(value, list) and bool(value) and all(map(is_message, value))
    )


def is_message(value: Any) -> bool:
    keys = set(value) if isinstance(value, dict) else set()
    return {"role", "content"} <= keys or {"from", "value"} <= keys


def read_messages(value: Any, place: str) -> list[Message]:
    """value: a list of messages, or one message. Raises ValueError, with the place, for anything
    else, for other roles (tools) and for contents that are not text (images)."""
    if not holds_messages(value):
        raise ValueError(
            f"{place}: expected messages with role and content, or from and value, or a text; "
            f"found {shorten(value)}"
        )
    messages = value if isinstance(value, list) else [value]
    return [read_message(one, place) for one in messages]


def read_message(message: dict[str, Any], place: str) -> Message:
    theirs = message.get("role", message.get("from"))
    role = ROLES.get(str(theirs).lower())
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # OpenAI's parts
        parts: list[Any] = [one.get("text") if isinstance(one, dict) else one for one in content]
        content = "".join(parts) if all(isinstance(one, str) for one in parts) else content
    if role is None or not isinstance(content, str):
        what = f"the role {theirs!r}" if role is None else f"the content {shorten(content)}"
        raise ValueError(
            f"{place}: {what} is not read: expected texts of {', '.join(BEGINNINGS)}. Leave such "
            "records out, or write them as text"
        )
    return Message(role, content, message.get("weight") != 0)


def write_dialogue(messages: Sequence[Message]) -> str:
    """The turns as one text."""
    return "\n\n".join(
        "".join(divide(BEGINNINGS[one.role], BEGINNINGS[one.role], one.content)) for one in messages
    )


def before_response(messages: Sequence[Message]) -> str:
    """The text of these turns, and the beginning of the assistant's next one."""
    return write_dialogue([*messages, Message("assistant", "")])


def responses(messages: Sequence[Message], start: int = 0) -> Iterator[tuple[str, str]]:
    """(all that precedes it, response) for each turn of the assistant from `start` on that is not
    empty and is to be learned."""
    for i, one in enumerate(messages):
        if i >= start and one.role == "assistant" and one.learned and one.content.strip():
            yield divide(ASSISTANT, before_response(messages[:i]), one.content)


def count_unanswered(messages: Sequence[Message]) -> int:
    """Turns of the user from which nothing is learned: before an empty answer, or at the end."""
    empty = sum(one.role == "assistant" and not one.content.strip() for one in messages)
    return empty + (messages[-1].role == "user")


def split_dialogue(dialogue: str, place: str) -> tuple[str, str]:
    """(the text up to the last "Assistant:", the response after it), of a dialogue as text. Empty
    lines before its first turn are left out."""
    before, mark, response = dialogue.rpartition(LAST_SPEAKER)
    if not mark:
        raise ValueError(f"{place}: the dialogue has no {LAST_SPEAKER!r} before a response")
    return before.lstrip("\r\n") + mark, response


def ends_before_response(prompt: str) -> bool:
    """Is this prompt a dialogue up to the next response? It then needs no template."""
    return prompt.rstrip(" ").endswith(LAST_SPEAKER)
