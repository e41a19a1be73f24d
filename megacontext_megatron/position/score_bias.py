"""What a bias on attention scores is given and returns; the biases themselves are in the files beside this one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.parameters import PositionalParameters, SumOverRanks


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasInputs:
    """What a bias may read: sq query rows of this rank against all sk rows of b sequences.

    `query` [sq, b, np, hn] and `key` [sk, b, ng, hn] are finished (rotated, where the layer rotates); `scores`
    [b, np, sq, sk] are their products with the softmax scale, in at least fp32.  `rows` int64 [sq] numbers the queries'
    rows among the keys'.  `centre` float64 [sk, b] and `width` int32 [sk, b] are those of all rows, in tokens.
    `features` [sk, b, m] is what `ScoreBias.features` returned, of all rows.  np and ng are the rank's own heads.
    """

    query: Tensor
    key: Tensor
    scores: Tensor
    rows: Tensor
    centre: Tensor
    width: Tensor
    features: Tensor | None = None

    @property
    def distance(self) -> Tensor:
        """Return mu_q - mu_k, float64 [b, sq, sk] in tokens."""
        centre = self.centre.t()
        return centre[:, self.rows, None] - centre[:, None, :]


class ScoreBias(PositionalParameters):
    """A term added to the scores of a layer's heads behind the softmax scale, fp32.

    Parameters hold all heads and are read through `shared`, whose backward sums over the ranks that hold heads.
    """

    def __init__(self, share: HeadShare, sum_over_ranks: SumOverRanks) -> None:
        super().__init__(sum_over_ranks)
        self.share = share

    def features(self, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        """Return numbers of each row that the bias needs of itself and of other rows, fp32 [s, b, m], or None.

        `hidden` [s, b, h] is the attention's input, all rows of this context-parallel rank; `query` [s, b, np, hn] and
        `key` [s, b, ng, hn] are normed and not yet rotated.
        """
        del hidden, query, key
        return None

    @property
    def has_features(self) -> bool:
        """Whether `features` returns something."""
        return type(self).features is not ScoreBias.features

    def linear_slopes(self, like: Tensor, features: Tensor | None) -> Tensor | None:
        """Return m, nats per token, where the bias is -m (mu_q - mu_k), None where it is not.

        It is [np] of this rank's heads, or [s, b, np] with one for each query row where `features`, as they were
        returned of those rows, decide.  It is on the device of `like`, in its dtype and in at least fp32.
        """
        del like, features
        return None

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias, fp32 (float64 where scores are), broadcastable to [b, np, sq, sk].

        What lies right of the causal diagonal is masked by the caller and may hold any finite number.
        """
        raise NotImplementedError
