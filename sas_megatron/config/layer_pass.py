"""One microbatch's forward pass through a layer on one rank, and the bytes it keeps for its backward pass.

A variant states what it keeps in these terms (`AttentionConfig.count_activation_bytes`). What is shared
by several operations counts once, where it is kept first; parameters count nowhere. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from sas_megatron.config.attention_backend import Backend, Device, chunks

# Of statistics that are kept in float32 whatever the precision of the activations.
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ActivationSpec:
    """B sequences of S tokens, of which the rank has T = B·S/C, or T/P between the parts that tensor ranks
    share under sequence parallelism; in elements of so many bytes.
    """

    batch: int
    length: int
    tensor: int
    context: int
    sequence: bool
    element_bytes: int
    device: Device
    backend: Backend
    # By documents' ends, in place of the causal mask.
    masked: bool
    # Of `training.recompute_modules`, those that are recomputed.
    recomputed: frozenset[str]
    # Query heads and key heads of the tensor rank, and those of them that it attends with.
    heads: tuple[int, int]
    attended_heads: tuple[int, int]
    # r, which the mean over simulated heads divides the query heads by.
    num_blocks: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.length // self.context

    @property
    def own_tokens(self) -> int:
        """T, or T/P under sequence parallelism."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    def own(self, width: int) -> int:
        """Bytes of `width` columns of the rank's own tokens."""
        return self.element_bytes * self.own_tokens * width

    def whole(self, width: int) -> int:
        """Bytes of `width` columns of all T tokens."""
        return self.element_bytes * self.tokens * width

    def norm(self, width: int, kind: str, *, within: int | None = None) -> int:
        """Bytes that a norm over `width` columns of the rank's own tokens keeps.

        Its input, `within` more columns or alone; one statistic a token for rmsnorm, two for layernorm.
        torch composes rmsnorm on a CPU, in float32, and keeps what it has normalized as well.
        """
        if kind == "rmsnorm" and self.device == "cpu" and self.element_bytes < FLOAT32_BYTES:
            return FLOAT32_BYTES * self.own_tokens * (2 * width + 1)
        kept = self.own(width if within is None else within)
        if kind == "layernorm":
            statistic = self.element_bytes if self.device == "cpu" else FLOAT32_BYTES
            return kept + 2 * statistic * self.own_tokens
        normalized = self.own(width) if self.device == "cpu" else 0
        return kept + FLOAT32_BYTES * self.own_tokens + normalized

    def dropped(self, num_elements: int) -> int:
        """Bytes of what says which of so many elements were dropped: torch draws floats on a CPU."""
        return num_elements * (self.element_bytes if self.device == "cpu" else 1)

    def tables(self, width: int) -> int:
        """Bytes of sines and cosines of `width` features each, for queries and again for keys."""
        return self.element_bytes * self.length // self.context * 4 * width


@dataclass(frozen=True)
class CoreAttentionSpec:
    """The core attention in such a pass: E features of a query or key head, D of a value head.

    `value_bytes` are of the tensor that the value is a view of, kept whole where the value is as it comes;
    `drops` says whether weights are dropped.
    """

    layer: ActivationSpec
    query_key_width: int
    value_width: int
    value_bytes: int
    drops: bool

    def count_bytes(self) -> dict[str, int]:
        """Terms `attention`, from queries, keys and values to the result, and `projection`, the result."""
        layer = self.layer
        queries, keys = layer.heads
        heads, width = queries // layer.num_blocks, self.value_width
        # Where torch pads the value, the result is as wide, and cut; of one head that is no copy.
        if layer.backend in ("fused", "composed") and layer.context == 1 and heads == 1:
            width = self.query_key_width
        result = layer.whole(heads * width)
        if "attention" in layer.recomputed:
            # The three inputs, and the type of the mask as a number.
            inputs = layer.whole((queries + keys) * self.query_key_width) + self.value_bytes + 4
            return {"attention": inputs, "projection": result}
        unchanged = layer.context == 1 and layer.num_blocks == 1 and width == self.query_key_width
        if layer.backend == "cudnn":
            result_is_kept = layer.context == 1 and layer.num_blocks == 1
            return {"attention": self._cudnn(), "projection": 0 if result_is_kept else result}
        if layer.backend == "fused":
            # It keeps its result, and that is the projection's input where nothing comes between.
            return {"attention": self._fused(), "projection": 0 if unchanged else result}
        kept = {"composed": self._composed, "unfused": self._unfused, "chunked": self._chunked}
        return {"attention": kept[layer.backend](), "projection": result}

    @property
    def _rows(self) -> int:
        """Tokens of whole sequences: those of a context rank's heads."""
        return self.layer.batch * self.layer.length

    def _fused(self) -> int:
        """Query, key, the value and the result padded to E; a sum of exponentials for each query."""
        queries, keys = self.layer.attended_heads
        mask = self._rows * self.layer.length if self.layer.masked else 0
        elements = self._rows * 2 * (queries + keys) * self.query_key_width + mask
        return self.layer.element_bytes * elements + FLOAT32_BYTES * self._rows * queries

    def _cudnn(self) -> int:
        """Query, key, value and the result as they are; a sum of exponentials for each query."""
        queries, keys = self.layer.attended_heads
        mask = self._rows * self.layer.length if self.layer.masked else 0
        elements = self._rows * ((queries + keys) * self.query_key_width + queries * self.value_width) + mask
        value = self.layer.element_bytes * self._rows * keys * self.value_width
        return (
            self.layer.element_bytes * elements
            + (self.value_bytes if self.layer.context == 1 else value)
            + FLOAT32_BYTES * self._rows * queries
        )

    def _composed(self) -> int:
        """In float32, for each query head: query, key and padded value; weights, noise, what that leaves."""
        queries, _ = self.layer.attended_heads
        return FLOAT32_BYTES * self._rows * queries * 3 * (self.query_key_width + self.layer.length)

    def _unfused(self) -> int:
        """For each query head: query, key and value; weights, in float32 and as they are used. The mask."""
        layer = self.layer
        queries, _ = layer.attended_heads
        heads = self._rows * queries * (2 * self.query_key_width + self.value_width)
        mask = layer.length * (self._rows if layer.masked else layer.length)
        weights = self._rows * queries * layer.length
        kept = layer.element_bytes * heads + mask + FLOAT32_BYTES * weights
        if self.drops:
            kept += layer.dropped(weights)
        if self.drops or layer.element_bytes < FLOAT32_BYTES:
            kept += layer.element_bytes * weights
        return kept

    def _chunked(self) -> int:
        """Query, key and value; for each chunk of queries the weights over the keys that they see."""
        layer = self.layer
        queries, _ = layer.attended_heads
        weights = layer.batch * sum((end - start) * end for start, end in chunks(layer.length))
        value = layer.element_bytes * self._rows * queries * self.value_width
        return (
            layer.element_bytes * queries * (2 * self._rows * self.query_key_width + weights)
            # What comes from other context ranks is in a tensor of its own.
            + (self.value_bytes if layer.context == 1 else value)
        )
