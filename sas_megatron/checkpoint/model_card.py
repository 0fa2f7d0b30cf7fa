"""The README of an exported model: how to load it, and where it is from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sas_megatron import __version__
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import count_parameters


@dataclass(frozen=True)
class Export:
    """What was written where, and by what it is known again."""

    folder: Path
    model_class: str
    # The field that keeps it from being a plain Llama; None where it is one.
    obstacle: str | None
    # Where the weights are from.
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
prompt = tokenizer("Text that goes on", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

- {code}
- The tokenizer is code in this folder on the sentencepiece model `tokenizer.model`: the same ids as in
  training for every text. Nothing is put before a text; documents end with `eos_token`.
- Logits are those of the training model, for the {vocab_size:,} tokens of the vocabulary; rows that only
  pad its tables are left out. Dropout is left out too.

## Where it is from

| | |
| --- | --- |
| weights | {origin} |
| sha256 of the weights (names, types, shapes, values; in no order) | `{weights_sha256}` |
| sha256 of the config, `training_config.yaml` | `{config_sha256}` |
| sha256 of the tokenizer | `{tokenizer_sha256}` |
"""


def write_card(path: Path, export: Export, config: RunConfig) -> None:
    """Writes the README of an exported model."""
    if export.obstacle is None:
        trust, code = "", "The model is a plain Llama: no code from this folder is needed for it."
    else:
        trust = ", trust_remote_code=True"
        code = f"The model's code is in this folder, since `{export.obstacle}` is not of the Llama format."
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
