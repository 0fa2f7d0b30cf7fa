"""A decoder that sas_megatron trained, as a transformers model; torch and transformers are all it needs.

    tokens [B, S] -> embedding -> layers: x + attention(norm(x)), then x + MLP(norm(x)) -> norm -> logits

Parameters have the names and the layout that they have in training.
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

from .attention_sas_megatron import ATTENTIONS, Angles, Places
from .configuration_sas_megatron import SASMegatronConfig

# What transformers calls the cache, in arguments and results alike; the second from 5.24 on.
RESULTS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE_NAME = "past_key_values" if "past_key_values" in RESULTS else "cache"


def build_norm(config: SASMegatronConfig) -> nn.Module:
    """RMSNorm or LayerNorm over the hidden size."""
    norms = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
    norm: nn.Module = norms[config.normalization](config.hidden_size, eps=config.norm_epsilon)
    return norm


class FeedForward(nn.Module):
    """The MLP; of SwiGLU, `linear_fc1` holds the gate's rows, then the others."""

    def __init__(self, config: SASMegatronConfig) -> None:
        super().__init__()
        self.is_gated = config.activation == "swiglu"
        width, hidden, bias = config.intermediate_size, config.hidden_size, config.linear_bias
        self.linear_fc1 = nn.Linear(hidden, 2 * width if self.is_gated else width, bias=bias)
        self.linear_fc2 = nn.Linear(width, hidden, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        inner = self.linear_fc1(hidden)
        if self.is_gated:
            gate, linear = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * linear
        else:
            inner = F.gelu(inner)
        result: torch.Tensor = self.linear_fc2(inner)
        return result


class TransformerLayer(nn.Module):
    """Attention and MLP, each behind a norm and on a residual branch."""

    def __init__(self, config: SASMegatronConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attention = ATTENTIONS[config.attention["kind"]](config, layer_index)
        self.pre_mlp_layernorm = build_norm(config)
        self.mlp = FeedForward(config)

    def forward(self, hidden: torch.Tensor, places: Places, cache: Cache | None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), places, cache)
        result: torch.Tensor = hidden + self.mlp(self.pre_mlp_layernorm(hidden))
        return result


def _readable(slots: torch.Tensor, num_past: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which of all T tokens each new one may read, [B or 1, 1, S, T]; None: all up to its own."""
    has_padding = attention_mask is not None and not bool(attention_mask.all())
    if not has_padding and (num_past == 0 or len(slots) == num_past + 1):
        return None
    new = slots[num_past:, None]
    causal = (slots <= new)[None, None]
    if attention_mask is None:
        return causal
    # A padding token reads itself, or nothing would be left to weigh.
    return (causal & attention_mask[:, None, None].bool()) | (slots == new)


class SASMegatronForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole decoder, for `AutoModelForCausalLM` and `generate`; dropout is left out."""

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
        """Logits [B, S, V], of the last `logits_to_keep` tokens where not 0; the mean loss of `labels`.

        Args:
            attention_mask: [B, T], 0 where a token is padding; None: nowhere.
            position_ids: [B, S]; None: each token's number among those that are no padding.
            past_key_values: What was kept of the T - S tokens before; it is added to.
            cache: The same, by its newer name.
        """
        if output_attentions:
            raise NotImplementedError("output_attentions: fused attention does not give its weights out")
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        keeps = use_cache if use_cache is not None else self.config.use_cache and not self.training
        kept = past_key_values if cache is None else cache
        if keeps and kept is None:
            kept = DynamicCache()
        places = self._places(hidden, attention_mask, position_ids, kept)
        states = [hidden]
        for layer in self.decoder["layers"].children():
            hidden = layer(hidden, places, kept)
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

    def _places(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> Places:
        num_past = cache.get_seq_length() if cache is not None else 0
        slots = torch.arange(num_past + hidden.shape[1], device=hidden.device)
        positions = slots[None]
        if attention_mask is not None:
            if attention_mask.shape[1:] != slots.shape:
                raise ValueError(
                    f"attention_mask of shape {tuple(attention_mask.shape)}: must be [sequences, "
                    f"{len(slots)}], a column for each token, those kept in the cache included"
                )
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        if position_ids is not None and num_past == 0:
            positions = position_ids
        elif position_ids is not None and not bool((positions[:, num_past:] == position_ids).all()):
            raise ValueError(
                "position_ids: must count the tokens of attention_mask, as those kept were counted"
            )
        of_all = self._angles(positions)
        of_new = Angles(*(part[..., num_past:, :] for part in of_all))
        return Places(of_new, of_all, _readable(slots, num_past, attention_mask))

    def _angles(self, positions: torch.Tensor) -> Angles:
        """[B or 1, tokens] -> angles in float32, as in training."""
        fields = self.config.attention
        width = fields["rotary_head_dim"] if fields["kind"] == "mla" else fields["rotary_dim"]
        pairs = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / self.config.rotary_base ** (pairs / width)
        angles = positions[:, None, :, None].float() * frequencies
        return Angles(angles.cos(), angles.sin())

    def _output_table(self) -> torch.Tensor:
        table: Any = self.get_output_embeddings() or self.get_input_embeddings()
        weight: torch.Tensor = table.weight
        return weight

    def get_input_embeddings(self) -> nn.Module:
        """The embedding's table."""
        return self.embedding["word_embeddings"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding's table."""
        self.embedding["word_embeddings"] = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer; None where the embedding's table serves as one."""
        return None if self.config.tie_word_embeddings else self.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the output layer."""
        self.output_layer = value

    def _init_weights(self, module: nn.Module) -> None:
        """For a model from nothing: a trained one's weights are all read."""
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)
