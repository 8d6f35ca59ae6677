"""Python runs this first where its folder is on PYTHONPATH: from then on torch and its company cannot be found, as
where only the base dependencies are installed."""

import sys

ABSENT = {"torch", "numpy", "safetensors", "triton", "transformers"}


class _Without:
    """A finder that does not find these."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self._finder.find_spec(name, path, target)


# Not in the test that reads the names here.
if __name__ == "sitecustomize":
    sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
