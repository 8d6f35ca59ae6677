"""Writes model folders with small real tokenizers, trained in milliseconds on fixed text, for tests without downloads.

`write_byte_level` is a byte-level BPE with ChatML control tokens, like Qwen's; `write_metaspace` is a BPE with byte
fallback and a beginning-of-sequence token, like Llama 2's. Both train in O(corpus) and give the same files every time.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "system user assistant hello world, how are you today? I am fine, thank you.",
    "numbers 0 1 2 3 4 5 6 7 8 9 and 12 plus 30 is 42; print(json) { } [ ] < > | _ im start end",
    "stop here. stop there. one two three four five six seven eight nine ten.",
)
VOCABULARY = 512


def write_byte_level(folder: Path, *, chat_template: str | None = CHATML) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": chat_template}
    return _write(folder, tokenizer, settings, eos_token_ids=[0, 2])


def write_metaspace(folder: Path) -> Path:
    """A folder with a SentencePiece-like tokenizer that puts `<s>` before every prompt."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    definition = json.loads(tokenizer.to_str())
    # Training makes every listed token special; in a converted SentencePiece model the bytes are ordinary vocabulary.
    definition["added_tokens"] = [
        entry for entry in definition["added_tokens"] if not entry["content"].startswith("<0x")
    ]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    return _write(folder, tokenizer, settings, eos_token_ids=2)


def _write(folder: Path, tokenizer: Tokenizer, settings: dict[str, object], *, eos_token_ids: int | list[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_ids}), encoding="utf-8")
    return folder
