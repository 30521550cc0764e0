"""Prove that a model is what it is called, by facts that are published of it or on its card.

Examples:
  gpt2mini verify                                    # the bundled gpt2-nano, by its card
  gpt2mini verify gpt2                               # OpenAI's, by what is published: a minute
  gpt2mini verify gpt2 --thorough --data tasks/      # and by figures of WikiText, LAMBADA, ...
  gpt2mini verify models/copy --as gpt2
  gpt2mini verify runs/novel/best --write-card

Published are checksums of the files, the number of parameters, greedy continuations, and figures of
zero-shot tasks, each with its source in summary.json. A card is a file in the model's folder,
card.json: digests of all tensors and of the vocabulary, logits, greedy continuations of prompts
chosen so that rounding does not change them, bits per byte of a text.

Prints expected, found and verdict, and writes summary.json to --out. The exit status is 1 if a
fact fails. The model computes in float32.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from gpt2mini.cli import common, options
from gpt2mini.device import pick_device
from gpt2mini.files import writable_folder
from gpt2mini.verification import Installation, known_facts, make_facts, verify, write_card
from gpt2mini.verification.environment import environment

CHECKING = "verification without --write-card"


@dataclass(frozen=True)
class Checking:
    """What is checked, and where the result goes."""

    # the model that it is to equal, if that has another name: a name, or a folder with a card
    as_: Annotated[str | None, arg(name="as")] = None
    thorough: bool = False  # also what takes minutes to hours: figures of zero-shot tasks
    data: str | None = None  # a folder with the tasks' files; None: they are downloaded once
    out: str = "runs/verify"  # folder for results


@dataclass(frozen=True)
class Flags:
    name: Positional[str] = "gpt2-nano"  # a bundled or published name, or a folder
    write_card: bool = False  # write the card of the model as it is now into its folder
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ... or mps
    checking: Checking = options.group(Checking, CHECKING)

    @property
    def conditions(self) -> set[str]:
        return set() if self.write_card else {CHECKING}


def run(flags: Flags) -> None:
    device = pick_device(flags.device)
    installation = Installation(flags.name, device, flags.checking.data, progress=True)
    if flags.write_card:
        facts = make_facts(installation)
        print(f"{len(facts)} facts: {write_card(installation, facts)}")
    elif not passes(installation, flags):
        sys.exit(1)


def passes(installation: Installation, flags: Flags) -> bool:
    """Check the facts, print the table, write summary.json."""
    out = writable_folder(flags.checking.out)
    facts = known_facts(installation, flags.checking.as_)
    report = verify(installation, facts, flags.checking.thorough)
    where = {"folder": str(installation.folder), **environment(installation.device)}
    print(f"{flags.name}: {installation.folder}")
    print("gpt2mini {gpt2mini}, torch {torch}, {processor}\n".format_map(where))
    print(report)
    if any(finding.fact.source for finding in report.findings):
        print("where the expected values are published: the rows of summary.json")
    common.write_summary(out, flags, {"passed": report.passed, **where, "rows": report.as_dicts()})
    return report.passed
