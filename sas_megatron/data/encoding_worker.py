"""A worker process: receives chunks of documents, sends back their tokens.

Run as `python -m sas_megatron.data.encoding_worker DESCRIPTOR TOKENIZER`. It imports neither torch nor
Megatron-core, which would take seconds, and ends when its parent does, because its connection closes.
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
from sas_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedChunk:
    """The tokens of a chunk as the bytes that go to disk."""

    index: int
    tokens: bytes  # of the tokenizer's token_dtype, each document ended by end of document
    document_tokens: bytes  # int32 [documents], with end of document
    max_token_id: int


@dataclass(frozen=True)
class WorkerFailure:
    """Why a worker could not go on; sent in place of a result."""

    message: str
    is_user_error: bool


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> EncodedChunk:
    """The chunk's documents as tokens, each ended by end of document."""
    if len(chunk.document_bytes) == 0:
        return EncodedChunk(chunk.index, b"", b"", -1)
    documents = tokenizer.encode_documents(chunk.documents())
    end = np.array([tokenizer.eos_id], dtype=np.int32)
    tokens = np.concatenate([part for document in documents for part in (document, end)])
    lengths = np.fromiter((len(document) + 1 for document in documents), dtype="<i4", count=len(documents))
    return EncodedChunk(
        chunk.index, tokens.astype(tokenizer.token_dtype).tobytes(), lengths.tobytes(), int(tokens.max())
    )


def serve(connection: Connection, tokenizer_path: str) -> None:
    """Says that it is ready, then answers chunks until the other end closes."""
    try:
        tokenizer = Tokenizer(tokenizer_path)
        connection.send(tokenizer.sha256)
        while True:
            try:
                chunk = connection.recv()
            except EOFError:
                return
            connection.send(encode_chunk(tokenizer, chunk))
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent ended first
    except UserError as error:
        connection.send(WorkerFailure(str(error), is_user_error=True))
    except Exception:
        connection.send(WorkerFailure(traceback.format_exc(), is_user_error=False))


if __name__ == "__main__":
    # Ctrl-C reaches the whole group of processes: the parent ends in order, and with it the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As this file is __main__ here, what it sends must be of the classes the parent imports.
    from sas_megatron.data import encoding_worker

    encoding_worker.serve(Connection(int(sys.argv[1])), sys.argv[2])
