"""What every test shares: Hypothesis profiles and the instruction sets of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from jacpot import _backend

_quiet = [
    HealthCheck.too_slow,
    HealthCheck.function_scoped_fixture,
    HealthCheck.differing_executors,
]
settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=_quiet)
settings.register_profile("sanitizer", deadline=None, max_examples=15, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=_backend.core.build_info()["isas_supported"])
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with the kernels of every instruction set that this machine has."""
    with _backend.isa(request.param):
        yield request.param
