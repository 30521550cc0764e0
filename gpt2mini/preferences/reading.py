"""Records -> preferences: a prompt, and the responses chosen and rejected by a labeler.

A record with                                       is read as

prompt, chosen, rejected (texts or messages)        two responses to the prompt
  `messages` or `conversations` for the prompt        the same
  chosen and rejected repeat the prompt               the same, without it
chosen and rejected alone                           dialogues, texts or messages that begin alike:
                                                    what they share is the prompt
prompt, completion, label true or false             half a pair: a pair with another of its prompt
                                                    (with the same `input` and `system`)
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2mini.data.dialogues import (
    LAST_SPEAKER,
    Message,
    before_response,
    write_dialogue,
)
from gpt2mini.data.exchanges import (
    COMPLETION_NAMES,
    INPUT_NAMES,
    MESSAGES_NAMES,
    PROMPT_NAMES,
    SYSTEM_NAMES,
    messages_of,
    written_prompt,
)
from gpt2mini.data.records import EmptyField, Omissions, Record, as_text, read_records
from gpt2mini.data.templates import PLAIN, check_template, divide

logger = logging.getLogger(__name__)

ASKED_NAMES = (*PROMPT_NAMES, "input", *MESSAGES_NAMES)  # of a column or a JSON key
CHOSEN_NAMES = ("chosen", "preferred_output", *COMPLETION_NAMES)
REJECTED_NAMES = ("rejected", "non_preferred_output")
KNOWN = (*ASKED_NAMES, *INPUT_NAMES, *SYSTEM_NAMES, *CHOSEN_NAMES, *REJECTED_NAMES, "label")


@dataclass(frozen=True)
class Preference:
    """A prompt in the model's template, and the responses chosen and rejected by a labeler."""

    prompt: str
    chosen: str
    rejected: str


def read_preferences(
    source: str | Path, template: str = PLAIN, columns: Mapping[str, str] | None = None
) -> list[Preference]:
    """Read the pairs of a file of records, of a folder of them, or of hf:owner/name:split.

    template: with {prompt}, or {instruction} and {input}, and perhaps {system}; dialogues need
    none. Empty records and pairs of equal responses are left out; a warning gives their number,
    and the columns that are not used. Raises ValueError, with the line, for a row that cannot be
    read or lacks a field.
    """
    check_template(template)
    left_out, found = Omissions(source), []
    records = paired(list(read_records(source, columns, KNOWN)), left_out)
    repeats = bool(records) and all(map(repeats_prompt, records))
    if repeats:
        logger.warning("%s: responses repeat their prompts, and are read without them", source)
    for record in records:
        try:
            one = preference(record, template, repeats)
        except EmptyField as error:
            left_out.drop(error.reason, record.place)
            continue
        if one.chosen.strip() == one.rejected.strip():
            left_out.drop("both responses are the same", record.place)
            continue
        found.append(one)
        left_out.see(record)
    left_out.log()
    if not found:
        raise ValueError(f"{source} has no pair of two different responses")
    return found


def preference(record: Record, template: str, repeats: bool = False) -> Preference:
    """repeats: whether the responses begin with the prompt."""
    fields = (ASKED_NAMES, CHOSEN_NAMES, REJECTED_NAMES)
    if any(isinstance(record.value(*names), list | dict) for names in fields):
        return from_messages(record)
    prompted = record.find(ASKED_NAMES)
    if prompted is None and record.find(["chosen"]) is None:
        raise record.lacks(PROMPT_NAMES)
    chosen, rejected = record.required_text(*CHOSEN_NAMES), record.required_text(*REJECTED_NAMES)
    if prompted is None:
        return split_at_difference(chosen, rejected, record.place)
    prompt, template = written_prompt(record, template)
    if repeats:
        chosen, rejected = (after_prompt(record, text) or "" for text in (chosen, rejected))
    return preference_of(divide(template, prompt, chosen), divide(template, prompt, rejected))


def preference_of(chosen: tuple[str, str], rejected: tuple[str, str]) -> Preference:
    """From the prompt with either response. Raises EmptyField if one of them is empty."""
    if not chosen[1].strip() or not rejected[1].strip():
        raise EmptyField("", "a response is empty")
    return Preference(chosen[0], chosen[1], rejected[1])


# ---- prompts that stand in the responses


def repeats_prompt(record: Record) -> bool:
    """Do both responses, as texts, begin with the prompt?"""
    responses = [
        record.fields.get(record.find(names) or "") for names in (CHOSEN_NAMES, REJECTED_NAMES)
    ]
    return all(isinstance(one, str) and after_prompt(record, one) is not None for one in responses)


def after_prompt(record: Record, text: str) -> str | None:
    """What follows the prompt at the beginning of a text; None if it does not begin with it."""
    prompt = as_text(record.fields.get(record.find(PROMPT_NAMES) or ""))
    prompt = (prompt or "").strip("\r\n ")
    text = text.lstrip("\r\n ")
    rest = text[len(prompt) :]
    in_a_word = prompt[-1:].isalnum() and rest[:1].isalnum()
    return rest if prompt and text.startswith(prompt) and not in_a_word else None


def split_at_difference(chosen: str, rejected: str, place: str) -> Preference:
    """Two dialogues in the format of Anthropic's HH, split at the last "Assistant:" they share, or
    two other texts, split before the first word in which they differ.

    In dialogues that is the last turn of each, except in 12 of the 5103 pairs of HH's helpful test
    sets: there a response continues with turns of its own, which are not part of the prompt.
    """
    both = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (one, other) in both if one != other), min(len(chosen), len(rejected)))
    before, mark, _ = chosen[:shared].rpartition(LAST_SPEAKER)
    last_space = max(chosen.rfind(space, 0, shared) for space in " \t\n")
    cut = len(before + mark) if mark else last_space
    if cut < 1:
        raise ValueError(
            f"{place}: expected a prompt, or two dialogues or texts that begin alike in 'chosen' "
            "and 'rejected'"
        )
    prompt = chosen[:cut].lstrip("\r\n") if mark else chosen[:cut]
    return preference_of((prompt, chosen[cut:]), (prompt, rejected[cut:]))


# ---- messages


def from_messages(record: Record) -> Preference:
    """Lists of messages, or single ones: the turns that both begin with are part of the prompt.

    Raises ValueError for other lists and objects.
    """
    before = messages_of(record, ASKED_NAMES, "user") if record.find(ASKED_NAMES) else []
    chosen = messages_of(record, CHOSEN_NAMES, "assistant")
    rejected = messages_of(record, REJECTED_NAMES, "assistant")
    if before and chosen[0].role != "assistant":  # the lists are whole dialogues
        if before[-1].content not in [one.content for one in chosen]:
            raise ValueError(f"{record.place}: the prompt is not part of the messages in 'chosen'")
        before = []
    if before and before[-1].role == "assistant":
        raise ValueError(
            f"{record.place}: expected a prompt that ends before the answers in 'chosen' and "
            "'rejected', but its last turn is the assistant's: leave that turn out"
        )
    system = record.text(*SYSTEM_NAMES)
    opening = (
        [Message("system", system)] if system and "system" not in roles(before, chosen) else []
    )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    head = [*opening, *before, *chosen[:shared]]
    if not head or {chosen[shared].role, rejected[shared].role} != {"assistant"}:
        raise ValueError(
            f"{record.place}: expected answers of the assistant in 'chosen' and 'rejected', after "
            "the same turns"
        )
    prompt = before_response(head).rstrip(" ")
    return preference_of(
        *((prompt, write_dialogue([*head, *x[shared:]])[len(prompt) :]) for x in (chosen, rejected))
    )


def roles(*dialogues: Sequence[Message]) -> set[str]:
    return {message.role for dialogue in dialogues for message in dialogue}


# ---- completions that are labeled good or bad


def paired(records: list[Record], left_out: Omissions) -> list[Record]:
    """The same records; those with a label (KTO's form) as pairs of the same prompt, the first good
    completion with the first bad one, and so on. Completions without a partner are left out.

    Raises ValueError for a labeled record without a prompt or a completion.
    """
    if not records or records[0].find(REJECTED_NAMES) or not records[0].find(["label"]):
        return records
    by_prompt: dict[tuple[str, ...], tuple[list[Record], list[Record]]] = {}
    for record in records:
        good, bad = by_prompt.setdefault(parts_of_prompt(record), ([], []))
        (good if is_good(record) else bad).append(record)
    found = []
    for good, bad in by_prompt.values():
        found += [pair(*both) for both in zip(good, bad, strict=False)]
        for alone in [*good[len(bad) :], *bad[len(good) :]]:
            left_out.drop("no completion of the same prompt has the other label", alone.place)
    return found


def parts_of_prompt(record: Record) -> tuple[str, ...]:
    """What is the same for completions of the same prompt: the question, its input, the system
    prompt. Raises ValueError for a record without a question or a completion."""
    if missing := [names for names in (ASKED_NAMES, COMPLETION_NAMES) if not record.find(names)]:
        raise record.lacks(missing[0])
    return tuple(record.text(*names) or "" for names in (ASKED_NAMES, INPUT_NAMES, SYSTEM_NAMES))


def is_good(record: Record) -> bool:
    label = record.value("label")
    if str(label).lower() in ("true", "1", "1.0"):
        return True
    if str(label).lower() in ("false", "0", "0.0"):
        return False
    raise ValueError(f"{record.place}: 'label' must be true or false, not {label!r}")


def pair(good: Record, bad: Record) -> Record:
    """Two records of one prompt as a record with `chosen` and `rejected`."""
    used = (good.find(COMPLETION_NAMES), good.find(["label"]))
    fields: dict[str, Any] = {name: x for name, x in good.fields.items() if name not in used}
    completions = {
        "chosen": good.value(*COMPLETION_NAMES),
        "rejected": bad.value(*COMPLETION_NAMES),
    }
    assigned = [name for name in good.chosen if name not in used]
    return Record({**fields, **completions}, good.place, assigned)
