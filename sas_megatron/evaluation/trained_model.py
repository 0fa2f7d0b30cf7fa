"""A trained GPT for inference: hidden states and logits of tokens, with or without a cache.

    tokens [B, S] -> embedding -> layers of this stage -> (next stage) -> norm -> hidden states [S, B, H]
      -> selected rows [K, H] -> logits of this rank's shard of the vocabulary [K, V/P]

The modules of Megatron-core's GPT are called separately, because its forward computes the logits of every
token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from sas_megatron.attention.kv_cache import KeyValueCache
from sas_megatron.attention.layer import AttentionLayer
from sas_megatron.checkpoint.restoring import open_checkpoint, restore_tensors
from sas_megatron.checkpoint.sharded_tensors import shard_weights
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.assembly import build_gpt_chunks


class TrainedModel:
    """The local shard of a trained model, without gradients and dropout.

    Every rank of the model must make the same calls.
    """

    def __init__(
        self, config: RunConfig, model: Any, tokenizer: Tokenizer, topology: Topology, *, step: int
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.topology = topology
        # Number of training steps.
        self.step = step
        self._model = model.eval().requires_grad_(False)
        self._last_stage = config.parallel.pipeline - 1

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last layers and therefore computes logits."""
        return self.topology.pipeline_rank == self._last_stage

    def new_cache(self, batch_size: int, *, max_tokens: int) -> KeyValueCache:
        """Return an empty cache.

        Args:
            batch_size: Number of sequences.
            max_tokens: Largest number of tokens of a sequence.

        Raises:
            FieldError: The attention comes from another package and does not support a cache.
        """
        for layer in self._model.decoder.layers:
            if not isinstance(layer.self_attention, AttentionLayer):
                raise FieldError(
                    "attention.kind",
                    self.config.attention.kind,
                    "has a layer without support for a key/value cache",
                    "derive the layer from sas_megatron.attention.layer.SelfAttentionLayer",
                )
        return KeyValueCache(batch_size, max_tokens=max_tokens, device=self.topology.device)

    @torch.no_grad()
    def hidden_states(
        self, tokens_BS: torch.Tensor, cache: KeyValueCache | None = None
    ) -> torch.Tensor | None:
        """Return the hidden states after the final norm, [S, B, H]; None on stages before the last.

        Args:
            tokens_BS: Sequences, padded at the end with any token. Without a cache they start at position 0;
                with a cache they follow the tokens in it.
            cache: Cache of earlier tokens, on which `begin_pass` was called. The new tokens are added to it.
        """
        model = self._model
        tokens_BS = tokens_BS.to(self.topology.device)
        if model.pre_process:
            stage_input = model.embedding(input_ids=tokens_BS, position_ids=None)
        else:
            shape = (tokens_BS.shape[1], tokens_BS.shape[0], model.config.hidden_size)
            stage_input = torch.empty(shape, dtype=model.config.pipeline_dtype, device=self.topology.device)
            self._receive(stage_input)
            model.set_input_tensor(stage_input)
        num_slots = tokens_BS.shape[1] if cache is None else cache.max_tokens
        stage_output: torch.Tensor = model.decoder(
            hidden_states=stage_input,
            attention_mask=None,
            rotary_pos_emb=model.rotary_pos_emb(num_slots)
            if self.config.attention.uses_model_rotary
            else None,
            inference_context=cache,
        )
        if self.is_last_stage:
            return stage_output
        self._send(stage_output)
        return None

    @torch.no_grad()
    def logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """Return the logits of the local vocabulary shard, [K, V/P], at least float32. Last stage only."""
        weight = None
        if self._model.share_embeddings_and_output_weights:
            weight = self._model.shared_embedding_or_output_weight()
        logits, _ = self._model.output_layer(hidden_KH.unsqueeze(1), weight=weight)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.squeeze(1).to(dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def full_logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """Return the logits of all tokens of the tokenizer, on every tensor rank. Last stage only."""
        logits: torch.Tensor = gather_from_tensor_model_parallel_region(self.logits(hidden_KH))
        return logits[:, : self.tokenizer.vocab_size]

    def broadcast_from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Broadcast values from the last stage to all stages.

        Args:
            values: The values; on other stages a tensor of the same shape, which is overwritten.
        """
        if self._last_stage:
            dist.broadcast(values, group=self.topology.pipeline_group, group_src=self._last_stage)
        return values

    def _receive(self, stage_input: torch.Tensor) -> None:
        dist.recv(stage_input, group=self.topology.pipeline_group, group_src=self.topology.pipeline_rank - 1)

    def _send(self, stage_output: torch.Tensor) -> None:
        next_stage = self.topology.pipeline_rank + 1
        dist.send(stage_output.contiguous(), group=self.topology.pipeline_group, group_dst=next_stage)


def load_trained_model(
    checkpoint: Path, config: RunConfig, tokenizer: Tokenizer, topology: Topology
) -> TrainedModel:
    """Verify a checkpoint of any layout and engine, and load its weights. Every rank must call this function.

    Raises:
        DamagedCheckpoint: Files are damaged. The message names them.
        FileProblem: This version does not read the checkpoint's format, or it holds another model.
    """
    verified = open_checkpoint(checkpoint)
    model_chunks = build_gpt_chunks(config, draws_weights=False)
    restore_tensors(verified, shard_weights(model_chunks))
    (model,) = model_chunks
    return TrainedModel(config, model, tokenizer, topology, step=verified.manifest.step)
