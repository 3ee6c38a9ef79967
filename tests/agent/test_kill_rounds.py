"""Every record whose call returned is delivered once and in order, whenever its process is killed and whatever forked."""

from __future__ import annotations

import random

import pytest

from tests.agent.kill_rounds import OF_CHILDREN, THREADS, one_round


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [0.3, 0.7, 1.0])
def test_invariant_2_what_was_logged_is_delivered(killed_at: float) -> None:
    result = one_round(3000, killed_at)
    if killed_at >= 1:
        assert result["returned"] == THREADS * 3000 + OF_CHILDREN


@pytest.mark.long
@pytest.mark.timeout(300)  # the delivery itself has two minutes
@pytest.mark.parametrize("number", range(50))
def test_invariant_2_at_full_length(number: int) -> None:
    # A third comes to its end.
    killed_at = random.uniform(0.0, 1.5)
    result = one_round(100_000, killed_at)
    assert killed_at < 1 or result["returned"] == THREADS * 100_000 + OF_CHILDREN
