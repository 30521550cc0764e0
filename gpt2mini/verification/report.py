"""Check facts one after another, and show expected, found and verdict side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from textwrap import wrap
from typing import Any, Literal

from tqdm import tqdm

from gpt2mini.checkpoints import CheckpointError
from gpt2mini.verification.facts import Fact, Installation, Unavailable

COLUMNS = {"": 4, "fact": 34, "expected": 18, "found": 18}  # and their widths: 80 in all
INDENT = " " * 6

Verdict = Literal["pass", "FAIL", "skip"]


@dataclass(frozen=True)
class Finding:
    """A fact, what was found instead or as expected, and the verdict.

    reason: of a failure, what differs, or why nothing was found; of a skipped fact, why.
    """

    fact: Fact
    verdict: Verdict
    found: Any = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Digests of all tensors are not written again, only their number."""
        fact = self.fact
        plain = isinstance(fact.expected, str | int | float)
        given = {k: v for k, v in asdict(fact).items() if k not in ("expected", "text")}
        return {
            "fact": fact.title,
            "kind": type(fact).__name__,
            "verdict": self.verdict.lower(),
            "expected": fact.expected if plain else fact.expected_text,
            "found": self.found if plain or self.found is None else self.found_text,
            "reason": self.reason,
            **given,
        }

    @property
    def found_text(self) -> str:
        return "-" if self.found is None else self.fact.found_text(self.found)

    def lines(self) -> list[str]:
        """A row of the table, and below it what a failure needs."""
        fact = self.fact
        row = in_columns([self.verdict, fact.title, fact.expected_text, self.found_text])
        notes = [self.reason, fact.remark if self.verdict == "FAIL" else ""]
        for note in filter(None, notes):
            row += wrap(note, 80, initial_indent=INDENT, subsequent_indent=INDENT)
        return row


def in_columns(cells: Sequence[str]) -> list[str]:
    """Cells side by side, those too long for their column on several lines."""
    wrapped = [wrap(cell, width) for cell, width in zip(cells, COLUMNS.values(), strict=True)]
    lines = []
    for parts in zip_longest(*wrapped, fillvalue=""):
        padded = [part.ljust(width) for part, width in zip(parts, COLUMNS.values(), strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    left_out: int = 0  # facts that take long and were not asked for

    def count(self, verdict: str) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)

    @property
    def passed(self) -> bool:
        """Whether some fact was checked, and none failed."""
        return self.count("pass") > 0 and self.count("FAIL") == 0

    def as_dicts(self) -> list[dict[str, Any]]:
        return [finding.as_dict() for finding in self.findings]

    def __str__(self) -> str:
        """In 80 columns."""
        rows = [line for finding in self.findings for line in finding.lines()]
        counts = ", ".join(
            f"{self.count(verdict)} {word}"
            for verdict, word in (("pass", "passed"), ("FAIL", "failed"), ("skip", "skipped"))
        )
        more = f"; {self.left_out} more take minutes to hours: --thorough" if self.left_out else ""
        return "\n".join([*in_columns(list(COLUMNS)), *rows, "", counts + more])


def verify(
    installation: Installation,
    facts: Sequence[Fact],
    thorough: bool = False,
) -> Report:
    """Check each fact; those that take long come last, and only if `thorough`.

    A fact that cannot be checked, for a file or a network that is missing, is skipped with the
    reason. Raises CheckpointError if the model cannot be loaded.
    """
    asked = sorted((f for f in facts if thorough or not f.is_slow), key=lambda f: f.is_slow)
    silent = not installation.progress
    with tqdm(asked, desc="verify", disable=silent, leave=False) as bar:
        findings = [check(installation, fact) for fact in bar]
    return Report(findings, left_out=len(facts) - len(asked))


def check(installation: Installation, fact: Fact) -> Finding:
    try:
        found = fact.find(installation)
    except Unavailable as error:
        return Finding(fact, "skip", reason=str(error))
    except CheckpointError:  # there is no model to check
        raise
    except (ValueError, RuntimeError) as error:  # a model that computes no numbers, say
        return Finding(fact, "FAIL", reason=str(error))
    if fact.agrees(found):
        return Finding(fact, "pass", found)
    return Finding(fact, "FAIL", found, fact.difference(found))
