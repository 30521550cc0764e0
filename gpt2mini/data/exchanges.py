"""Records -> exchanges: a prompt in the model's template and the completion to learn.

A record with                                       is learned as

prompt and completion, by any of the names below    the completion, after the prompt
  `input` or `context` besides                        part of the prompt
  `system` besides                                    the beginning of the prompt
prompt and completion as lists of messages          each answer of the completion
`messages` or `conversations`                       each answer, after all that precedes it
  that end with the user's turn, and a completion     the completion, after all of them
  or `chosen` besides
`chosen` without a prompt: a dialogue               its last answer
`text` alone                                        the whole text, without a template
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt2mini.data.dialogues import (
    Message,
    count_unanswered,
    ends_before_response,
    holds_messages,
    read_messages,
    responses,
    split_dialogue,
)
from gpt2mini.data.records import EmptyField, Omissions, Record, as_text, read_records
from gpt2mini.data.templates import PLAIN, check_template, divide, fill

PROMPT_NAMES = ("prompt", "instruction", "question", "query")  # of a column or a JSON key
INPUT_NAMES = ("input", "context")
SYSTEM_NAMES = ("system", "system_prompt")
COMPLETION_NAMES = ("completion", "output", "answer", "response", "answers")
ANSWER_NAMES = (*COMPLETION_NAMES, "chosen")
MESSAGES_NAMES = ("messages", "conversations", "conversation")
TEXT_NAMES = ("text", "content")
KNOWN = (
    *(*PROMPT_NAMES, *INPUT_NAMES, *SYSTEM_NAMES, *ANSWER_NAMES, *MESSAGES_NAMES),
    *(*TEXT_NAMES, "label"),
)


@dataclass(frozen=True)
class Exchange:
    """A prompt in the model's template, and its completion."""

    prompt: str
    completion: str
    # of the record; the turns of a dialogue share it
    place: str = field(default="", compare=False, repr=False)


def read_exchanges(
    source: str | Path, template: str = PLAIN, columns: Mapping[str, str] | None = None
) -> list[Exchange]:
    """Read the exchanges of a file of records, of a folder of them, or of hf:owner/name:split.

    template: with {prompt}, or {instruction} and {input}, and perhaps {system}; dialogues and texts
    need none. Empty records are left out; a warning gives their number, and the columns that are
    not used. Raises ValueError, with the line, for a row that cannot be read or lacks a field.
    """
    check_template(template)
    left_out, found = Omissions(source), []
    for record in read_records(source, columns, KNOWN):
        try:
            exchanges = exchanges_of(record, template)
        except EmptyField as error:
            left_out.drop(error.reason, error.place)
            continue
        found += [Exchange(prompt, completion, record.place) for prompt, completion in exchanges]
        if record.find(MESSAGES_NAMES):
            left_out.unanswered += count_unanswered(dialogue_of(record)[0])
        left_out.see(record)
    left_out.log()
    if not found:
        why = next(iter(left_out.reasons))
        raise ValueError(f"{source} has nothing to learn: all records are left out ({why})")
    return found


def exchanges_of(record: Record, template: str) -> list[tuple[str, str]]:
    """(prompt, completion) for each part of a record that is learned.

    Raises EmptyField if there is none, ValueError for a missing field.
    """
    if is_labeled_bad(record):
        raise EmptyField(record.place, "its label is false, as of bad completions")
    if record.find(MESSAGES_NAMES):
        return from_messages(record, *dialogue_of(record))
    has_prompt = record.find((*PROMPT_NAMES, "input"))
    if not has_prompt and record.find(["chosen"]):
        return [last_response(record, "chosen")]
    if not has_prompt and record.find(TEXT_NAMES) and not record.find(COMPLETION_NAMES):
        return [("", record.required_text(*TEXT_NAMES))]
    if has_prompt and any(
        holds_messages(record.value(*names)) for names in (PROMPT_NAMES, ANSWER_NAMES)
    ):
        before = messages_of(record, PROMPT_NAMES, "user")
        after = messages_of(record, ANSWER_NAMES, "assistant")
        return from_messages(record, before + after, len(before))
    prompt, template = written_prompt(record, template)
    return [divide(template, prompt, completion_of(record))]


def is_labeled_bad(record: Record) -> bool:
    """KTO's form: a completion with a label of true or false."""
    label = str(record.fields.get("label")).lower()
    if label in ("true", "false"):
        record.used.add("label")
    return label == "false"


def written_prompt(record: Record, template: str) -> tuple[str, str]:
    """(the filled template, the template). A dialogue up to the next response needs none."""
    names = PROMPT_NAMES if record.find(PROMPT_NAMES) or not record.find(["input"]) else ["input"]
    prompt = record.required_text(*names)
    system = record.text(*SYSTEM_NAMES) or ""
    if ends_before_response(prompt):
        return fill("{prompt}", prompt, system=system), "{prompt}"
    context = "" if names == ["input"] else record.text(*INPUT_NAMES) or ""
    return fill(template, prompt, context if context.strip() else "", system), template


def completion_of(record: Record) -> str:
    """The completion as a text. Of several answers, as those of SQuAD, the first."""
    if (record.find(ANSWER_NAMES) or "").lower() != "answers":
        return record.required_text(*ANSWER_NAMES)
    value = record.value("answers")
    answers = value.get("text") if isinstance(value, dict) else value
    first = next(iter(answers), None) if isinstance(answers, list) else answers
    text = as_text(first) or ""
    if not text.strip():
        raise EmptyField(record.place, "'answers' is empty")
    return text


def messages_of(record: Record, names: Sequence[str], role: str) -> list[Message]:
    """The messages in a field; a text is one of them."""
    value = record.value(*names)
    if value is None and record.find(names) is None:
        raise record.lacks(names)
    if isinstance(value, dict) and "messages" in value:  # as in OpenAI's preferences
        value = value["messages"]
    if value is None or value == []:
        raise EmptyField(record.place, f"{record.find(names)!r} is empty")
    if isinstance(value, str):
        return [Message(role, record.required_text(*names))]
    return read_messages(value, record.place)


def dialogue_of(record: Record) -> tuple[list[Message], int]:
    """The turns of `messages`, and the number of the first that may be learned. Where they end with
    the user's turn, what is learned is the answer in another field, if there is one."""
    turns = messages_of(record, MESSAGES_NAMES, "assistant")
    if turns[-1].role != "user" or not record.find(ANSWER_NAMES):
        return turns, 0
    answer = messages_of(record, ANSWER_NAMES, "assistant")
    is_whole = answer[0].role != "assistant"  # it repeats the dialogue
    return answer if is_whole else [*turns, *answer], len(turns)


def from_messages(
    record: Record, messages: Sequence[Message], start: int = 0
) -> list[tuple[str, str]]:
    """Each answer from message `start` on, after all that precedes it."""
    system = record.text(*SYSTEM_NAMES)
    opening = [Message("system", system)] if system and messages[0].role != "system" else []
    found = list(responses([*opening, *messages], start + len(opening)))
    if not found:
        raise EmptyField(record.place, "no answer of the assistant")
    return found


def last_response(record: Record, name: str) -> tuple[str, str]:
    """A dialogue's last answer, after all that precedes it."""
    if isinstance(record.value(name), list | dict):
        return from_messages(record, messages_of(record, [name], "assistant"))[-1]
    prompt, response = split_dialogue(record.required_text(name), record.place)
    if not response.strip():
        raise EmptyField(record.place, "the last response is empty")
    return prompt, response
