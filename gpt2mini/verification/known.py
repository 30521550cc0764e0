"""Which facts are known of a model: those published of it, or those of the card in its folder."""

from pathlib import Path

from gpt2mini.checkpoints import find_model
from gpt2mini.checkpoints.hub import CARD
from gpt2mini.verification.card import read_card
from gpt2mini.verification.facts import Fact, Installation
from gpt2mini.verification.published import published_facts, published_name, size_of


def known_facts(installation: Installation, like: str | Path | None = None) -> list[Fact]:
    """The facts that a model is to agree with.

    like: the model whose facts they are, if it is another: a published or bundled name, or a folder
    with a card. Raises ValueError if nothing is known of it.
    """
    name = str(installation.name if like is None else like)
    if published := published_name(name):
        return published_facts(published)
    folder = installation.folder if like is None else find_model(like)
    if (folder / CARD).is_file():
        return read_card(folder / CARD)
    raise ValueError(
        f"nothing is known of {name}: there is no {CARD} in {folder}. "
        f"{advice(installation) if like is None else ''}"
    )


def advice(installation: Installation) -> str:
    size = size_of(installation.model.config)
    found = f"It has the size of {size}: `" if size else "`"
    return (
        f"{found}--as {size or 'NAME'}` compares it with what is known of that model, and "
        "`--write-card` writes a card of it as it is now"
    )
