"""A node: the engine of one replica and the processes that own its devices. `python -m llmscale.node --help`."""
