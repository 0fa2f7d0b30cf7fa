"""A Llama folder with its own byte-level BPE becomes SAS by commands: import, upcycle, train, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.loading import dump_tree, read_yaml
from tests.fork_server import run_command

# Python sources with all kinds of spaces, and text that a byte-level tokenizer splits within characters.
DOCUMENTS = [
    *Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8").split("\n\n"),
    "naïve café — 東京 😀 <|end_of_text|> <|begin_of_text|>",
]
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def write_llama(folder: Path) -> Any:
    """Write a random Llama 3.1 with a byte-level BPE, by the classes of transformers; return its tokenizer.

    As in Llama 3.1, the tokenizer adds a token before each text, and the model has more rows than tokens.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(DOCUMENTS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=336,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def run(folder: Path, *arguments: object) -> None:
    """Run a command of sas-megatron in a folder."""
    done = run_command(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr


def write_run(folder: Path, name: str, **attention: Any) -> None:
    """Write NAME.yaml with the sections that the import wrote, and fields of its attention."""
    sections = read_yaml(folder / "weights" / "base" / "model.yaml")
    tree = {
        **sections,
        "attention": {**sections["attention"], **attention},
        "data": {
            "prefixes": ["tokens/corpus"],
            "tokenizer": "weights/base/tokenizer.json",
            "sequence_length": 32,
            "split": [0.8, 0.2],
        },
        "optimizer": {"learning_rate": 0.01},
        "training": {"num_steps": 4, "global_batch_size": 4, "micro_batch_size": 2},
        "evaluation": {"num_sequences": 2},
        "logging": {"run_directory": f"runs/{name}", "interval": 1, "tensorboard": False},
    }
    (folder / f"{name}.yaml").write_text(dump_tree(tree), encoding="utf-8")


def losses_of(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row["train_loss"] for row in map(json.loads, lines) if row["kind"] == "train"]


@torch.no_grad()
def test_a_llama_with_its_own_tokenizer_is_upcycled_trained_and_exported(tmp_path: Path) -> None:
    import transformers

    tokenizer = write_llama(tmp_path / "llama")
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS), encoding="utf-8"
    )
    run(tmp_path, "checkpoint", "import", "llama", "--output", "weights/base")
    run(tmp_path, "data", "prepare", "corpus.jsonl", "--tokenizer", "llama", "--output", "tokens/corpus")
    write_run(tmp_path, "base")
    fields = {"kind": "sas", "initialization": "identity", "simulated_head_dim": 8, "head_expansion": 2}
    write_run(tmp_path, "sas", **fields)
    run(tmp_path, "checkpoint", "import", "llama", "--upcycle", "sas.yaml", "--output", "weights/sas")
    for name, num_steps in (("base", 1), ("sas", 4)):
        weights, steps = f"checkpoint.initial_weights=weights/{name}", f"training.num_steps={num_steps}"
        run(tmp_path, "train", f"{name}.yaml", weights, steps)
    base, sas = losses_of(tmp_path, "base"), losses_of(tmp_path, "sas")
    # Before the first update, the upcycled model computes the same as the Llama.
    assert sas[0] == pytest.approx(base[0], rel=1e-5)
    assert sas[-1] < sas[0]
    run(tmp_path, "checkpoint", "export", "runs/sas", "--output", "exported")
    exported_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for document in DOCUMENTS:
        ids = exported_tokenizer(document)["input_ids"]
        assert ids == bpe_ids(tokenizer, document), "the ids of training, without special tokens"
        assert exported_tokenizer.decode(ids) == document
    assert exported_tokenizer.eos_token_id == tokenizer.eos_token_id
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", trust_remote_code=True
    ).eval()
    assert model.config.rotary_scaling == "llama3"
    tokens = torch.tensor([bpe_ids(tokenizer, DOCUMENTS[0])[:32]])
    loss = model(tokens, labels=tokens).loss
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert loss < llama(tokens, labels=tokens).loss, "the model has learned its corpus"


def bpe_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text in which names of special tokens are text, without tokens around it."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids
