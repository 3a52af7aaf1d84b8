"""The drawer is made once; nothing changes it."""

from __future__ import annotations

import drawer as drawers
import pytest


@pytest.fixture(scope="session")
def drawer(tmp_path_factory):
    return drawers.fill(tmp_path_factory.mktemp("drawer"))
