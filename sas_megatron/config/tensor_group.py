"""What a layer's weights and activations cost where P tensor ranks share it; a variant states both in these.

Bytes follow the ring convention of `distributed.communication_counter`: of b bytes a rank sends
(P-1)/P·b in an all-gather or a reduce-scatter, twice that in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

# Gradients are added up in float32, whatever the precision of weights and activations.
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Weight:
    """One parameter, of all tensor ranks together."""

    # The cost term that counts it.
    term: str
    elements: int
    # Each tensor rank holds a P-th; otherwise each holds all of it.
    sharded: bool = False
    # Of one that each holds: a rank has the gradient of its own tokens alone (under sequence parallelism),
    # or of its own heads; None: the whole gradient.
    partial_over: Literal["tokens", "heads"] | None = None
    # Where that is a part, what adds the parts up: the engine once a step, or the layer every microbatch.
    summed_by: Literal["engine", "layer"] = "engine"

    def elements_of_rank(self, tensor: int) -> int:
        """What one of `tensor` ranks holds."""
        return self.elements // tensor if self.sharded else self.elements

    def is_summed(self, *, sequence: bool) -> bool:
        """Whether the ranks' gradients are added up."""
        return self.partial_over == "heads" or (self.partial_over == "tokens" and sequence)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in the forward and in the backward pass."""

    forward: Fraction = Fraction(0)
    backward: Fraction = Fraction(0)

    def __add__(self, other: Traffic) -> Traffic:
        """Both together."""
        return Traffic(self.forward + other.forward, self.backward + other.backward)

    @property
    def both(self) -> Fraction:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class TensorGroup:
    """The tensor ranks of a layer, and the microbatch that passes through it.

    T tokens, those of the context rank; widths are in elements a token. Under sequence parallelism a
    rank has T/P of the tokens outside of the parts that it shares with the others.
    """

    ranks: int
    tokens: int
    sequence: bool
    element_bytes: int

    def into_columns(self, width: int) -> Traffic:
        """Into a column-parallel linear, which each rank feeds all tokens: `width` columns, whose gradient
        is summed. Under sequence parallelism: gathered, and once more for the weight's gradient.
        """
        once = self._pass(width)
        return Traffic(once, 2 * once) if self.sequence else Traffic(backward=2 * once)

    def out_of_rows(self, width: int) -> Traffic:
        """Out of a row-parallel linear or the embedding: `width` columns, which are partial sums.

        Under sequence parallelism: summed for each rank's own tokens, and their gradients gathered.
        """
        once = self._pass(width)
        return Traffic(once, once) if self.sequence else Traffic(forward=2 * once)

    def handed_to_heads(self, width: int, *, gradient_bytes: int | None = None) -> Traffic:
        """Columns that every rank's heads read (`parallel.shared_columns`), and the sum of their gradients.

        `gradient_bytes` is of an element of that sum without sequence parallelism; None: as forward.
        """
        once = self._pass(width)
        if self.sequence:
            return Traffic(once, once)
        return Traffic(backward=2 * self._pass(width, gradient_bytes))

    def gathered(self, width: int) -> Traffic:
        """A P-th of `width` columns gathered from each rank; their gradients reduced and scattered."""
        once = self._pass(width)
        return Traffic(once, once)

    def traded(self, width: int, *, width_back: int) -> Traffic:
        """A P-th of `width` columns of all tokens for all columns of a P-th of the tokens; `width_back` back.

        The first rank's, where the tokens are not a multiple of P: it has one more than the last.
        """
        own = -(-self.tokens // self.ranks)
        others = self.tokens - own
        to_tokens, to_columns = Fraction(others, self.ranks), Fraction(own * (self.ranks - 1), self.ranks)
        return Traffic(
            self.element_bytes * (width * to_tokens + width_back * to_columns),
            self.element_bytes * (width * to_columns + width_back * to_tokens),
        )

    def _pass(self, width: int, element_bytes: int | None = None) -> Fraction:
        """Once round the ring: (P-1)/P of `width` columns of all tokens."""
        passed = (self.ranks - 1) * self.tokens * width * (element_bytes or self.element_bytes)
        return Fraction(passed, self.ranks)


def count_by_term(weights: Iterable[Weight]) -> dict[str, int]:
    """Elements of the weights, of all tensor ranks together, by term."""
    terms: dict[str, int] = {}
    for weight in weights:
        terms[weight.term] = terms.get(weight.term, 0) + weight.elements
    return terms
