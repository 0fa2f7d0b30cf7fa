"""Rotary frequencies, with the scalings that extend a model to longer sequences. Imports torch only.

The Hugging Face export ships this file, so that training and exported models share one formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def rotary_frequencies(width: int, base: float, *, device: torch.device | None = None) -> torch.Tensor:
    """Return θ^(-2i/R) for each of the R/2 pairs of rotated features, in float32 (arXiv 2104.09864, eq. 15).

    Args:
        width: R, the number of rotated features; 0 for none.
        base: θ.
        device: Device of the result.
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    frequencies: torch.Tensor = 1.0 / base ** (pairs / max(width, 1))
    return frequencies


def scale_frequencies(frequencies: torch.Tensor, config: Any) -> torch.Tensor:
    """Return scaled frequencies, in radians per token.

    `linear` divides all frequencies f by the factor s (Chen et al. 2023, arXiv 2306.15595). `llama3` does so
    below a number of rotations in the original length L, f·L/2π < low, keeps those above high, and
    interpolates between f/s and f in between (`apply_scaling` in the code of Llama 3.1, and
    `_compute_llama3_parameters` of transformers).

    Args:
        frequencies: [R/2], of `rotary_frequencies`.
        config: An object with the fields of the section `model` that begin with `rotary_`.
    """
    if config.rotary_scaling == "none":
        return frequencies
    scaled: torch.Tensor = frequencies / config.rotary_scaling_factor
    if config.rotary_scaling == "linear":
        return scaled
    low, high = config.rotary_low_frequency_factor, config.rotary_high_frequency_factor
    rotations = frequencies * config.rotary_original_length / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    mixed: torch.Tensor = (1 - kept) * scaled + kept * frequencies
    return mixed
