"""One thread and no network for every test, whatever the machine."""

from __future__ import annotations

import os
import shutil

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from browser import Browser

torch.set_num_threads(1)

# Building a mixture costs a second or so: few examples, and no assertion on time.
settings.register_profile(
    "coterie",
    deadline=None,
    max_examples=10,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("coterie")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same state of torch's generator and leaves torch's global settings as they were."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, where there is one."""
    pytest.importorskip("websocket")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here")
    started = Browser(program)
    yield started
    started.close()
