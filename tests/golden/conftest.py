"""The data and the unpacked checkpoints that all golden tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder below which every kind has its data."""
    from golden_runs import write_data  # here, because it imports fairseq

    root = tmp_path_factory.mktemp("golden")
    write_data(root)
    return root
