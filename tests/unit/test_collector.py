"""The collector rests within a block and is as it was behind it, also when the block raises."""

from __future__ import annotations

import gc

import pytest

from llmscale.collector import paused_collector


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:  # a case, not an option
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with paused_collector():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(KeyError), paused_collector():
            raise KeyError("x")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
