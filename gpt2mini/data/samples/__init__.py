"""Small files to begin with, in the package itself: the default data of examples and command.

sample.txt         a story                      next-token fine-tuning
messages.tsv       labeled messages             classification
keeper.jsonl       questions and answers        instructions, LoRA
preferences.jsonl  pairs of answers             reward model, DPO, prompts for PPO and GRPO
general.txt        letters, a recipe, news      what tuning has forgotten
"""

from pathlib import Path


def sample(name: str) -> Path:
    """The path of a sample file. Raises FileNotFoundError for a name that is none."""
    path = Path(__file__).with_name(name)
    if not path.is_file():
        known = sorted(p.name for p in path.parent.iterdir() if p.suffix not in (".py", ""))
        raise FileNotFoundError(f"there is no sample {name!r}; there are {', '.join(known)}")
    return path
