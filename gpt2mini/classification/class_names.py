"""Labels as people write them -> names of classes: which are the same, missing, or in doubt."""

import logging
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# How pandas, R, SQL and Excel write that there is no value.
MISSING = {"", "nan", "-nan", "NaN", "NULL", "null", "None", "NA", "<NA>", "N/A", "n/a", "#N/A"}
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))  # zero width, in any place
WHOLE = re.compile(r"([+-]?\d+)\.0+")  # 1.0, as pandas writes whole numbers beside missing ones
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def class_name(label: Any) -> str | None:
    """The name of the class that a label means; None if it is missing.

    Equal are labels that look equal (Unicode's normal form C, white space of any kind, characters
    of zero width) or are the same whole number (1, 1.0). A list of one label is that label. Raises
    ValueError for a list of several, and for an object.
    """
    if isinstance(label, list | tuple) and len(label) == 1:
        return class_name(label[0])
    if isinstance(label, list | tuple) and label:
        raise ValueError(
            f"a text has {len(label)} labels, {list(label)!r}, but a classifier of one label each "
            "is trained: choose one, or write the set as one label"
        )
    if isinstance(label, dict):
        raise ValueError(f"a label must be a text or a number, not {label!r}")
    if label is None or label in ([], ()) or (isinstance(label, float) and math.isnan(label)):
        return None
    name = str(label).lower() if isinstance(label, bool) else as_seen(str(label))
    if name in MISSING:
        return None
    whole = WHOLE.fullmatch(name)
    return whole[1] if whole else name


def as_seen(text: str) -> str:
    """The text without what cannot be seen: characters of zero width, kinds of white space."""
    words = unicodedata.normalize("NFC", text).translate(INVISIBLE).split()
    return " ".join(words).strip("\u200c\u200d\u200e\u200f")  # joiners matter within a word


def in_order(names: Sequence[str]) -> list[str]:
    """Numbers by their value, then the others in alphabetical order."""
    return sorted(set(names), key=lambda name: (*order_of_number(name), name))


def order_of_number(name: str) -> tuple[bool, float]:
    return (False, float(name)) if NUMBER.fullmatch(name) else (True, 0.0)


def warn_if_alike(counts: Mapping[str, int], source: object) -> None:
    """Name classes that differ in case, leading zeros, hyphens or spaces alone."""
    alike: dict[str, list[str]] = {}
    for name in counts:
        key = re.sub(r"[\s_-]+", " ", name.casefold())
        key = repr(float(name)) if NUMBER.fullmatch(name) else key
        alike.setdefault(key, []).append(name)
    for names in alike.values():
        if len(names) > 1:
            shown = " and ".join(f"{name!r} ({counts[name]} texts)" for name in names)
            message = "%s: the classes %s are learned as different ones: write them alike if not"
            logger.warning(message, source, shown)
