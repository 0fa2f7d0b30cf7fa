"""Export a model of 128 MB; print its size and the growth of the peak memory, both in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from sas_megatron.checkpoint.export import export_model
from tests.run_configs import small_config

NUM_LAYERS, WIDTH, MLP_WIDTH, VOCAB_SIZE = 12, 512, 1024, 512


def build_weights() -> dict[str, torch.Tensor]:
    """Return full weights by global name."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings": (VOCAB_SIZE, WIDTH),
        "decoder.final_layernorm": (WIDTH,),
        "output_layer": (VOCAB_SIZE, WIDTH),
    }
    for layer in range(NUM_LAYERS):
        shapes |= {
            f"decoder.layers.{layer}.input_layernorm": (WIDTH,),
            f"decoder.layers.{layer}.self_attention.linear_qkv": (3 * WIDTH, WIDTH),
            f"decoder.layers.{layer}.self_attention.linear_proj": (WIDTH, WIDTH),
            f"decoder.layers.{layer}.pre_mlp_layernorm": (WIDTH,),
            f"decoder.layers.{layer}.mlp.linear_fc1": (2 * MLP_WIDTH, WIDTH),
            f"decoder.layers.{layer}.mlp.linear_fc2": (WIDTH, MLP_WIDTH),
        }
    return {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


def main(tokenizer: str, folder: str) -> None:
    """Export a model to `folder`."""
    config = small_config(
        attention={"kind": "mha", "num_heads": 8, "head_dim": 64},
        model={
            "num_layers": NUM_LAYERS,
            "hidden_size": WIDTH,
            "ffn_hidden_size": MLP_WIDTH,
            "vocab_size": VOCAB_SIZE,
        },
        data={"tokenizer": tokenizer},
    )
    weights = build_weights()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export_model(weights, config, folder=Path(folder), shard_bytes=8_000_000)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(sum(tensor.nbytes for tensor in weights.values()), 1024 * growth)


if __name__ == "__main__":
    main(*sys.argv[1:])
