"""What a run's files tell of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.scaling.study.run_states import last_error

LAUNCHER = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\nexitcode  : 1\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "lm loss: 4\nsas-megatron: training stopped after step 5: rank 1 on b failed\n" + LAUNCHER,
            "sas-megatron: training stopped after step 5: rank 1 on b failed",
        ),
        ("sas-megatron: error: a.b=3: must be 4; use 4\n\n", "sas-megatron: error: a.b=3: must be 4; use 4"),
        (
            "[rank0]:   File x\n[rank0]: sas_megatron.training.health.TrainingFault: step 5: nan\n"
            + LAUNCHER,
            "[rank0]: sas_megatron.training.health.TrainingFault: step 5: nan",
        ),
        ("Traceback\n  File x\nValueError: no\nsome more\n", "ValueError: no"),
        ("slurmstepd: killed by the kernel\n", "slurmstepd: killed by the kernel"),
        ("\n \n", "nothing was printed"),
    ],
)
def test_the_reason_is_the_runs_own_word_before_its_launchers(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "log").write_text("RuntimeError: of the time before\n" + text)
    assert last_error(tmp_path / "log", offset=len("RuntimeError: of the time before\n")) == reason
