"""Worker processes that encode chunks and return the results in the order of the chunks.

The processes of concurrent.futures would outlive a parent that is killed, and would import the parent's main
module, which in training imports torch. These workers end with their parent and import only what they need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType

from sas_megatron.config.errors import UserError
from sas_megatron.data.chunks import Chunk
from sas_megatron.data.encoding_worker import EncodedChunk, WorkerFailure
from sas_megatron.data.tokenizer import RefusedText, Tokenizer

# Results per worker that may wait for an earlier result; bounds the memory.
MAX_CHUNKS_AHEAD_PER_WORKER = 4


class RefusedDocument(UserError):
    """A document that the library of the tokenizer cannot encode; `number` counts those with text from 0."""

    def __init__(self, number: int, refused: RefusedText) -> None:
        self.number, self.refused = number, refused
        super().__init__(f"document {number}: {refused}")


class EncodingPool:
    """Worker processes with one tokenizer each; a context manager that ends them on exit."""

    def __init__(self, tokenizer: Tokenizer, num_workers: int) -> None:
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._chunk_of: dict[Connection, Chunk] = {}
        self._tokenizer_sha256 = tokenizer.sha256
        for _ in range(num_workers):
            self._start_worker(tokenizer)

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if kind is not None:
                process.terminate()
            process.wait()

    def wait_until_ready(self) -> None:
        """Wait until each worker has imported its modules and read the tokenizer.

        Raises:
            UserError: A worker was killed, or read another tokenizer than its parent.
            RuntimeError: A worker failed with an error of the program.
        """
        for connection in self._connections:
            if self._receive(connection) != self._tokenizer_sha256:
                raise UserError("tokenizer: the file changed while it was being read; run the command again")

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the workers, for measurements of their memory."""
        return [process.pid for process in self._processes]

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, EncodedChunk]]:
        """Yield each chunk with its tokens, in order; chunks are read only as fast as workers finish them.

        Raises:
            RefusedDocument: The library of the tokenizer cannot encode a document.
            UserError: A worker was killed, or raised a user error.
            RuntimeError: A worker failed with an error of the program.
        """
        remaining = iter(chunks)
        upcoming = next(remaining, None)
        idle = list(self._connections)
        in_flight: list[Chunk] = []  # in the order of the chunks
        finished: dict[int, EncodedChunk] = {}
        max_in_flight = MAX_CHUNKS_AHEAD_PER_WORKER * len(self._connections)

        def feed_workers() -> None:
            nonlocal upcoming
            while upcoming is not None and idle and len(in_flight) < max_in_flight:
                self._send(idle.pop(), upcoming)
                in_flight.append(upcoming)
                upcoming = next(remaining, None)  # read the next chunk while the workers encode

        feed_workers()
        while in_flight:
            busy = [connection for connection in self._connections if connection not in idle]
            for ready in wait(busy):
                assert isinstance(ready, Connection), "wait returned an object that is not a connection"
                encoded = self._receive(ready)
                assert isinstance(encoded, EncodedChunk), "a worker answers a chunk with its tokens"
                finished[encoded.index] = encoded
                idle.append(ready)
            feed_workers()  # keep workers busy while the caller writes the results
            while in_flight and in_flight[0].index in finished:
                chunk = in_flight.pop(0)
                yield chunk, finished.pop(chunk.index)
            feed_workers()  # yielded chunks have left in_flight and made room for more

    def _start_worker(self, tokenizer: Tokenizer) -> None:
        parent_end, worker_end = Pipe()
        environment = dict(os.environ)
        # The parent may have found the package by other means than PYTHONPATH.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment["TOKENIZERS_PARALLELISM"] = "false"  # each worker encodes in one thread
        command = [sys.executable, "-m", "sas_megatron.data.encoding_worker", str(worker_end.fileno())]
        process = subprocess.Popen(
            [*command, tokenizer.absolute_location, tokenizer.end_of_document],
            pass_fds=[worker_end.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        worker_end.close()
        self._connections.append(parent_end)
        self._processes.append(process)

    def _send(self, connection: Connection, chunk: Chunk) -> None:
        self._chunk_of[connection] = chunk
        try:
            connection.send(chunk)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._report_exit(connection) from error

    def _receive(self, connection: Connection) -> object:
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._report_exit(connection) from error
        if isinstance(message, WorkerFailure):
            if message.refused is not None:
                chunk = self._chunk_of[connection]
                raise RefusedDocument(chunk.first_document + message.refused.index, message.refused)
            raise (UserError if message.is_user_error else RuntimeError)(message.message)
        return message

    def _report_exit(self, connection: Connection) -> UserError:
        process = self._processes[self._connections.index(connection)]
        status = process.wait()
        return UserError(
            f"workers={len(self._processes)}: process {process.pid} ended unexpectedly (status {status}), "
            "possibly out of memory; run the command again with fewer workers to resume"
        )
