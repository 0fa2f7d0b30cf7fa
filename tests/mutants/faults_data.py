"""Faults in tokenizers and adopted token files."""

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "bytes-of-added-prefix-counted",
        "sas_megatron.data.tokenizer:Tokenizer.count_bytes",
        "self._byte_lengths[tokens] - self._prefix_lengths[tokens] * begins",
        "self._byte_lengths[tokens] - 0 * begins",
        "Bits per byte count the space that a tokenizer adds before each document.",
    ),
    Mutant(
        "special-tokens-in-text",
        "sas_megatron.data.json_tokenizer:JsonTokenizer.__init__",
        "self._tokenizer.encode_special_tokens = True",
        "self._tokenizer.encode_special_tokens = False",
        "The name of a special token in a document is encoded as this token.",
    ),
    Mutant(
        "documents-truncated-by-settings",
        "sas_megatron.data.json_tokenizer:JsonTokenizer.__init__",
        "self._tokenizer.no_truncation()",
        "self._tokenizer.no_padding()",
        "A length in tokenizer.json cuts every document.",
    ),
    Mutant(
        "end-of-document-not-in-hash",
        "sas_megatron.data.tokenizer:Tokenizer.__init__",
        "if self.end_of_document != named_end:",
        "if not self.end_of_document:",
        "Token files with another token after each document are taken for those of the same tokenizer.",
    ),
    Mutant(
        "adoption-without-range-check",
        "sas_megatron.data.adoption:_read_contents",
        "check_token_range(tokens, tokenizer.vocab_size, path)",
        "check_token_range(tokens, 1 << 40, path)",
        "Token files with ids that the tokenizer does not have are adopted.",
    ),
    Mutant(
        "adoption-without-end-check",
        "sas_megatron.data.adoption:_count_without_end",
        "count += int((last != tokenizer.eos_id).sum())",
        "count += int((last < 0).sum())",
        "Documents of adopted files without a token at their end are neither counted nor logged.",
    ),
)
