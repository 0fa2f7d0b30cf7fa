"""Cross-entropy of the output layer, computed in chunks of the vocabulary: no logits of all columns exist.

    hidden states [S, B, H] × the rank's rows of the output weight [V/P, H] -> losses [S, B]

    forward    per chunk: logits [T, C] -> running maximum, sum of exponentials, logit of the label
               all-reduce of the maximum, then of both sums, over the tensor ranks
    backward   per chunk: the same logits again -> softmax - one-hot -> gradient of the chunk's weight rows,
               and a float32 sum of the gradient of the hidden states

Chunks are columns for all tokens, rather than tokens for all columns: the gradient of a weight row is then
one product over all tokens, which is rounded once.

On a CPU, the full loss is computed in blocks of tokens (`blocked_cross_entropy`): Megatron-core's makes six
passes over all logits in forward and two in backward, each of which reads them from memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from typing_extensions import override

from sas_megatron.costs.output_loss import count_chunk_columns

# Logits of a block of tokens: 4 MiB in float32, which stay in a CPU's cache between the passes over them.
BLOCK_ELEMENTS = 2**20


class GPT(GPTModel):
    """Megatron-core's GPT, which can compute its losses in chunks of the vocabulary, or in blocks of tokens.

    Args:
        is_loss_chunked: Whether losses are computed in chunks, for which logits are never complete.
        is_loss_blocked: Whether losses are computed in blocks, on one tensor rank.
        z_loss: z in z·log²(Σ exp(logits)), which is added to each token's loss in training (Chowdhery et al.
            2022, PaLM, section 5; there 1e-4). It requires `is_loss_chunked`.
        arguments: The positional arguments of `GPTModel`.
        options: Its keyword arguments.
    """

    def __init__(
        self,
        *arguments: Any,
        is_loss_chunked: bool,
        is_loss_blocked: bool = False,
        z_loss: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.is_loss_chunked = is_loss_chunked
        self.is_loss_blocked = is_loss_blocked
        self.z_loss = z_loss

    @override
    def _postprocess(self, *, hidden_states: Any, labels: Any, **options: Any) -> Any:
        # Megatron-core 0.16.1 and 0.19.2 call it with keywords alone.
        is_separate = self.is_loss_chunked or self.is_loss_blocked
        if labels is None or not self.post_process or not is_separate:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **options)
        is_tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight
        if self.is_loss_blocked:
            return blocked_cross_entropy(hidden_states, weight, labels)
        losses_BS, log_sum_exp_BS = chunked_cross_entropy(
            hidden_states,
            weight,
            labels,
            group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
        )
        if self.z_loss > 0 and self.training:
            losses_BS = losses_BS + self.z_loss * log_sum_exp_BS.square()
        return losses_BS


def blocked_cross_entropy(
    hidden_SBH: torch.Tensor, weight_VH: torch.Tensor, labels_BS: torch.Tensor
) -> torch.Tensor:
    """Return each token's cross-entropy [B, S] over a vocabulary that one rank holds.

    Saved for the backward pass: the hidden states and the probabilities [T, V].

    Args:
        hidden_SBH: Hidden states [S, B, H].
        weight_VH: The output weight, [V, H].
        labels_BS: Label tokens [B, S].
    """
    losses: torch.Tensor = _BlockedCrossEntropy.apply(hidden_SBH, weight_VH, labels_BS)
    return losses


class _BlockedCrossEntropy(torch.autograd.Function):
    """For each block of tokens, logits and probabilities in forward, and all gradients in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels_BS: torch.Tensor
    ) -> torch.Tensor:
        hidden_TH, labels_T1 = hidden.flatten(0, 1), labels_BS.t().reshape(-1, 1)
        num_tokens, is_training = len(hidden_TH), any(ctx.needs_input_grad)
        block = max(1, BLOCK_ELEMENTS // len(weight))
        logits_CV = hidden.new_empty(min(block, num_tokens), len(weight))
        # Without gradients, only one block of probabilities exists.
        probabilities_TV = hidden.new_empty(num_tokens if is_training else len(logits_CV), len(weight))
        losses_T = hidden.new_empty(num_tokens)
        for first in range(0, num_tokens, block):
            tokens = slice(first, first + block)
            logits = logits_CV[: len(hidden_TH[tokens])]
            torch.mm(hidden_TH[tokens], weight.t(), out=logits)
            probabilities = probabilities_TV[tokens if is_training else slice(len(logits))]
            torch.softmax(logits, dim=1, out=probabilities)
            # The largest probability is 1/V or more, while that of the label can be 0 in float32.
            log_sum_exp = logits.amax(dim=1) - probabilities.amax(dim=1).log()
            losses_T[tokens] = log_sum_exp - logits.gather(1, labels_T1[tokens])[:, 0]
        if is_training:
            ctx.save_for_backward(hidden, weight, labels_BS, probabilities_TV)
        return losses_T.view(-1, labels_BS.shape[0]).t().contiguous()

    @staticmethod
    def backward(ctx: Any, gradient_BS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels_BS, probabilities_TV = ctx.saved_tensors
        hidden_TH, labels_T1 = hidden.flatten(0, 1), labels_BS.t().reshape(-1, 1)
        gradient_T1 = gradient_BS.t().reshape(-1, 1)
        block = max(1, BLOCK_ELEMENTS // len(weight))
        gradient_CV = hidden.new_empty(min(block, len(hidden_TH)), len(weight))
        hidden_gradient_TH, weight_gradient_VH = torch.empty_like(hidden_TH), torch.zeros_like(weight)
        for first in range(0, len(hidden_TH), block):
            tokens = slice(first, first + block)
            gradient = gradient_CV[: len(hidden_TH[tokens])]
            torch.mul(probabilities_TV[tokens], gradient_T1[tokens], out=gradient)
            gradient.scatter_add_(1, labels_T1[tokens], -gradient_T1[tokens])
            torch.mm(gradient, weight, out=hidden_gradient_TH[tokens])
            torch.addmm(weight_gradient_VH, gradient.t(), hidden_TH[tokens], out=weight_gradient_VH)
        return hidden_gradient_TH.view_as(hidden), weight_gradient_VH, None


def chunked_cross_entropy(
    hidden_SBH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_BS: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    sequence_parallel: bool,
    chunk_columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's cross-entropy over a vocabulary that is sharded over the tensor ranks.

    Args:
        hidden_SBH: Hidden states [S, B, H]; under sequence parallelism the rank's [S/P, B, H].
        weight_VH: The rank's rows of the output weight, [V/P, H]; ranks hold consecutive rows.
        labels_BS: Label tokens [B, S], of all tensor ranks.
        group: The P tensor ranks.
        sequence_parallel: Whether the hidden states are sharded: all-gather in forward and, again, in
            backward, and reduce-scatter of their gradient. Otherwise their gradient is all-reduced.
        chunk_columns: Columns of the vocabulary per chunk; None for `count_chunk_columns`.

    Returns:
        The losses and the logarithms of the sums of exponentials, both [B, S] in float32 (float64 if the
        weight is). Both have gradients.
    """
    columns = chunk_columns or count_chunk_columns(labels_BS.numel())
    losses, log_sum_exp = _ChunkedCrossEntropy.apply(
        hidden_SBH, weight_VH, labels_BS, group, sequence_parallel, columns
    )
    return losses, log_sum_exp


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sums over the vocabulary in forward; in backward the logits again, and the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels_BS: torch.Tensor,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        columns: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.group, ctx.sequence_parallel, ctx.columns = group, sequence_parallel, columns
        hidden_TH = _all_tokens(hidden, group if sequence_parallel else None)
        chunks = _Chunks(weight, labels_BS, rank=group.rank(), columns=columns)
        maximum_T = torch.full_like(chunks.labels_T, -torch.inf, dtype=chunks.dtype)
        sum_T, label_logit_T = torch.zeros_like(maximum_T), torch.zeros_like(maximum_T)
        for rows_CH, column_T, has_label_T in chunks:
            logits_TC = (hidden_TH @ rows_CH.t()).to(chunks.dtype)
            label_logit_T += logits_TC.gather(1, column_T[:, None])[:, 0] * has_label_T
            previous_T = maximum_T
            maximum_T = torch.maximum(previous_T, logits_TC.amax(dim=1))
            sum_T *= (previous_T - maximum_T).exp_()
            sum_T += logits_TC.sub_(maximum_T[:, None]).exp_().sum(dim=1)
        if group.size() > 1:
            local_maximum_T = maximum_T.clone()
            dist.all_reduce(maximum_T, op=dist.ReduceOp.MAX, group=group)
            sums_2T = torch.stack([sum_T * (local_maximum_T - maximum_T).exp_(), label_logit_T])
            dist.all_reduce(sums_2T, group=group)
            sum_T, label_logit_T = sums_2T
        log_sum_T = sum_T.log()
        losses_T = log_sum_T - (label_logit_T - maximum_T)
        # Tokens of the hidden states are ordered by position, then sequence.
        batch = labels_BS.shape[0]
        log_sum_exp_BS = (log_sum_T + maximum_T).view(-1, batch).t().contiguous()
        ctx.save_for_backward(hidden, weight, labels_BS, log_sum_exp_BS)
        return losses_T.view(-1, batch).t().contiguous(), log_sum_exp_BS

    @staticmethod
    def backward(
        ctx: Any, loss_gradient_BS: torch.Tensor, log_sum_gradient_BS: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels_BS, log_sum_exp_BS = ctx.saved_tensors
        gathering = ctx.group if ctx.sequence_parallel else None
        hidden_TH = _all_tokens(hidden, gathering)
        chunks = _Chunks(weight, labels_BS, rank=ctx.group.rank(), columns=ctx.columns)
        log_sum_exp_T = log_sum_exp_BS.t().reshape(-1)
        loss_gradient_T = loss_gradient_BS.t().reshape(-1)
        softmax_gradient_T = loss_gradient_T + log_sum_gradient_BS.t().reshape(-1)
        tokens = torch.arange(len(hidden_TH), device=hidden.device)
        hidden_gradient_TH = torch.zeros_like(hidden_TH, dtype=chunks.dtype)
        weight_gradient_VH = torch.empty_like(weight)
        for (rows_CH, column_T, has_label_T), gradient_CH in zip(
            chunks, weight_gradient_VH.split(ctx.columns), strict=True
        ):
            # From here on logits become probabilities, and these the gradient of the logits, in place.
            gradient_TC = (hidden_TH @ rows_CH.t()).to(chunks.dtype)
            gradient_TC.sub_(log_sum_exp_T[:, None]).exp_().mul_(softmax_gradient_T[:, None])
            gradient_TC[tokens, column_T] -= loss_gradient_T * has_label_T
            gradient_TC = gradient_TC.to(weight.dtype)
            hidden_gradient_TH += gradient_TC @ rows_CH
            torch.mm(gradient_TC.t(), hidden_TH, out=gradient_CH)
        hidden_gradient = _sum_over_ranks(
            hidden_gradient_TH.to(hidden.dtype), hidden, ctx.group, sequence_parallel=ctx.sequence_parallel
        )
        return hidden_gradient, weight_gradient_VH, None, None, None, None


class _Chunks:
    """The chunks of the rank's rows of the weight, with the labels that each chunk contains.

    Iterating yields the rows [C, H], the column in the chunk of each token's label, clamped to the chunk, and
    whether the label is in the chunk, 0 or 1.
    """

    def __init__(self, weight_VH: torch.Tensor, labels_BS: torch.Tensor, *, rank: int, columns: int) -> None:
        self._weight = weight_VH
        self._columns = columns
        # Sums over the vocabulary are taken in float32, as Megatron-core takes them, or higher.
        self.dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        self.labels_T = labels_BS.t().reshape(-1) - rank * len(weight_VH)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        first = 0
        for rows_CH in self._weight.split(self._columns):
            column_T = self.labels_T - first
            clamped_T = column_T.clamp(0, len(rows_CH) - 1)
            yield rows_CH, clamped_T, (column_T == clamped_T).to(self.dtype)
            first += len(rows_CH)


def _all_tokens(hidden: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the hidden states of all tokens, [T, H]; all-gathered over `group` if there is one."""
    if group is None or group.size() == 1:
        return hidden.flatten(0, 1)
    gathered = torch.empty(
        group.size() * hidden.shape[0], *hidden.shape[1:], dtype=hidden.dtype, device=hidden.device
    )
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered.flatten(0, 1)


def _sum_over_ranks(
    gradient_TH: torch.Tensor, hidden: torch.Tensor, group: dist.ProcessGroup, *, sequence_parallel: bool
) -> torch.Tensor:
    """Return the gradient of `hidden`, summed over the ranks, each of which has its columns' part."""
    if group.size() == 1:
        return gradient_TH.view_as(hidden)
    if not sequence_parallel:
        dist.all_reduce(gradient_TH, group=group)
        return gradient_TH.view_as(hidden)
    gradient = torch.empty_like(hidden)
    dist.reduce_scatter_tensor(gradient, gradient_TH.view(-1, *hidden.shape[1:]), group=group)
    return gradient
