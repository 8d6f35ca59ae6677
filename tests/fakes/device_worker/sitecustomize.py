"""Python runs this first where its folder is on PYTHONPATH: from then on workers compute on the fake device.

What the device has free, in bytes, is in the environment."""

import importlib.abc
import importlib.util
import os
import sys

FREE_BYTES = "FAKE_DEVICE_FREE_BYTES"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "llmscale.devices.registry":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            open_device = module.open_device

            def open_fake(name, index=0):
                from tests.fakes.fake_device.machine import SCRIPT

                SCRIPT.free_bytes = int(os.environ[FREE_BYTES])
                return open_device(name, index)

            module.DEVICES["cpu"] = "tests.fakes.fake_device.device"
            module.open_device = open_fake

        spec.loader.exec_module = exec_module
        return spec


# Not in the test that reads the name here.
if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Finder())
