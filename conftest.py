"""Set-up for tests, laws and doctests alike."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker a core; also for commands that tests start

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)  # and for a torch that was loaded before


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Trainers and plans look for garbage: not again among modules and eleven thousand tests."""
    gc.collect()
    gc.freeze()
