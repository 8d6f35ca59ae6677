"""A device for tests, behind the door that CUDA is behind; `device.py` is what a registry line names."""
