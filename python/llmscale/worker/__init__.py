"""The process that owns one device: step inputs, KV region, executors."""
