"""Changes a module right after it is imported, in processes that a test starts: for `sitecustomize` in folders here.

Imports nothing but the standard library, since Python runs it before everything else.
"""

import importlib.abc
import importlib.util
import sys


def after_import(name, change):
    """Calls `change(module)` when the module of this name has been executed for the first time."""
    sys.meta_path.insert(0, _Finder(name, change))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name, change):
        self._name = name
        self._change = change

    def find_spec(self, name, path=None, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self._change(module)

        spec.loader.exec_module = exec_module
        return spec
