"""A worker with a planted bug."""
