"""A sample of `fuzz_checkpoints.py`, which has the long form."""

import pytest
from fuzz_checkpoints import run


@pytest.mark.usefixtures("no_shape_checks")
def test_damaged_folders_are_refused_by_name_and_nothing_worse() -> None:
    outcomes, wrong = run(cases=250, seed=0)
    assert not wrong
    assert {outcome.split(": ")[1] for outcome in outcomes} == {"loaded", "refused"}
