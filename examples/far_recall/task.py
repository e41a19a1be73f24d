"""The task: what a generated document holds, which token ids it uses, and the shape of the contexts it is read in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megacontext_megatron.config import ConfigError, ContextConfig

Ask = Literal["content", "distance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Documents of exactly `source_length` tokens whose answers lie in collapsed blocks.

    `ask` content: `needles` far blocks hold one key with its value behind it, `answer_tokens` value symbols long, and
    `distractors` other value symbols; queries at the end name keys.  `ask` distance: every block repeats one value
    symbol; queries name one of `distances` lengths and want the symbol that stood so many tokens back.

    Each query symbol asks for one token of an answer, which follows it: for a value of two tokens a query is four
    tokens long.  Query symbols stand nowhere else, so that their ids tell which rows count.  A training document
    repeats its needles within their blocks, as often as a draw from `copies` says; held-out documents hold each once.
    Lengths are in tokens; `window` counts rows.  Raises ConfigError for a document that cannot hold what is asked.
    """

    ask: Ask = "content"
    source_length: int = 256
    window: int = 60
    block_size: int = 8
    max_level: Literal[1, 2] = 1
    recent_tokens: int = 32
    keys: int = 16
    values: int = 16
    noise: int = 16
    distances: int = 0
    needles: int = 8
    distractors: int = 3
    queries: int = 8
    answer_tokens: int = 1
    copies: tuple[int, ...] = (1,)
    level2_prob: float = 0.0

    def __post_init__(self) -> None:
        """Refuse documents that cannot be written."""
        _ = self.context
        if self.query_tokens > self.recent_tokens:
            raise ConfigError(f"{self.queries} queries need {self.query_tokens} tokens, recent_tokens has fewer.")
        if self.ask == "distance":
            if self.distances < 2 or self.answer_tokens != 1:
                raise ConfigError("asking by distance needs at least 2 distances and answers of one token.")
            return
        if self.needles > min(self.keys, self.far_blocks.stop - self.far_blocks.start):
            raise ConfigError(f"{self.needles} needles need as many keys and blocks beyond the newest window.")
        if self.queries > self.needles:
            raise ConfigError(f"{self.queries} queries for {self.needles} needles would repeat an answer.")
        if min(self.copies) < 1 or max(self.copies) * (1 + self.answer_tokens) + self.distractors > self.block_size:
            raise ConfigError(f"a block of {self.block_size} cannot hold needles {self.copies} times with distractors.")

    @property
    def context(self) -> ContextConfig:
        """The shape of the working contexts; plans are random."""
        return ContextConfig(
            window=self.window,
            source_length=self.source_length,
            block_size=self.block_size,
            max_level=self.max_level,
            recent_tokens=self.recent_tokens,
            horizon=self.recent_tokens,
            level2_prob=self.level2_prob,
        )

    @property
    def far_blocks(self) -> range:
        """Blocks that hold needles: whole ones that contexts cover and that the newest `window` tokens do not reach."""
        first = -(-self.context.dropped_tokens // self.block_size)
        return range(first, (self.source_length - self.window) // self.block_size)

    @property
    def first_value(self) -> int:
        """Id of the first value symbol; keys come before."""
        return self.keys

    @property
    def first_noise(self) -> int:
        """Id of the first noise symbol."""
        return self.first_value + self.values

    @property
    def asked(self) -> int:
        """Number of different things that can be asked for: keys, or distances."""
        return self.keys if self.ask == "content" else self.distances

    @property
    def query_symbols(self) -> range:
        """Ids of the symbols that ask: those for the first token of every answer, then those for the second."""
        first = self.first_noise + self.noise
        return range(first, first + self.asked * self.answer_tokens)

    @property
    def end_of_document(self) -> int:
        """Id that the tokenizer takes for the end of a document; no document holds it."""
        return self.query_symbols.stop

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return self.end_of_document + 1

    @property
    def query_tokens(self) -> int:
        """Tokens at a document's end that are queries with their answers: a symbol for each token of an answer."""
        return self.queries * 2 * self.answer_tokens

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the value symbols."""
        return 1.0 / self.values

    def distance(self, symbol: int) -> int:
        """Return the tokens that distance symbol number `symbol` reaches back, never into the newest tokens."""
        reach = self.source_length - 2 * self.recent_tokens
        return self.recent_tokens + round(symbol * reach / (self.distances - 1))
