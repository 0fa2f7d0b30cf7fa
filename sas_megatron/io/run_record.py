"""The record of a run, run.json: its sessions, its provenance, and the identity of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sas_megatron.config.errors import FileProblem, translate_os_errors

RECORD = "run.json"
# Sessions of schema 1 have no number, and drew initial weights with torch's generator. Those of schema 2 draw
# them by position (model/weight_stream.py), so the same seed gives other weights.
SCHEMA = 2
_REMEDY = "restore it from a copy, or remove it: a resumed run then writes a new one"


class _Entry(BaseModel):
    # Other keys are kept, and not checked.
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class TokensRecord(_Entry):
    """The manifest of token files at the time when the run was trained with them."""

    bin_sha256: str
    tokenizer_sha256: str


class SessionRecord(_Entry):
    """A session of the run: from its start, or from a resume, to its end."""

    session: str
    host: str
    started_at: str
    from_step: Annotated[int, Field(ge=0)]


class RunRecord(_Entry):
    """The contents of run.json; the top level repeats the provenance of the last session."""

    schema_number: int = Field(default=1, alias="schema")
    # The token files by name, in the order of `data.prefixes`.
    corpus: dict[str, TokensRecord] | None = None
    sessions: list[SessionRecord] = []

    @property
    def run_id(self) -> str:
        """The id of the run, which run.json also names for other programs: that of its first session.

        Raises:
            IndexError: There is no session.
        """
        return self.sessions[0].session

    def list_sessions(self) -> list[dict[str, Any]]:
        """Return the entries of the sessions with all their keys."""
        return [session.model_dump(mode="json") for session in self.sessions]


def read_run_record(run: Path) -> RunRecord | None:
    """Read the run.json of a run directory; None if there is none.

    Raises:
        FileProblem: The file cannot be read, is damaged, or a later version wrote it.
    """
    path = run / RECORD
    if not path.exists():
        return None
    with translate_os_errors(path, problem="cannot be read", remedy=_REMEDY):
        content = path.read_bytes()
    try:
        record = RunRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged_record(path, f"{where + ': ' if where else ''}{first['msg']}") from None
    if record.schema_number > SCHEMA:
        raise FileProblem(
            path, f"has schema {record.schema_number}, newer than {SCHEMA}", "update the package"
        )
    return record


def damaged_record(path: Path, reason: str) -> FileProblem:
    """Return the error to raise if run.json lacks what a reader needs."""
    return FileProblem(path, f"is damaged ({reason})", _REMEDY)
