"""From a GGUF file's vocabulary to tokenizer.json: byte-level BPE whose way of splitting text is known by name.

Other vocabularies (SentencePiece, unknown splits) are refused with the advice to give the original's folder: a
tokenizer that is nearly right gives a model nearly right prompts, and nobody sees why. Linear in the vocabulary. It
does not know weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmscale.errors import InvalidTokenizer
from llmscale.models.gguf_header import Value

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that are found in a text before it is split."""
ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
        *("<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
    }
)
"""Texts of control tokens that end an answer, as llama.cpp has them: turns, messages and texts of chat formats."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
"""llama.cpp's names for the tokenizer of Llama 3. It begins every text with the token for that where a file does not
say whether it should, and files of these models mostly do not."""
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(LLAMA3, _LLAMA3),
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    "gpt-2": None,
}
"""Pattern by the file's name for it; None for that of GPT-2, which the library has."""
NORMALIZED = ("qwen2",)


def tokenizer_files(metadata: Mapping[str, Value], shown: str) -> dict[str, dict[str, object]]:
    """The content of tokenizer.json and tokenizer_config.json by name. Raises InvalidTokenizer."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(split, str) or split not in SPLITS:
        raise _refusal(
            f"{shown} has a tokenizer {str(kind)[:40]!r} that splits as {str(split)[:40]!r}; converted are"
            f" gpt2 tokenizers that split as {', '.join(SPLITS)}"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens", shown)
    merges = [merge.split(" ") for merge in _strings(metadata, "tokenizer.ggml.merges", shown)]
    if len(set(tokens)) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise _refusal(f"{shown} has a token twice, or a merge that is not two tokens")
    definition: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(metadata, tokens, shown),
        "normalizer": {"type": "NFC"} if split in NORMALIZED else None,
        "pre_tokenizer": _splitting(SPLITS[split]),
        "post_processor": _beginning(metadata, split, tokens, shown),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split in LLAMA3,
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos"):
        token = _named(metadata, name, tokens, shown)
        if token is not None:
            settings[f"{name}_token"] = token
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return {"tokenizer.json": definition, "tokenizer_config.json": settings}


def ends_by_text(metadata: Mapping[str, Value]) -> set[int]:
    """Ids of the control tokens that end an answer by what they are called; of a malformed vocabulary none."""
    tokens, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return set()
    pairs = enumerate(zip(tokens, kinds, strict=False))
    return {place for place, (token, kind) in pairs if kind == CONTROL and token in ENDS}


def _added(metadata: Mapping[str, Value], tokens: list[str], shown: str) -> list[dict[str, object]]:
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise _refusal(f"{shown} has no tokenizer.ggml.token_type for each of its {len(tokens):,} tokens")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": place, "content": token, "special": kind == CONTROL, **plain}
        for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _splitting(pattern: str | None) -> dict[str, object]:
    level: dict[str, object] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pattern is None:
        return level | {"use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}


def _beginning(metadata: Mapping[str, Value], split: str, tokens: list[str], shown: str) -> dict[str, object] | None:
    """What puts the token before every text that a model wants there."""
    token = _named(metadata, "bos", tokens, shown)
    if metadata.get("tokenizer.ggml.add_bos_token", split in LLAMA3) is not True or token is None:
        return None
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}},
    }


def _named(metadata: Mapping[str, Value], name: str, tokens: list[str], shown: str) -> str | None:
    place = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if place is None:
        return None
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(tokens):
        raise _refusal(f"{shown} has {name}_token_id {str(place)[:40]}, its vocabulary {len(tokens):,} tokens")
    return tokens[place]


def _strings(metadata: Mapping[str, Value], name: str, shown: str) -> list[str]:
    value = metadata.get(name)
    found = [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or not value or len(found) != len(value):
        raise _refusal(f"{shown} has no list of texts {name}")
    return found


def _refusal(said: str) -> InvalidTokenizer:
    return InvalidTokenizer(
        f"{said}. Import it with the tokenizer of the original: llmscale quantize FILE OUT --method keep --tokenizer"
        " FOLDER; then serve OUT."
    )
