"""Python runs this first where its folder and the one above are on PYTHONPATH: from then on a worker's step raises when
it computes the id 5, as it would where one request meets a bug in a kernel. Other processes are as they were."""

DEADLY_ID = 5


def _raise_in_steps(module):
    compute = module.NativeSteps.compute

    def raising(steps, counts):
        ids = memoryview(steps._source.buffer("token_ids")).cast("B").cast("i")
        if DEADLY_ID in ids[: counts.rows].tolist():
            raise RuntimeError(f"a bug that the id {DEADLY_ID} meets")
        return compute(steps, counts)

    module.NativeSteps.compute = raising


# Not in the test that reads the id here.
if __name__ == "sitecustomize":
    from after_import import after_import

    after_import("llmscale.worker.native_runner", _raise_in_steps)
