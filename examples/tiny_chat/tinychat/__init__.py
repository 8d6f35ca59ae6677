"""tinychat trains and measures the embedded models of llmscale on text that it generates itself.

`tasks` generates questions with exact answers, `tokenizer` and `dataset` turn them into token batches, `model`, `muon`
and `checkpoint` are the training core, `decode` and `scoring` measure, `export` writes a Hugging Face folder.
Everything is a pure function of fixed seeds; nothing is downloaded. The package knows nothing of the llmscale runtime.
"""
