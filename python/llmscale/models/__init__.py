"""Model folders and what they describe: spec, config, checkpoint, one file per architecture.

Only `loader` imports torch, so that a gateway or a simulator can describe a model without it. `describe_model` in
`registry` is the way in.
"""
