"""Run transformers without a network and with an empty cache folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def offline_transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set the environment variables that transformers reads when it is imported."""
    home = tmp_path_factory.mktemp("hugging_face")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(home))
        yield
