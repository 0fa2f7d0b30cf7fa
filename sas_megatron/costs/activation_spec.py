"""One microbatch in one layer on one rank, and the bytes that it saves for the backward pass. No torch.

An attention variant counts its activations in these units (`AttentionCosts.count_activation_bytes`). A tensor
that several operations save is counted once, for the first of them. Parameters are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from sas_megatron.costs.attention_backend import (
    PADDING,
    Backend,
    Device,
    first_key,
    query_chunks,
    window_blocks,
)

# Some statistics are saved in float32, whatever the precision of the activations.
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ActivationSpec:
    """The microbatch, layout and implementation that activations are counted for.

    Attributes:
        batch: B, sequences of the microbatch.
        length: S, tokens of a sequence.
        tensor: P, tensor ranks.
        context: C, context ranks.
        sequence: Whether sequence parallelism is on.
        element_bytes: Size of an activation's element.
        device: The device that computes the layer.
        backend: The implementation of core attention.
        window: Keys that a query attends to, fewer than S; None for all up to its own.
        restarts: Whether positions restart at document ends, so that each sample has its own.
        recomputed: The parts of the layer that `training.recompute_modules` recomputes.
        heads: Query heads and key heads of a tensor rank.
        attended_heads: Query heads and key heads of a context rank in core attention.
        num_blocks: r, the number of blocks of query heads that SAS averages; 1 otherwise.
    """

    batch: int
    length: int
    tensor: int
    context: int
    sequence: bool
    element_bytes: int
    device: Device
    backend: Backend
    window: int | None
    restarts: bool
    recomputed: frozenset[str]
    heads: tuple[int, int]
    attended_heads: tuple[int, int]
    num_blocks: int

    @property
    def tokens(self) -> int:
        """T = B·S/C, the tokens of a context rank."""
        return self.batch * self.length // self.context

    @property
    def local_tokens(self) -> int:
        """T/P under sequence parallelism, otherwise T."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    def local_bytes(self, width: int) -> int:
        """Return the bytes of `width` columns of the rank's local tokens."""
        return self.element_bytes * self.local_tokens * width

    def full_bytes(self, width: int) -> int:
        """Return the bytes of `width` columns of all T tokens."""
        return self.element_bytes * self.tokens * width

    def norm_bytes(self, width: int, kind: str, *, input_width: int | None = None) -> int:
        """Return the bytes that a norm saves for the rank's local tokens.

        These are its input and the statistics of each token: one for rmsnorm, two for layernorm. On a CPU,
        torch composes rmsnorm of several operations in float32, and also saves the normalized tensor.

        Args:
            width: Number of normalized columns.
            kind: `rmsnorm` or `layernorm`.
            input_width: Columns of the tensor that the input is a view of; None for `width`.
        """
        if kind == "rmsnorm" and self.device == "cpu" and self.element_bytes < FLOAT32_BYTES:
            return FLOAT32_BYTES * self.local_tokens * (2 * width + 1)
        saved = self.local_bytes(width if input_width is None else input_width)
        if kind == "layernorm":
            statistic = self.element_bytes if self.device == "cpu" else FLOAT32_BYTES
            return saved + 2 * statistic * self.local_tokens
        normalized = self.local_bytes(width) if self.device == "cpu" else 0
        return saved + FLOAT32_BYTES * self.local_tokens + normalized

    def dropout_mask_bytes(self, num_elements: int) -> int:
        """Return the bytes of a dropout mask, which on a CPU has the tensor's type."""
        return num_elements * (self.element_bytes if self.device == "cpu" else 1)

    def rope_bytes(self, width: int) -> int:
        """Return the bytes of cosines and sines of `width` columns each, for queries and again for keys."""
        samples = self.batch if self.restarts else 1
        return self.element_bytes * samples * self.length // self.context * 4 * width


@dataclass(frozen=True)
class CoreAttentionSpec:
    """Core attention in the layer that `layer` describes.

    Attributes:
        layer: The microbatch, layout and implementation.
        query_key_width: E, features of a query or key head.
        value_width: D, features of a value head.
        value_bytes: Bytes of the tensor that the value is a view of, which is saved if the value is.
        views: Those of `query`, `key` and `value` that are views of the same projected columns. Rotary
            embeddings, if any, are in separate tensors.
        columns_bytes: Bytes of these columns.
        has_dropout: Whether attention weights are dropped.
    """

    layer: ActivationSpec
    query_key_width: int
    value_width: int
    value_bytes: int
    has_dropout: bool
    views: frozenset[str] = frozenset()
    columns_bytes: int = 0

    def count_bytes(self) -> dict[str, int]:
        """Return the bytes saved by core attention (`attention`) and of its result (`projection`)."""
        layer = self.layer
        queries, keys = layer.heads
        heads, width = queries // layer.num_blocks, self.value_width
        # torch pads the values to the width of the keys. With one head, or heads of one feature, the result
        # is a view of the padded tensor, so the padding is saved as well.
        is_view = layer.context == 1 and 1 in (heads, width)
        if layer.backend in PADDING and is_view:
            width = self.query_key_width
        result = layer.full_bytes(heads * width)
        if "attention" in layer.recomputed:
            # Query, key, value, and the mask type as an int32.
            inputs = 4 + self._input_bytes(
                self.views,
                query=layer.full_bytes(queries * self.query_key_width),
                key=layer.full_bytes(keys * self.query_key_width),
                value=self.value_bytes,
            )
            return {"attention": inputs, "projection": result}
        if layer.backend == "cudnn":
            is_saved = layer.context == 1 and layer.num_blocks == 1
            return {"attention": self._cudnn_bytes(), "projection": 0 if is_saved else result}
        if layer.backend in ("fused", "varlen"):
            # It saves its result, which is the projection's input unless something changes it in between.
            # Results of the blocks of a window are concatenated.
            is_whole = layer.context == 1 and layer.num_blocks == 1 and layer.window is None
            is_saved = is_whole and width == self.query_key_width
            return {"attention": self._fused_bytes(), "projection": 0 if is_saved else result}
        counts = {
            "composed": self._composed_bytes,
            "unfused": self._unfused_bytes,
            "chunked": self._chunked_bytes,
        }
        return {"attention": counts[layer.backend](), "projection": result}

    def _input_bytes(self, views: frozenset[str], **num_bytes: int) -> int:
        """Return the bytes of saved heads, given the bytes of those that are not views of shared columns."""
        separate = sum(size for name, size in num_bytes.items() if name not in views)
        return separate + (self.columns_bytes if views & num_bytes.keys() else 0)

    @property
    def _attended_views(self) -> frozenset[str]:
        """`views` in core attention; heads from other context ranks are separate tensors."""
        return self.views if self.layer.context == 1 else frozenset()

    def _attended_bytes(self, num_heads: int, width: int) -> int:
        return self.layer.element_bytes * self._rows * num_heads * width

    @property
    def _rows(self) -> int:
        """B·S: a context rank's heads attend over full sequences."""
        return self.layer.batch * self.layer.length

    def _fused_bytes(self) -> int:
        """Return the bytes of query, key, value and result padded to E, and the log-sum-exp of each query."""
        queries, keys = self.layer.attended_heads
        # The value and the result are padded.
        elements = self._rows * (queries + keys) * self.query_key_width
        elements += self._count_window_elements(keys)
        inputs = self._input_bytes(
            self._attended_views,
            query=self._attended_bytes(queries, self.query_key_width),
            key=self._attended_bytes(keys, self.query_key_width),
        )
        return inputs + self.layer.element_bytes * elements + FLOAT32_BYTES * self._rows * queries

    def _count_window_elements(self, keys: int) -> int:
        """Return the elements that the blocks of a window save besides those without a window.

        The first block saves its part of keys and values, and the others save copies that begin with the last
        keys and values of the previous block. Keys without a copy belong to a tensor that is saved anyway.
        All blocks share a mask.
        """
        layer = self.layer
        if layer.window is None or layer.backend != "fused":
            return 0
        (rows, _), *others = _window_keys(layer.length, layer.window)
        copied = 2 * sum(num_keys for _, num_keys in others) - (layer.length - rows)
        return layer.batch * keys * self.query_key_width * copied + rows * (rows + layer.window - 1)

    def _cudnn_bytes(self) -> int:
        """Return the bytes of query, key, value and result, unpadded, and the log-sum-exp of each query."""
        queries, _ = self.layer.attended_heads
        elements = self._rows * queries * self.value_width
        return (
            self._separate_input_bytes()
            + self.layer.element_bytes * elements
            + FLOAT32_BYTES * self._rows * queries
        )

    def _separate_input_bytes(self) -> int:
        """Return the bytes of query, key and value, if the value is not padded."""
        queries, keys = self.layer.attended_heads
        # A value from other context ranks is a separate tensor.
        is_local = self.layer.context == 1
        return self._input_bytes(
            self._attended_views,
            query=self._attended_bytes(queries, self.query_key_width),
            key=self._attended_bytes(keys, self.query_key_width),
            value=self.value_bytes if is_local else self._attended_bytes(keys, self.value_width),
        )

    def _composed_bytes(self) -> int:
        """Return the float32 bytes of query, key, padded value, weights, dropout noise and product."""
        queries, _ = self.layer.attended_heads
        if self.layer.window is None:
            return FLOAT32_BYTES * self._rows * queries * 3 * (self.query_key_width + self.layer.length)
        blocks = _window_keys(self.layer.length, self.layer.window)
        of_queries = self._rows * queries * self.query_key_width
        of_keys = sum(num_keys for _, num_keys in blocks) * 2 * self.query_key_width
        weights = 3 * sum(num_queries * num_keys for num_queries, num_keys in blocks)
        return FLOAT32_BYTES * (of_queries + self.layer.batch * queries * (of_keys + weights))

    def _unfused_bytes(self) -> int:
        """Return the bytes of query, key, value and mask, and of the weights in float32 and the layer's type.

        Keys and values are repeated for each query head.
        """
        layer = self.layer
        queries, _ = layer.attended_heads
        heads = self._rows * queries * (2 * self.query_key_width + self.value_width)
        mask = layer.length * layer.length
        weights = self._rows * queries * layer.length
        saved = layer.element_bytes * heads + mask + FLOAT32_BYTES * weights
        if self.has_dropout:
            saved += layer.dropout_mask_bytes(weights)
        if self.has_dropout or layer.element_bytes < FLOAT32_BYTES:
            saved += layer.element_bytes * weights
        return saved

    def _chunked_bytes(self) -> int:
        """Query, key and value, and for each chunk of queries the weights of the keys that they attend to."""
        layer = self.layer
        queries, _ = layer.attended_heads
        weights = layer.batch * sum(
            (end - start) * (end - first_key(start, layer.window))
            for start, end in query_chunks(layer.length)
        )
        return self._separate_input_bytes() + layer.element_bytes * queries * weights


def _window_keys(length: int, window: int) -> list[tuple[int, int]]:
    """Return the numbers of queries and of keys of each of `window_blocks`."""
    sizes = window_blocks(length, window)
    return [(size, size + (window - 1 if index else 0)) for index, size in enumerate(sizes)]
