"""`python -m llmscale.cli`."""

from llmscale.cli import main

main()
