"""Ranks that run one replica together: who they are, and how their tensors meet."""
