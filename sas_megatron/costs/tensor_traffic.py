"""Weights that tensor ranks share, and the bytes that these ranks send for one layer. No torch.

Bytes follow the ring convention of `distributed.communication_counter`: for a tensor of b bytes, each of P
ranks sends (P-1)/P·b in an all-gather or a reduce-scatter, and twice that in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

# Gradients are accumulated in float32, whatever the precision of weights and activations.
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Weight:
    """One parameter, with its size over all tensor ranks.

    Attributes:
        term: The cost term that counts it.
        elements: Number of elements of the full weight.
        sharded: Whether each tensor rank holds 1/P of it; otherwise each rank holds a full copy.
        partial_over: For a replicated weight, why a rank's gradient is a partial sum: it comes from the
            rank's local tokens (under sequence parallelism), or from its local heads. None: it is complete.
        summed_by: Where partial gradients are summed over the ranks: in the engine once per step, or in the
            layer in every microbatch.
    """

    term: str
    elements: int
    sharded: bool = False
    partial_over: Literal["tokens", "heads"] | None = None
    summed_by: Literal["engine", "layer"] = "engine"

    def count_local_elements(self, tensor: int) -> int:
        """Return the number of elements that one of `tensor` ranks holds."""
        return self.elements // tensor if self.sharded else self.elements

    def is_summed(self, *, sequence: bool) -> bool:
        """Return whether its gradient is summed over the tensor ranks."""
        return self.partial_over == "heads" or (self.partial_over == "tokens" and sequence)


def sum_by_term(weights: Iterable[Weight]) -> dict[str, int]:
    """Return the elements of full weights, summed by cost term."""
    terms: dict[str, int] = {}
    for weight in weights:
        terms[weight.term] = terms.get(weight.term, 0) + weight.elements
    return terms


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in the forward and in the backward pass."""

    forward: Fraction = Fraction(0)
    backward: Fraction = Fraction(0)

    def __add__(self, other: Traffic) -> Traffic:
        """Return the sum, by pass."""
        return Traffic(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> Fraction:
        """Bytes of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class TensorGroup:
    """The tensor ranks of a layer, and the microbatch that passes through it.

    Widths are in elements per token. Under sequence parallelism, a rank holds T/P tokens outside of the
    tensor-parallel parts of the layer.

    Attributes:
        ranks: P, the size of the group.
        tokens: T, tokens of the microbatch on one context rank.
        sequence: Whether sequence parallelism is on.
        element_bytes: Size of an activation's element.
    """

    ranks: int
    tokens: int
    sequence: bool
    element_bytes: int

    def column_parallel_input(self, width: int) -> Traffic:
        """Return the traffic of the input of a column-parallel linear layer.

        Without sequence parallelism, the gradient of the input is all-reduced. With it, the input is
        all-gathered, its gradient reduce-scattered, and the input gathered again for the weight's gradient.
        """
        once = self._ring_pass(width)
        return Traffic(once, 2 * once) if self.sequence else Traffic(backward=2 * once)

    def row_parallel_output(self, width: int) -> Traffic:
        """Return the traffic of the output of a row-parallel linear layer or of the embedding.

        Without sequence parallelism, the partial sums are all-reduced. With it, they are reduce-scattered
        over the tokens, and their gradients all-gathered.
        """
        once = self._ring_pass(width)
        return Traffic(once, once) if self.sequence else Traffic(forward=2 * once)

    def shared_columns(self, width: int, *, gradient_bytes: int | None = None) -> Traffic:
        """Return the traffic of columns that the heads of every rank read (`distributed.shared_columns`).

        Args:
            width: Number of columns.
            gradient_bytes: Size of a gradient's element in the all-reduce that runs without sequence
                parallelism; None for the size of an activation's element.
        """
        once = self._ring_pass(width)
        if self.sequence:
            return Traffic(once, once)
        return Traffic(backward=2 * self._ring_pass(width, gradient_bytes))

    def all_gather(self, width: int) -> Traffic:
        """Return the traffic of all-gathering `width` columns; the backward pass is a reduce-scatter."""
        once = self._ring_pass(width)
        return Traffic(once, once)

    def all_to_all(self, width: int, *, return_width: int) -> Traffic:
        """Return the traffic of the first rank in two all-to-all exchanges.

        The first exchange sends 1/P of `width` columns for all tokens, and receives all columns for 1/P of
        the tokens; the second does the reverse with `return_width` columns. If P does not divide the tokens,
        the first rank has one token more than the last.

        Args:
            width: Number of columns in the first exchange.
            return_width: Number of columns in the second exchange.
        """
        local = -(-self.tokens // self.ranks)
        remote = self.tokens - local
        to_tokens, to_columns = Fraction(remote, self.ranks), Fraction(local * (self.ranks - 1), self.ranks)
        return Traffic(
            self.element_bytes * (width * to_tokens + return_width * to_columns),
            self.element_bytes * (width * to_columns + return_width * to_tokens),
        )

    def _ring_pass(self, width: int, element_bytes: int | None = None) -> Fraction:
        """Return (P-1)/P of the bytes of `width` columns of all tokens."""
        sent = (self.ranks - 1) * self.tokens * width * (element_bytes or self.element_bytes)
        return Fraction(sent, self.ranks)
