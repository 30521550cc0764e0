"""Generated text without broken characters: only bytes that can continue valid UTF-8.

Tokens are pieces of bytes, and a character outside of ASCII is two to four bytes, often of several
tokens. A model that is unsure draws bytes that make no character, which decode to U+FFFD. Here a
small automaton reads UTF-8 (Unicode Standard, table 3-7), and every token that it could not read on
is forbidden before the next one is chosen.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.sampling import FORBIDDEN
from gpt2mini.tokenizer import Tokenizer

WHOLE = 0  # the state between two characters
BROKEN = 8  # no character begins like this
# State -> bytes (first to last) -> next state. States 1 to 3 wait for so many bytes; 4 to 7 for the
# byte after E0, ED, F0 and F4, of which not all make a character.
UTF8 = {
    WHOLE: {
        (0x00, 0x7F): WHOLE,
        (0xC2, 0xDF): 1,
        (0xE0, 0xE0): 4,
        (0xE1, 0xEC): 2,
        (0xED, 0xED): 5,
        (0xEE, 0xEF): 2,
        (0xF0, 0xF0): 6,
        (0xF1, 0xF3): 3,
        (0xF4, 0xF4): 7,
    },
    1: {(0x80, 0xBF): WHOLE},
    2: {(0x80, 0xBF): 1},
    3: {(0x80, 0xBF): 2},
    4: {(0xA0, 0xBF): 1},
    5: {(0x80, 0x9F): 1},
    6: {(0x90, 0xBF): 2},
    7: {(0x80, 0x8F): 2},
    BROKEN: {},
}
BYTES_MISSING = [0, 1, 2, 3, 2, 2, 3, 3, np.iinfo(np.int32).max]  # of the character, by state


class ValidUTF8:
    """For `generate(..., valid_utf8=ValidUTF8(tokenizer, model.config.vocab_size))`: every text
    that is generated decodes without U+FFFD.

    A character is only begun if as many tokens are left as it may need, so that the last one is
    whole too. A stop token comes between characters. Ids without a token are never generated.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        known = sorted(i for i in tokenizer.vocab.values() if i < vocab_size)
        next_state = np.full((len(UTF8), vocab_size), BROKEN, np.uint8)
        next_state[:, known] = states_after([tokenizer.token_bytes(i) for i in known])
        self.next_state = torch.from_numpy(next_state)  # (states, vocab)
        self.missing = torch.tensor(BYTES_MISSING, dtype=torch.int32)[self.next_state.long()]


class TextStates:
    """Where each of several growing texts stands: between two characters, or inside of one."""

    def __init__(
        self,
        rule: ValidUTF8,
        token_ids: Int[Tensor, "rows tokens"],
        is_real: Bool[Tensor, "rows tokens"],
        stops: Int[Tensor, " stops"],
    ) -> None:
        device, stops = token_ids.device, stops.long()
        self.next_state = rule.next_state.to(device)
        self.missing = rule.missing.to(device, copy=True)  # (states, vocab)
        between = self.next_state[WHOLE, stops] == WHOLE  # (stops)
        self.missing[:, stops] = BYTES_MISSING[BROKEN]
        self.missing[WHOLE, stops[between]] = 0
        self.current = torch.full((len(token_ids),), WHOLE, device=device)  # (rows)
        for column, real in zip(token_ids.T, is_real.T, strict=True):
            self.read(column, real)

    def read(self, token_ids: Int[Tensor, " rows"], is_read: Bool[Tensor, " rows"]) -> None:
        """Take the next token of each row; broken characters of a prompt are passed over."""
        after = self.next_state[self.current, token_ids].long()  # (rows)
        afresh = self.next_state[WHOLE, token_ids].long()  # (rows)
        after = torch.where(after == BROKEN, afresh, after)
        after = torch.where(after == BROKEN, WHOLE, after)
        self.current = torch.where(is_read, after, self.current)

    def forbid_broken(
        self, logits: Float[Tensor, "rows vocab"], tokens_left: int
    ) -> Float[Tensor, "rows vocab"]:
        """tokens_left: how many may follow the token that is chosen now."""
        return logits.masked_fill(self.missing[self.current] > tokens_left, FORBIDDEN)


def states_after(tokens: list[bytes]) -> np.ndarray:
    """The state after each token, read in each state: (states, tokens)."""
    transitions = np.full((len(UTF8), 256), BROKEN, np.uint8)
    for state, ranges in UTF8.items():
        for (first, last), following in ranges.items():
            transitions[state, first : last + 1] = following
    lengths = np.array([len(token) for token in tokens])
    padded = np.array(tokens, dtype=bytes)  # (tokens), of the longest token's length
    table = padded.view(np.uint8).reshape(len(tokens), -1)  # (tokens, bytes)
    states = np.repeat(np.arange(len(UTF8), dtype=np.uint8)[:, None], len(tokens), axis=1)
    for position in range(table.shape[1]):
        longer = lengths > position
        states[:, longer] = transitions[states[:, longer], table[longer, position]]
    return states
