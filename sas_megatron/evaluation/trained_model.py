"""A trained GPT on ranks that only reads: hidden states and logits of tokens, with a cache or without.

    tokens [B, S] -> embedding -> this stage's layers -> (the next stage) -> norm -> hidden states [S, B, H]
      -> rows that are asked for [K, H] -> logits of this rank's part of the vocabulary [K, V/P]

The parts of Megatron-core's GPT are called one by one: as a whole it makes logits of every token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from sas_megatron.attention.kv_cache import KeyValueCache
from sas_megatron.attention.layer import AttentionLayer
from sas_megatron.checkpoint.loading import open_checkpoint, restore_tensors
from sas_megatron.checkpoint.sharded_tensors import shard_weights
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.assembly import build_gpt_chunks


class TrainedModel:
    """This rank's part of a model, without gradients and without dropout.

    Every rank of the model must call its methods alike.
    """

    def __init__(
        self, config: RunConfig, model: Any, tokenizer: Tokenizer, topology: Topology, *, step: int
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.topology = topology
        # Steps of training.
        self.step = step
        self._model = model.eval().requires_grad_(False)
        self._last_stage = config.parallel.pipeline - 1

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the model's last layers, and so results."""
        return self.topology.pipeline_rank == self._last_stage

    def new_cache(self, batch_size: int, *, max_tokens: int) -> KeyValueCache:
        """An empty cache for so many sequences, each of so many tokens at most.

        Raises:
            FieldError: the attention is one from outside that cannot decode.
        """
        for layer in self._model.decoder.layers:
            if not isinstance(layer.self_attention, AttentionLayer):
                raise FieldError(
                    "attention.kind",
                    self.config.attention.kind,
                    "its layer cannot read tokens from a cache",
                    "derive it from sas_megatron.attention.layer.SelfAttentionLayer",
                )
        return KeyValueCache(batch_size, max_tokens=max_tokens, device=self.topology.device)

    @torch.no_grad()
    def hidden_states(
        self, tokens_BS: torch.Tensor, cache: KeyValueCache | None = None
    ) -> torch.Tensor | None:
        """[S, B, H] after the last norm; None on stages before the last.

        Args:
            tokens_BS: Sequences from their beginning, padded at the end with any token; with a cache what
                comes after the tokens that it holds, its pass begun.
            cache: What is kept of the tokens before, and is to be of these.
        """
        model = self._model
        tokens_BS = tokens_BS.to(self.topology.device)
        if model.pre_process:
            entering = model.embedding(input_ids=tokens_BS, position_ids=None)
        else:
            shape = (tokens_BS.shape[1], tokens_BS.shape[0], model.config.hidden_size)
            entering = torch.empty(shape, dtype=model.config.pipeline_dtype, device=self.topology.device)
            self._receive(entering)
            model.set_input_tensor(entering)
        num_slots = tokens_BS.shape[1] if cache is None else cache.max_tokens
        leaving: torch.Tensor = model.decoder(
            hidden_states=entering,
            attention_mask=None,
            rotary_pos_emb=model.rotary_pos_emb(num_slots)
            if self.config.attention.uses_model_rotary
            else None,
            inference_context=cache,
        )
        if self.is_last_stage:
            return leaving
        self._send(leaving)
        return None

    @torch.no_grad()
    def logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """[K, V/P], this rank's columns, in at least float32; on the last stage."""
        weight = None
        if self._model.share_embeddings_and_output_weights:
            weight = self._model.shared_embedding_or_output_weight()
        logits, _ = self._model.output_layer(hidden_KH.unsqueeze(1), weight=weight)
        widened = torch.promote_types(logits.dtype, torch.float32)
        return logits.squeeze(1).to(widened)  # type: ignore[no-any-return]

    @torch.no_grad()
    def whole_logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """[K, tokens of the tokenizer], the same on every tensor rank; on the last stage."""
        logits: torch.Tensor = gather_from_tensor_model_parallel_region(self.logits(hidden_KH))
        return logits[:, : self.tokenizer.vocab_size]

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """The last stage's values, on every stage; the others give a tensor of the same shape."""
        if self._last_stage:
            dist.broadcast(values, group=self.topology.pipeline_group, group_src=self._last_stage)
        return values

    def _receive(self, entering: torch.Tensor) -> None:
        dist.recv(entering, group=self.topology.pipeline_group, group_src=self.topology.pipeline_rank - 1)

    def _send(self, leaving: torch.Tensor) -> None:
        next_stage = self.topology.pipeline_rank + 1
        dist.send(leaving.contiguous(), group=self.topology.pipeline_group, group_dst=next_stage)


def load_trained_model(
    checkpoint: Path, config: RunConfig, tokenizer: Tokenizer, topology: Topology
) -> TrainedModel:
    """The weights of a checkpoint, of any layout and engine, compared with their checksums first.

    Every rank must call it.

    Raises:
        DamagedCheckpoint: names the damaged files.
        FileProblem: the checkpoint is of another version or model.
    """
    verified = open_checkpoint(checkpoint)
    pieces = build_gpt_chunks(config, draws_weights=False)
    restore_tensors(verified, shard_weights(pieces))
    (model,) = pieces
    return TrainedModel(config, model, tokenizer, topology, step=verified.manifest.step)
