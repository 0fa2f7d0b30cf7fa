"""A worker process that receives chunks of documents and sends back their tokens.

Run as `python -m sas_megatron.data.encoding_worker DESCRIPTOR TOKENIZER END_OF_DOCUMENT`. The worker imports
neither torch nor Megatron-core, which would take seconds. It ends with its parent process, because the
connection then closes.
"""

from __future__ import annotations

import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from sas_megatron.config.errors import UserError
from sas_megatron.data.chunks import Chunk
from sas_megatron.data.tokenizer import RefusedText, Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer


@dataclass(frozen=True)
class EncodedChunk:
    """The tokens of a chunk, as the bytes to write to disk."""

    index: int
    tokens: bytes  # of the tokenizer's token_dtype; each document ends with an end-of-document token
    document_tokens: bytes  # int32 [documents], number of tokens including the end-of-document token
    max_token_id: int


@dataclass(frozen=True)
class WorkerFailure:
    """The error of a worker; sent instead of a result."""

    message: str
    is_user_error: bool
    refused: RefusedText | None = None  # of a document that the library cannot encode


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> EncodedChunk:
    """Encode the documents of a chunk, and append an end-of-document token to each."""
    if len(chunk.document_bytes) == 0:
        return EncodedChunk(chunk.index, b"", b"", -1)
    documents = tokenizer.encode_documents(chunk.documents())
    end = np.array([tokenizer.eos_id], dtype=np.int32)
    tokens = np.concatenate([array for document in documents for array in (document, end)])
    lengths = np.fromiter((len(document) + 1 for document in documents), dtype="<i4", count=len(documents))
    return EncodedChunk(
        chunk.index, tokens.astype(tokenizer.token_dtype).tobytes(), lengths.tobytes(), int(tokens.max())
    )


def serve(connection: Connection, tokenizer_location: str, end_of_document: str) -> None:
    """Send the tokenizer's sha256 when ready, then answer each chunk until the other end closes."""
    try:
        tokenizer = load_tokenizer(tokenizer_location, end_of_document=end_of_document)
        connection.send(tokenizer.sha256)
        while True:
            try:
                chunk = connection.recv()
            except EOFError:
                return
            connection.send(encode_chunk(tokenizer, chunk))
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent process ended
    except RefusedText as refused:
        connection.send(WorkerFailure(str(refused), is_user_error=True, refused=refused))
    except UserError as error:
        connection.send(WorkerFailure(str(error), is_user_error=True))
    except Exception:
        connection.send(WorkerFailure(traceback.format_exc(), is_user_error=False))


if __name__ == "__main__":
    # Ctrl-C signals every process of the group. The parent shuts down in order and closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # This file runs as __main__ here; the import makes it send the classes that the parent imports.
    from sas_megatron.data import encoding_worker

    encoding_worker.serve(Connection(int(sys.argv[1])), sys.argv[2], sys.argv[3])
