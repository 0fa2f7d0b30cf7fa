"""The model card (README.md) of an exported model: how to load it, and its origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sas_megatron import __version__
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import count_parameters


@dataclass(frozen=True)
class Export:
    """Properties of an exported model, including the checksums that identify it."""

    folder: Path
    model_class: str
    # The field, with its value, that the Llama format cannot express; None if the model needs no model code.
    obstacle: str | None
    # Location of the weights.
    origin: str
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

{parameters:,} parameters, trained by sas_megatron {version} on sequences of {length:,} tokens.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

- {code}
- The tokenizer uses code in this folder and the sentencepiece model `tokenizer.model`. It gives the same ids
as
  in training for every text. It adds no token before a text; documents end with `eos_token`.
- The logits equal those of the training model for the {vocab_size:,} tokens of the vocabulary. Rows that pad
  the vocabulary are removed, and so is dropout.

## Origin

| | |
| --- | --- |
| weights | {origin} |
| SHA-256 of the weights (names, types, shapes and values, independent of their order) | `{weights_sha256}` |
| SHA-256 of the config, `training_config.yaml` | `{config_sha256}` |
| SHA-256 of the tokenizer | `{tokenizer_sha256}` |
"""


def write_card(path: Path, export: Export, config: RunConfig) -> None:
    """Write the model card of an exported model to `path`."""
    if export.obstacle is None:
        trust, code = "", f"The model is a {export.model_class} and needs no code from this folder."
    else:
        trust = ", trust_remote_code=True"
        code = f"The code of the model is in this folder: the Llama format has no `{export.obstacle}`."
    parameters = sum(count_parameters(config).values())
    path.write_text(
        _CARD.format(
            title=f"{config.attention.kind.upper()}, {config.model.num_layers} layers",
            parameters=parameters,
            version=__version__,
            length=config.data.sequence_length,
            trust=trust,
            code=code,
            vocab_size=config.model.vocab_size,
            origin=export.origin,
            weights_sha256=export.weights_sha256,
            config_sha256=export.config_sha256,
            tokenizer_sha256=export.tokenizer_sha256,
        ),
        encoding="utf-8",
    )
