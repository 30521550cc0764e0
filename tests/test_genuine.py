"""What is published of OpenAI's models, on the genuine weights of those that are on this machine.

Nothing is downloaded. They are looked for in the folder $GPT2MINI_GENUINE, as gpt2, gpt2-medium and
so on, and in the cache of huggingface_hub. Figures of zero-shot tasks take minutes to hours, and
are checked by `pytest -m genuine` alone; their files are looked for in ../shared/data/eval.
"""

import os
from functools import cache
from pathlib import Path

import pytest
from conftest import shared_data

from gpt2mini.checkpoints.hub import PUBLISHED, has_weights
from gpt2mini.verification import Installation, verify
from gpt2mini.verification.facts import Fact
from gpt2mini.verification.published import published_facts

pytestmark = pytest.mark.genuine

CASES = [(name, fact) for name in PUBLISHED for fact in published_facts(name)]


@cache
def installed(name: str) -> Installation | None:
    """One for all facts of a model, which is loaded once."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(PUBLISHED[name], "config.json")
    places = [Path(os.environ.get("GPT2MINI_GENUINE", "")) / name]
    places += [Path(cached).parent] if isinstance(cached, str) else []
    found = [place for place in places if place.is_dir() and has_weights(place)]
    return Installation(found[0]) if found else None


@pytest.mark.parametrize(("name", "fact"), CASES, ids=lambda case: getattr(case, "title", case))
def test_a_genuine_model_agrees_with_what_is_published(
    name: str, fact: Fact, request: pytest.FixtureRequest
) -> None:
    installation = installed(name)
    if installation is None:
        pytest.skip(f"no weights of {name}, neither in $GPT2MINI_GENUINE nor in the Hub's cache")
    if fact.is_slow:
        if request.config.option.markexpr != "genuine":
            pytest.skip("takes minutes to hours: pytest -m genuine")
        installation.data = shared_data("eval")
    (finding,) = verify(installation, [fact], thorough=True).findings
    if finding.verdict == "skip":
        pytest.skip(finding.reason)
    assert finding.verdict == "pass", "\n".join(finding.lines())
