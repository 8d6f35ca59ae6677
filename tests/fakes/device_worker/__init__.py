"""Python runs `sitecustomize.py` first where this folder is on PYTHONPATH; see there."""
