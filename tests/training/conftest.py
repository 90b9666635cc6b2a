"""What the tests of trainings on several ranks share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binarised corpus: 600 lines for training, 61 for validation."""
    from console import write_corpus  # here, because it imports fairseq

    return write_corpus(tmp_path_factory.mktemp("corpus"))
