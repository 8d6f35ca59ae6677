"""The parts of a model in torch: reference arithmetic of every operation, and the modules that an executor runs.

Nothing here knows a whole model, a step or a scheduler; `models.spec` is the only room of models that is read.
"""
