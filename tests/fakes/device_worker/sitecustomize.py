"""Python runs this first where its folder and the one above are on PYTHONPATH: from then on workers compute on the fake
device. What the device has free, in bytes, is in the environment, and whether it does its work at once, without
graphs: ranks in processes of their own wait for each other's work, and a fake does none while nobody waits for it."""

import os

FREE_BYTES = "FAKE_DEVICE_FREE_BYTES"
PROMPT = "FAKE_DEVICE_PROMPT"


def _open_the_fake(module):
    open_device = module.open_device

    def open_fake(name, index=0):
        from tests.fakes.fake_device.machine import SCRIPT

        SCRIPT.free_bytes = int(os.environ[FREE_BYTES])
        if PROMPT in os.environ:
            SCRIPT.prompt, SCRIPT.max_graphs = True, 0
        return open_device(name, index)

    module.DEVICES["cpu"] = "tests.fakes.fake_device.device"
    module.open_device = open_fake


# Not in the test that reads the name here.
if __name__ == "sitecustomize":
    from after_import import after_import

    after_import("llmscale.devices.registry", _open_the_fake)
