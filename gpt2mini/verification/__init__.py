"""Is it really this model? Facts, published or measured once, against what is on this machine.

Read in this order: facts, contents, outputs, task_figures, published, card, known, report.
"""

from gpt2mini.verification.card import make_facts, read_card, write_card
from gpt2mini.verification.facts import Installation
from gpt2mini.verification.known import known_facts
from gpt2mini.verification.report import Report, verify

__all__ = [
    "Installation",
    "Report",
    "known_facts",
    "make_facts",
    "read_card",
    "verify",
    "write_card",
]
