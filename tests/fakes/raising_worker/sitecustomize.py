"""Python runs this first where its folder is on PYTHONPATH: from then on a worker's step raises when it computes the id
5, as it would where one request meets a bug in a kernel. Other processes are as they were."""

import importlib.abc
import importlib.util
import sys

DEADLY_ID = 5


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "llmscale.worker.model_runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            forward = module.ModelRunner.forward

            def raising(runner, step):
                if (step.token_ids == DEADLY_ID).any():
                    raise RuntimeError(f"a bug that the id {DEADLY_ID} meets")
                return forward(runner, step)

            module.ModelRunner.forward = raising

        spec.loader.exec_module = exec_module
        return spec


# Not in the test that reads the id here.
if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Finder())
