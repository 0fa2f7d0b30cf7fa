"""Rows as metrics of an MLflow run, on a tracking server or in a database such as `sqlite:///runs.db`.

MLFLOW_TRACKING_URI names the server. A metric has the time of its step in the run, not that of its upload.
MLflow stores a metric of equal name, step, time and value once, so that rows whose upload was interrupted can
be sent again.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from typing_extensions import override

from sas_megatron.tracking.rows import Row
from sas_megatron.tracking.sent_record import SentRecord
from sas_megatron.tracking.tracker import NotReached, Save, TrackedRun, Tracker

# MLflow accepts up to 1,000 metrics and 100 parameters in a request, and parameters of 6,000 characters.
METRICS_PER_REQUEST, PARAMETERS_PER_REQUEST, MAX_PARAMETER_CHARACTERS = 1000, 100, 6000
RUN_ID_TAG = "sas_megatron.run_id"


class MlflowTracker(Tracker):
    """Sends rows with MLflow's client."""

    name = "mlflow"

    def __init__(self, run: TrackedRun) -> None:
        # MLflow's own waits are minutes long; a later attempt sends what is missing.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._run = run
        uri = _absolute_uri(mlflow.get_tracking_uri())
        self.destination = f"{_without_password(uri)} {run.config.logging.tracker_project}"
        self._client = MlflowClient(tracking_uri=uri)
        self._remote_id: str | None = None

    @override
    def recover(self, record: SentRecord) -> SentRecord:
        with _translated_errors():
            self._remote_id = record.remote_id or self._find_run() or self._create_run()
            self._client.update_run(self._remote_id, status="RUNNING")
        return record.model_copy(update={"remote_id": self._remote_id})

    def _find_run(self) -> str | None:
        """Return the run that an interrupted process has created."""
        experiment = self._client.get_experiment_by_name(self._run.config.logging.tracker_project)
        if experiment is None:
            return None
        runs = self._client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.`{RUN_ID_TAG}` = '{self._run.run_id}'"
        )
        return str(runs[0].info.run_id) if runs else None

    def _create_run(self) -> str:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        settings = self._run.config.logging
        experiment = self._client.get_experiment_by_name(settings.tracker_project)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            try:
                experiment_id = self._client.create_experiment(settings.tracker_project)
            except MlflowException:  # another run has created it in the meantime
                experiment_id = self._client.get_experiment_by_name(settings.tracker_project).experiment_id
        tags = {RUN_ID_TAG: self._run.run_id}
        if settings.tracker_group is not None:
            tags["sas_megatron.group"] = settings.tracker_group
        tags |= {f"sas_megatron.tag.{tag}": "true" for tag in settings.tracker_tags}
        start_time = int(self._run.started_at.timestamp() * 1000)
        created = self._client.create_run(
            experiment_id, start_time=start_time, tags=tags, run_name=self._run.name
        )
        parameters = [
            Param(field, str(value)[:MAX_PARAMETER_CHARACTERS]) for field, value in self._run.fields().items()
        ]
        for start in range(0, len(parameters), PARAMETERS_PER_REQUEST):
            some = parameters[start : start + PARAMETERS_PER_REQUEST]
            self._client.log_batch(created.info.run_id, params=some)
        return str(created.info.run_id)

    @override
    def send(self, rows: Sequence[Row], record: SentRecord, save: Save) -> SentRecord:
        from mlflow.entities import Metric

        assert self._remote_id is not None, "call recover() first"
        start = self._run.started_at.timestamp()
        pending: list[Metric] = []
        for index, row in enumerate(rows):
            time = int((start + (row.elapsed_seconds or 0.0)) * 1000)
            pending += [Metric(tag, value, time, row.step) for tag, value in row.scalars.items()]
            following = len(rows[index + 1].scalars) if index + 1 < len(rows) else METRICS_PER_REQUEST
            if len(pending) + following > METRICS_PER_REQUEST:
                with _translated_errors():
                    self._client.log_batch(self._remote_id, metrics=pending)
                pending = []
                record = record.model_copy(update={"last_step": row.step})
                save(record)
        return record

    @override
    def close(self, *, has_finished: bool) -> None:
        if has_finished and self._remote_id is not None:
            with _translated_errors():
                self._client.set_terminated(self._remote_id, status="FINISHED")


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise NotReached(error) from error


def _absolute_uri(uri: str) -> str:
    """Return the URI of a database in a file with an absolute path: the run may be resumed elsewhere."""
    start = "sqlite:///"
    if uri.startswith(start) and not uri.startswith("sqlite:////"):
        return f"{start}{Path(uri.removeprefix(start)).absolute()}"
    return uri


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
