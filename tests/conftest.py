"""What holds for every test: how Hypothesis looks for examples."""

from __future__ import annotations

from hypothesis import settings

# An example of 0.7 ms took 338 ms once, because other processes had the cores: time proves nothing here.
settings.register_profile("llmscale", deadline=None)
settings.load_profile("llmscale")
