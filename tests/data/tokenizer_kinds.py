"""Small tokenizers of every kind, made with the libraries themselves, and texts that are hard to encode."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import random
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sas_megatron.data.tokenizer_training import train_tokenizer

WORDS = (
    "the quick brown fox and a lazy dog were là-bas; def f(x):\n"
    "        return x + 1234 # naïve café 东京 😀\n"
)
# The pattern of GPT-4o's and Llama 3's kind: words with one character before them, numbers of three digits.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TIKTOKEN_URL = "https://tiktoken.example/small.tiktoken"
END = "<|endoftext|>"


def _train_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    lines = [" ".join(random.Random(seed).sample(WORDS.split(), 8)) for seed in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def write_sentencepiece(folder: Path) -> Path:
    train_tokenizer([WORDS * 20], vocab_size=330, model_path=folder / "tokenizer.model")
    return folder / "tokenizer.model"


def write_prefixed(folder: Path) -> Path:
    """Write a model with the options of Llama 2's: a space before each text, identity normalization."""
    path = folder / "tokenizer.model"
    path.write_bytes(_train_sentencepiece(normalization_rule_name="identity", remove_extra_whitespaces=False))
    return path


def write_normalizing(folder: Path) -> Path:
    """Write a model with sentencepiece's default normalization, NFKC, which also strips spaces."""
    path = folder / "tokenizer.model"
    path.write_bytes(_train_sentencepiece())
    return path


def train_byte_level(*, normalizer: Any = None, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """Return a byte-level BPE that splits words as Llama 3's tokenizer does."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|begin|>", END, "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    return tokenizer


def write_byte_level(folder: Path) -> Path:
    train_byte_level().save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_llama2_json(folder: Path) -> Path:
    """Write a tokenizer.json as transformers converts Llama 2's model: BPE with byte fallback."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefoxqu"]
    tokens += ["\u2581a", "fo", "fox", "\u2581fox", "qu"]
    merges = [("\u2581", "a"), ("f", "o"), ("fo", "x"), ("\u2581", "fox"), ("q", "u")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def tiktoken_fields() -> dict[str, Any]:
    """Return the arguments of a small encoding: the bytes, and merges of the sample words."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in (b"th", b"the", b" the", b"  ", b"    ", b"fo", b"fox", b" fox", b"re", "é".encode(), b"12"):
        ranks[piece] = len(ranks)
    return {
        "name": "small",
        "pat_str": PATTERN,
        "mergeable_ranks": ranks,
        # A gap between the ranks and the special tokens, as in cl100k_base.
        "special_tokens": {END: 300, "<|user|>": 301},
    }


def write_tiktoken(folder: Path) -> Path:
    """Write the file in which a run keeps an encoding."""
    import tiktoken

    from sas_megatron.data.tiktoken_tokenizer import TiktokenTokenizer

    path = folder / "tokenizer.tiktoken"
    path.write_bytes(TiktokenTokenizer("small", tiktoken.Encoding(**tiktoken_fields())).files[path.name])
    return path


def write_tiktoken_plugin(folder: Path) -> dict[str, str]:
    """Write a package that registers the encoding `small`; return the environment of commands that find it.

    The ranks would be downloaded from an address that does not exist.
    """
    (folder / "tiktoken_ext").mkdir(parents=True)
    fields = {name: value for name, value in tiktoken_fields().items() if name != "mergeable_ranks"}
    (folder / "tiktoken_ext" / "small_encoding.py").write_text(
        "from tiktoken.load import load_tiktoken_bpe\n"
        "def small():\n"
        f"    return {{**{fields!r}, 'mergeable_ranks': load_tiktoken_bpe({TIKTOKEN_URL!r})}}\n"
        "ENCODING_CONSTRUCTORS = {'small': small}\n"
    )
    (folder / "cache").mkdir()
    return {"PYTHONPATH": str(folder), "TIKTOKEN_CACHE_DIR": str(folder / "cache")}


def write_tiktoken_ranks(folder: Path) -> None:
    """Put the ranks of `write_tiktoken_plugin` into the cache of tiktoken, as if they had been downloaded."""
    ranks = tiktoken_fields()["mergeable_ranks"].items()
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks]
    (folder / "cache" / hashlib.sha1(TIKTOKEN_URL.encode()).hexdigest()).write_bytes(b"".join(lines))


KINDS: dict[str, Callable[[Path], Path]] = {
    "sentencepiece": write_sentencepiece,
    "sentencepiece with prefix": write_prefixed,
    "byte-level bpe": write_byte_level,
    "llama 2 json": write_llama2_json,
    "tiktoken": write_tiktoken,
}


def encode_with_library(kind: str, path: Path, text: str) -> list[int]:
    """Return the ids that the library itself gives for a text without names of special tokens."""
    if kind.startswith("sentencepiece"):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids: list[int] = processor.encode(text)
        return ids
    if kind == "tiktoken":
        import tiktoken

        return tiktoken.Encoding(**tiktoken_fields()).encode_ordinary(text)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@functools.cache
def characters_of_every_category() -> list[str]:
    """Return characters of each general category and plane of Unicode, without surrogates."""
    found: dict[tuple[str, int], list[str]] = {}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        kept = found.setdefault((category, code >> 16), [])
        if category != "Cs" and (len(kept) < 3 or code in (0xFFFD, 0xFFFE, 0x2581, 0x10FFFF)):
            kept.append(chr(code))
    return [character for kept in found.values() for character in kept]


def fuzzed_documents(seed: int, *, count: int, line_characters: int) -> Sequence[str]:
    """Return documents of mixed characters of every category, NUL among them, and one long line."""
    generator = random.Random(seed)
    alphabet = [
        *characters_of_every_category(),
        *"\0\n\r\t  ",
        END,
        "</s>",
        "<0x0A>",
        "e\u0301",
        *WORDS.split(),
    ]
    documents = ["".join(generator.choices(alphabet, k=generator.randint(1, 60))) for _ in range(count)]
    line = " ".join(generator.choices(WORDS.split(), k=line_characters // 4))[:line_characters]
    return [*documents, line, "a" * (line_characters // 10), "\0"]
