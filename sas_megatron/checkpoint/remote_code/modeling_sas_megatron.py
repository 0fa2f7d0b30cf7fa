"""A decoder that sas_megatron trained, as a transformers model. It needs torch and transformers only.

    tokens [B, S] -> embedding -> layers: x + attention(norm(x)), then x + MLP(norm(x)) -> norm -> logits

With parallel residual branches, a layer is x + attention(norm(x)) + MLP(norm'(x)) instead. Parameters have
the same names and layouts as in training.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_sas_megatron import ATTENTIONS
from .attention_steps_sas_megatron import Positions, RopeCosSin
from .configuration_sas_megatron import SASMegatronConfig
from .rotary_frequencies import rotary_frequencies, scale_frequencies

# The name of the cache in transformers' arguments and results; `cache` from 5.24 on.
RESULTS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_NAME = "past_key_values" if "past_key_values" in RESULTS else "cache"


def build_norm(config: SASMegatronConfig) -> nn.Module:
    """Build RMSNorm or LayerNorm over the hidden size."""
    norms = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
    norm: nn.Module = norms[config.normalization](config.hidden_size, eps=config.norm_epsilon)
    return norm


class FeedForward(nn.Module):
    """The MLP. For SwiGLU, `linear_fc1` has the rows of the gate, then the rows of the other half."""

    def __init__(self, config: SASMegatronConfig) -> None:
        super().__init__()
        self.is_gated = config.activation == "swiglu"
        self.gelu_form = "tanh" if config.activation == "gelu_tanh" else "none"
        width, hidden, bias = config.intermediate_size, config.hidden_size, config.linear_bias
        self.linear_fc1 = nn.Linear(hidden, 2 * width if self.is_gated else width, bias=bias)
        self.linear_fc2 = nn.Linear(width, hidden, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output for hidden states, both [B, S, H]."""
        inner = self.linear_fc1(hidden)
        if self.is_gated:
            gate, linear = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * linear
        else:
            inner = F.gelu(inner, approximate=self.gelu_form)
        result: torch.Tensor = self.linear_fc2(inner)
        return result


class TransformerLayer(nn.Module):
    """Attention and MLP, each after a norm and on a residual branch."""

    def __init__(self, config: SASMegatronConfig, layer_index: int) -> None:
        super().__init__()
        self.has_parallel_branches = config.parallel_residual
        self.input_layernorm = build_norm(config)
        self.self_attention = ATTENTIONS[config.attention["kind"]](config, layer_index)
        self.pre_mlp_layernorm = build_norm(config)
        self.mlp = FeedForward(config)

    def forward(self, hidden: torch.Tensor, positions: Positions, cache: Cache | None) -> torch.Tensor:
        """Return the layer's output for hidden states, both [B, S, H]."""
        attended = hidden + self.self_attention(self.input_layernorm(hidden), positions, cache)
        mlp_input = hidden if self.has_parallel_branches else attended
        result: torch.Tensor = attended + self.mlp(self.pre_mlp_layernorm(mlp_input))
        return result


def _allowed_tokens(
    slots: torch.Tensor, num_past: int, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the tokens to which each new token may attend, [B or 1, 1, S, T]; None for the causal mask."""
    has_padding = attention_mask is not None and not bool(attention_mask.all())
    if not has_padding and (num_past == 0 or len(slots) == num_past + 1):
        return None
    new = slots[num_past:, None]
    causal = (slots <= new)[None, None]
    if attention_mask is None:
        return causal
    # A padding token attends to itself, since softmax needs at least one token.
    return (causal & attention_mask[:, None, None].bool()) | (slots == new)


class SASMegatronForCausalLM(PreTrainedModel, GenerationMixin):
    """The full decoder, for `AutoModelForCausalLM` and `generate`, without dropout."""

    config_class = SASMegatronConfig
    _no_split_modules = ("TransformerLayer",)
    _supports_sdpa = True

    def __init__(self, config: SASMegatronConfig) -> None:
        super().__init__(config)
        table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding = nn.ModuleDict({"word_embeddings": table})
        layers = [TransformerLayer(config, index) for index in range(config.num_hidden_layers)]
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(layers), "final_layernorm": build_norm(config)})
        if not config.tie_word_embeddings:
            self.output_layer: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, S, V], and the mean loss if there are labels.

        Args:
            input_ids: New tokens [B, S].
            attention_mask: [B, T], 0 for padding; None for no padding.
            position_ids: [B, S]; None to number the tokens that are not padding.
            past_key_values: The KV cache of T - S previous tokens, to which the new ones are added.
            inputs_embeds: Embeddings [B, S, H] instead of `input_ids`.
            labels: Target tokens [B, S].
            use_cache: Whether to return a KV cache; None for the config's default.
            output_attentions: Must not be set.
            output_hidden_states: Whether to return the hidden states of all layers.
            logits_to_keep: Return logits of the last tokens only; 0 for all.
            cache: `past_key_values` by its newer name.

        Raises:
            NotImplementedError: `output_attentions` is set.
            ValueError: The mask does not cover all tokens, or position ids contradict it.
        """
        if output_attentions:
            raise NotImplementedError("output_attentions: fused attention does not return its weights")
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        keeps = use_cache if use_cache is not None else self.config.use_cache and not self.training
        kept = past_key_values if cache is None else cache
        if keeps and kept is None:
            kept = DynamicCache()
        positions = self._positions(hidden, attention_mask, position_ids, kept)
        states = [hidden]
        for layer in self.decoder["layers"].children():
            hidden = layer(hidden, positions, kept)
            states = [*states, hidden] if output_hidden_states else states
        hidden = self.decoder["final_layernorm"](hidden)
        logits = F.linear(hidden[:, -logits_to_keep:], self._output_table())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
            **{CACHE_NAME: kept},
        )

    def _positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> Positions:
        num_past = cache.get_seq_length() if cache is not None else 0
        slots = torch.arange(num_past + hidden.shape[1], device=hidden.device)
        token_positions = slots[None]
        if attention_mask is not None:
            if attention_mask.shape[1:] != slots.shape:
                raise ValueError(
                    f"attention_mask of shape {tuple(attention_mask.shape)}: must be [sequences, "
                    f"{len(slots)}], with a column for each token, cached tokens included"
                )
            token_positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        if position_ids is not None and num_past == 0:
            token_positions = position_ids
        elif position_ids is not None and not bool((token_positions[:, num_past:] == position_ids).all()):
            raise ValueError(
                "position_ids: must number the tokens of attention_mask, as for the cached tokens"
            )
        rope = self._rope_cos_sin(token_positions)
        rope_of_new = RopeCosSin(*(part[..., num_past:, :] for part in rope))
        return Positions(rope_of_new, rope, _allowed_tokens(slots, num_past, attention_mask))

    def _rope_cos_sin(self, positions: torch.Tensor) -> RopeCosSin:
        """Return cosines and sines for positions [B or 1, tokens], computed in float32 as in training.

        A model without rotary embeddings rotates 0 features.
        """
        fields = self.config.attention
        width = fields["rotary_head_dim" if fields["kind"] == "mla" else "rotary_dim"]
        if fields.get("rotary") == "none":
            width = 0
        frequencies = scale_frequencies(
            rotary_frequencies(width, self.config.rotary_base, device=positions.device), self.config
        )
        angles = positions[:, None, :, None].float() * frequencies
        return RopeCosSin(angles.cos(), angles.sin())

    def _output_table(self) -> torch.Tensor:
        table: Any = self.get_output_embeddings() or self.get_input_embeddings()
        weight: torch.Tensor = table.weight
        return weight

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        return self.embedding["word_embeddings"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.embedding["word_embeddings"] = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer; None if the embedding table is used for it."""
        return None if self.config.tie_word_embeddings else self.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.output_layer = value

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a new model. A trained model loads all its weights."""
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)
