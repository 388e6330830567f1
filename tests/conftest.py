"""One thread per process: the rank tests fork, and a fork that inherits a used thread pool waits for it for ever."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"


@pytest.fixture
def nothing_failed_inside(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No error is on the log when the test has ended."""
    with caplog.at_level(logging.ERROR):
        yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages trained by the commands, once for all that use the result."""
    from tiny_runs import make_run

    return make_run(tmp_path_factory.mktemp("run"))
