"""A reward that needs no training and no labels: how many of the words are cheerful ones.

A toy, and a first lesson in what reinforcement does too well: a reward for every cheerful word is
soon answered by "glad glad glad glad". So a word counts once, and a third of the words is enough.
What keeps the rest of the answer English is the KL penalty.
"""

import re
from collections.abc import Sequence

WORDS = """
admirable adore agreeable amiable beautiful beauty beloved best better bless blessed blessing
blossom brave bright calm charm charming cheer cheerful cheerfully comfort comfortable content
courage dance dancing dear dearest delicious delight delighted delightful dream eager easily
easy enjoy enjoyed excellent fair faithful festival fine flower flowers fresh friend friendly
friends friendship garden gay generous gentle gently gift glad gladly glorious golden good
goodness grace gracious grand grateful great green happily happiness happy health hearty heaven
holiday home honest honor hope hopeful hopes jolly joy joyful joyous kind kindly kindness kiss
kissed laugh laughed laughing laughter light lively love loved lovely lovers loves loving lucky
marvellous mercy merrily merry mirth music nice noble peace peaceful perfect play playful
playing pleasant please pleased pleasure praise praised precious pretty pride proud pure rejoice
rest rich safe shining sing singing smile smiled smiles smiling soft song splendid star stars
strong summer sun sunlight sunny sunshine sweet sweetly sweetness tender tenderly thank thankful
thanks treasure triumph true trust victory warm warmly warmth welcome well willing willingly
wise wonder wonderful worthy yes young youth
"""
POSITIVE_WORDS = frozenset(WORDS.split())


ENOUGH = 1 / 3  # of the words


def positive_share(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """How cheerful each response is: 0 without a positive word, 1 if a third of its words are
    positive ones, all different."""
    return [cheerfulness(re.findall(r"[a-z']+", response.lower())) for response in responses]


def cheerfulness(words: Sequence[str]) -> float:
    share = len(POSITIVE_WORDS.intersection(words)) / max(1, len(words))
    return min(1.0, share / ENOUGH)
