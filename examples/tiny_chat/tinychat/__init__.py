"""tinychat trains and measures the embedded models of llmscale on text that it generates itself.

Questions with exact answers come from `llmscale.embedded.tasks`, and nothing else of the runtime is known here.
`vocabulary_training` and `dataset` turn them into token batches, `model`, `muon` and `checkpoint` are the training
core, `decode` and `scoring` measure, `export` writes a Hugging Face folder. Everything is a pure function of fixed
seeds; nothing is downloaded.
"""
