"""GGUF files: what ggml's own package has written is imported value for value, and a hostile file is a typed error.

Method: random checkpoints are laid out as llama.cpp's converter does and quantized by the package `gguf`, which is also
the oracle of what block types mean.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from llmscale import extras
from llmscale.cli import app
from llmscale.errors import ConfigError, InvalidCheckpoint, InvalidTokenizer, ModelError, UnsupportedModel
from llmscale.models import gguf_header
from llmscale.models.gguf_config import read_gguf_model
from llmscale.models.gguf_header import read_gguf_header
from llmscale.models.gguf_tokenizer import tokenizer_files
from llmscale.models.loader import load_weights
from llmscale.models.locate import locate_model, model_name
from llmscale.models.registry import describe_model
from llmscale.models.spec import RopeScaling
from llmscale.quant.method import method_for
from llmscale.quant.weight import QuantizedWeight
from llmscale.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="needs the package gguf: pip install '.[node,gguf]'")

from llmscale.models.gguf_import import import_gguf
from tests.gguf_files import (
    TEXTS,
    gguf_tokenizer,
    meant,
    write_dense,
    write_gguf,
)


@pytest.fixture(autouse=True)
def _always_one_thread(one_thread: None) -> None:
    """See `one_thread`."""


def made(room: Path, changes: dict[str, object] | None = None, **options: Any) -> tuple[Path, dict[str, Tensor]]:
    """A file of a random model, and the tensors it was made from."""
    tensors = write_dense(room / "dense", **(changes or {}))
    options.setdefault("tokenizer", gguf_tokenizer())
    write_gguf(room / "model.gguf", room / "dense", tensors, **options)
    return room / "model.gguf", tensors


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 40}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("llama", {"tie_word_embeddings": True, "rope_theta": 500_000.0}),
        ("qwen2", QWEN2),
        ("qwen3", QWEN3),
    ],
)
def test_floats_are_imported_bit_for_bit(kind: str, changes: dict[str, object], tmp_path: Path) -> None:
    file, tensors = made(tmp_path, changes, kind=kind)
    imported = import_gguf(file, tmp_path / "out")
    assert (imported.kept, imported.dequantized, imported.floats) == (0, 0, len(tensors))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name
    model = describe_model(tmp_path / "out")
    assert model.spec == describe_model(tmp_path / "dense").spec
    load_weights(model.folder, model.spec)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_other_types_are_what_ggml_says_they_are(kind: str, tmp_path: Path) -> None:
    file, tensors = made(tmp_path, type_of=lambda _: kind)
    imported = import_gguf(file, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim == 1:
            assert torch.equal(found[name], value)
            continue
        wanted = {"F16": torch.float16}.get(kind, torch.bfloat16)
        assert found[name].dtype == wanted
        assert torch.equal(found[name], meant(name, value, kind).to(wanted)), name
    matrices = sum(value.ndim > 1 for value in tensors.values())
    assert imported.dequantized == (0 if kind in {"F16", "BF16"} else matrices)


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The fused projections that a folder stores quantized, by name."""
    model = describe_model(folder)
    assert model.spec.quantization is not None
    method = method_for(model.spec.quantization.layout)
    weights = load_weights(model.folder, model.spec)
    taken = {linear.weight.name: weights.take(linear.weight) for linear in model.spec.linears()}
    return {
        name: method.dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
        for name, weight in taken.items()
    }


def ignored(folder: Path) -> set[str]:
    """The modules that config.json says are dense, as other readers take it."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(set(quantization["ignore"])) == len(quantization["ignore"])
    return set(quantization["ignore"])


def test_four_bit_integers_are_kept_value_for_value(tmp_path: Path) -> None:
    file, tensors = made(tmp_path, type_of=lambda _: "Q4_0")
    imported = import_gguf(file, tmp_path / "out")
    assert imported.kept == 7 * 2, "every projection of the blocks"
    assert imported.dequantized == 2, "the embedding and the head"
    found, spec = dequantized(tmp_path / "out"), describe_model(tmp_path / "out").spec
    for linear in spec.linears():
        expected = torch.cat([meant(part.name, tensors[part.name], "Q4_0") for part in linear.weight.parts])
        kept = linear.weight.name != spec.head.weight.name
        assert torch.equal(found[linear.weight.name], expected if kept else expected.bfloat16()), linear.weight.name
    assert ignored(tmp_path / "out") == {"lm_head"}


def test_a_product_of_which_a_part_is_no_q4_0_is_dequantized_whole(tmp_path: Path) -> None:
    file, tensors = made(tmp_path, type_of=lambda name: "Q8_0" if "v_proj" in name or "head" in name else "Q4_0")
    imported = import_gguf(file, tmp_path / "out")
    assert imported.kept == 4 * 2
    stored = load_file(tmp_path / "out" / "model.safetensors")
    query = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stored[query], meant(query, tensors[query], "Q4_0").bfloat16())
    assert "model.layers.0.self_attn.o_proj.weight_packed" in stored
    dequantized(tmp_path / "out")
    attention = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qkv"]
    assert ignored(tmp_path / "out") == {"lm_head", *attention}
    dense = {name.removesuffix(".weight") for name in stored if name.endswith("_proj.weight")}
    assert ignored(tmp_path / "out") == {"lm_head", *dense}, "exactly the projections that are stored dense"


def test_integers_can_be_left_out(tmp_path: Path) -> None:
    file, _ = made(tmp_path, type_of=lambda _: "Q4_0")
    assert import_gguf(file, tmp_path / "out", keeps_integers=False).kept == 0
    assert describe_model(tmp_path / "out").spec.quantization is None


def test_the_vocabulary_gives_the_ids_of_the_original(tmp_path: Path) -> None:
    original = gguf_tokenizer()
    file, _ = made(tmp_path, tokenizer=original)
    import_gguf(file, tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out", vocabulary=320)
    for text in TEXTS:
        assert tokenizer.encode_part(text) == original.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.control_ids == {"<|begin|>": 0, "<|end|>": 1, "<|turn|>": 2}
    assert tokenizer.encode_chat([{"role": "user", "content": "fox"}])[0] == 2


@pytest.mark.parametrize(
    ("split", "said", "first"),
    [
        ("llama-bpe", {}, [0]),
        ("llama3", {}, [0]),
        ("llama-v3", {}, [0]),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, []),
        ("qwen2", {}, []),
        ("qwen2", {"tokenizer.ggml.add_bos_token": True}, [0]),
    ],
)
def test_a_prompt_begins_as_llama_cpp_has_it_where_a_file_does_not_say(
    split: str, said: dict[str, object], first: list[int], tmp_path: Path
) -> None:
    file, _ = made(tmp_path, split=split, metadata=said)
    import_gguf(file, tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.encode("fox") == first + tokenizer.encode_part("fox")
    assert tokenizer.encode_chat([{"role": "user", "content": "fox"}])[0] == 2, "a template says it itself"


@pytest.mark.parametrize(
    ("tokens", "kinds", "said", "ends"),
    [
        (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "a"], [3, 3, 3, 1], {"eos": 0}, [0, 1, 2]),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a"], [3, 3, 3, 1], {"eos": 0}, [0, 2]),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a"], [3, 3, 1, 1], {"eos": 0, "eot": 1}, [0, 1]),
        (["a", "b", "c", "<|im_end|>"], [1, 1, 1, 3], {"eom": 2}, [2, 3]),
        (["a", "b", "c", *["d"] * 400, "<|im_end|>"], [1, 1, 1, *[1] * 400, 3], {"eos": 2}, [2]),
        (["<|im_end|>"], None, {"eos": 1}, [1]),
        (7, [3], {}, []),
    ],
)
def test_an_answer_ends_on_what_a_vocabulary_calls_an_end(
    tokens: Any, kinds: Any, said: dict[str, int], ends: list[int], tmp_path: Path
) -> None:
    file, _ = made(tmp_path)
    header = read_gguf_header(file)
    named = {f"tokenizer.ggml.{name}_token_id": token for name, token in said.items()}
    others = {name: value for name, value in header.metadata.items() if "tokenizer." not in name}
    vocabulary = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    changed = replace(header, metadata=others | named | vocabulary)
    assert read_gguf_model(changed, "model.gguf", None).config["eos_token_id"] == ends


@pytest.mark.parametrize("split", [["llama-bpe"], 7, True])
def test_a_way_to_split_that_is_no_name_is_refused(split: Any) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": split}
    with pytest.raises(InvalidTokenizer, match="that splits as"):
        tokenizer_files(metadata, "model.gguf")


def test_a_file_is_served_as_the_folder_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmscale import LLM, SamplingParams

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, _ = made(tmp_path)
    folder = locate_model(str(file))
    assert folder.is_relative_to(tmp_path / "cache")
    assert model_name(str(file), folder) == "model"
    again = file.rename(tmp_path / "other.gguf")
    assert locate_model(str(again)) == folder, "it is known by what it holds"
    import_gguf(again, tmp_path / "out")
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    answers = [
        LLM(model, threads=1, kv_host_bytes=0).generate(TEXTS[0], greedy)[0].outputs[0].token_ids
        for model in (again, tmp_path / "out")
    ]
    assert answers[0] == answers[1]


def test_an_error_of_an_import_comes_through_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, _ = made(tmp_path, split="unheard-of")
    with pytest.raises(InvalidTokenizer, match=r"splits as 'unheard-of'.*--method keep --tokenizer FOLDER"):
        locate_model(str(file))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_command_imports_with_another_tokenizer_and_quantizes(tmp_path: Path) -> None:
    file, _ = made(tmp_path, split="unheard-of", type_of=lambda _: "Q4_0")
    own = tmp_path / "original"
    own.mkdir()
    gguf_tokenizer().save(str(own / "tokenizer.json"))
    words = ["quantize", str(file)]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "a"), "--method", "keep", "--tokenizer", str(own)])
    assert done.exit_code == 0, done.output
    assert Tokenizer(tmp_path / "a").encode(TEXTS[0])
    made_int8 = [*words, str(tmp_path / "b"), "--method", "int8", "--tokenizer", str(own)]
    done = CliRunner().invoke(app, made_int8)
    assert done.exit_code == 0, done.output
    found = describe_model(tmp_path / "b").spec.quantization
    assert found is not None
    assert found.label == "int8"
    assert not list(tmp_path.glob(".b*")), "nothing is left of the way"
    assert "exists; give a folder that does not" in str(CliRunner().invoke(app, made_int8).exception)
    for wrong, said in (
        (["--method", "keep", "--symmetric"], "method keep takes no group size"),
        (["--method", "int8", "--seed", "3"], "give them with --calibrate FILE"),
        (["--method", "int8", "--group-size", "32"], "group size and symmetry are for int4"),
        (["--method", "keep", "--tokenizer", str(tmp_path / "dense")], "has no tokenizer.json"),
    ):
        done = CliRunner().invoke(app, [*words, str(tmp_path / "c"), *wrong])
        assert isinstance(done.exception, ConfigError)
        assert said in str(done.exception)


def test_scaled_rotations_are_told_from_their_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from llmscale.models.rope import inverse_frequencies
    from llmscale.models.spec import RopeSpec

    plain = RopeSpec(theta=500_000.0)
    scaled = RopeSpec(500_000.0, RopeScaling.LLAMA3, 8.0, 1.0, 4.0, 8192)
    factors = torch.tensor(inverse_frequencies(plain, 32)) / torch.tensor(inverse_frequencies(scaled, 32))
    changes: dict[str, object] = {"rope_theta": 500_000.0, "rope_scaling": scaling}
    file, _ = made(tmp_path / "a", changes, extra={"rope_freqs.weight": factors})
    import_gguf(file, tmp_path / "out")
    rope = describe_model(tmp_path / "out").spec.blocks[0].attention.rope
    assert (rope.scaling, rope.factor, rope.original_tokens) == (RopeScaling.LLAMA3, 8.0, 8192)
    file, _ = made(tmp_path / "b", changes, extra={"rope_freqs.weight": factors * 1.5})
    with pytest.raises(UnsupportedModel, match="is not made as Llama 3's is"):
        import_gguf(file, tmp_path / "none")
    for number, broken in enumerate((factors * 0, factors * float("nan"), factors[:4])):
        file, _ = made(tmp_path / f"broken-{number}", changes, extra={"rope_freqs.weight": broken})
        with pytest.raises(UnsupportedModel, match="is not made as Llama 3's is"):
            import_gguf(file, tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"kind": "mamba"}, UnsupportedModel, "general.architecture is 'mamba'; implemented are llama, qwen2, qwen3"),
        ({"metadata": {"llama.expert_count": 8}}, UnsupportedModel, "llama.expert_count is set"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, UnsupportedModel, "rope.scaling.type is 'yarn'"),
        ({"metadata": {"llama.rope.scaling.factor": 4.0}}, UnsupportedModel, "rope.scaling.factor scales rotations"),
        ({"metadata": {"llama.rope.scale_linear": 2.0}}, UnsupportedModel, "rope.scale_linear scales rotations"),
        ({"metadata": {"split.count": 3}}, UnsupportedModel, "is one of 3 parts of a model. Merge them first"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": torch.ones(4, 64)}}, UnsupportedModel, "a tensor 'blk.0.ffn_gate_inp"),
        (
            {"extra": {"blk.7.attn_norm.weight": torch.ones(64)}},
            InvalidCheckpoint,
            "'blk.7.attn_norm.weight' is not",
        ),
        ({"tokenizer": None}, InvalidTokenizer, "has a tokenizer 'None'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    options: dict[str, Any], error: type[ModelError], said: str, tmp_path: Path
) -> None:
    file, _ = made(tmp_path, **options)
    with pytest.raises(error, match=said):
        import_gguf(file, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    file, _ = made(tmp_path, type_of=lambda _: "Q4_0")
    entry = read_gguf_header(file).tensors["blk.1.ffn_up.weight"]
    content = bytearray(file.read_bytes())
    content[entry.begin : entry.begin + 2] = b"\x00\x7e"
    file.write_bytes(content)
    for keeps in (True, False):
        with pytest.raises(InvalidCheckpoint, match=r"blk.1.ffn_up.weight.* that is no number"):
            import_gguf(file, tmp_path / "out", keeps_integers=keeps)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = made(tmp_path, type_of=lambda _: "Q8_0")
    found = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(
        ConfigError, match=r"stored as Q8_0.*gguf is not installed; from.*pip install '\.\[node,gguf\]'"
    ):
        import_gguf(file, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file whose header is most of it."""
    room = tmp_path_factory.mktemp("gguf")
    file, _ = made(room, {"hidden_size": 16, "head_dim": 8, "intermediate_size": 16, "num_hidden_layers": 1})
    return file.read_bytes()


def read(path: Path, content: bytes) -> None:
    """All that is read of a file before its weights are."""
    path.write_bytes(content)
    try:
        header = read_gguf_header(path)
        read_gguf_model(header, path.name, None)
        tokenizer_files(header.metadata, path.name)
    except ModelError:
        return


@given(data=st.data())
def test_changed_and_cut_files_are_read_or_refused(
    data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            # Most of what matters is at the beginning.
            place = data.draw(st.integers(0, min(len(content), data.draw(st.sampled_from([64, 1_024, 1 << 20]))) - 1))
            content[place] = data.draw(st.integers(0, 255))
    read(tmp_path_factory.getbasetemp() / "fuzzed.gguf", bytes(content))


def headed(*parts: bytes, tensors: int = 0, entries: int = 1, version: int = 3) -> bytes:
    return b"".join((b"GGUF", struct.pack("<IQQ", version, tensors, entries), *parts, bytes(64)))


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARRAY, STRING = struct.pack("<I", 9), struct.pack("<I", 8)
MANY = struct.pack("<Q", 1 << 60)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes, too few"),
        (b"GGML" + bytes(100), "does not begin with GGUF"),
        (headed(version=1), "GGUF version 1, implemented are 2 and 3"),
        (headed(version=3 << 24), "is big-endian"),
        (headed(entries=1 << 62), r"has 4,611,686,018,427,387,904 entries of metadata; the limit is 65,536"),
        (headed(tensors=1 << 62), "tensors; the limit is 65,536"),
        (headed(MANY), "bytes in 'a name in the metadata', the limit is 1,024"),
        (headed(text(b"a"), STRING, MANY), "bytes in 'a', the limit is 16,777,216"),
        (headed(text(b"a"), ARRAY, struct.pack("<I", 0), MANY), "gives 'a' 1,152,921,504,606,846,976 elements"),
        (headed(text(b"a"), ARRAY, STRING, struct.pack("<Q", 1 << 24)), "gives 'a' 16,777,216 elements"),
        (headed(text(b"a"), ARRAY, ARRAY, MANY), "an array of type 9, expected numbers or strings"),
        (headed(text(b"a"), struct.pack("<I", 77)), "a value of type 77"),
        (headed(text(b"\xff"), STRING, text(b"b")), "which is not UTF-8"),
        (headed(text(b"a"), STRING, text(b"b"), text(b"a"), STRING, text(b"b"), entries=2), "names 'a' twice"),
        (
            headed(text(b"general.alignment"), struct.pack("<II", 4, 3)),
            "has alignment 3, expected a power of two",
        ),
        (headed(text(b"t"), struct.pack("<I", 99), tensors=1, entries=0), "'t' 99 dimensions, expected 1 to 4"),
        (
            headed(text(b"t"), struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), tensors=1, entries=0),
            "expected 1 to 4,398,046,511,104 elements",
        ),
        (headed(text(b"t"), struct.pack("<IQIQ", 1, 32, 99, 0), tensors=1, entries=0), "as type 99; implemented are"),
        (headed(text(b"t"), struct.pack("<IQIQ", 1, 31, 2, 0), tensors=1, entries=0), "rows of 31 in 't'"),
        (headed(text(b"t"), struct.pack("<IQIQ", 1, 1 << 20, 0, 0), tensors=1, entries=0), "'t' lies at bytes"),
        (headed(text(b"t"), struct.pack("<IQIQ", 1, 1, 0, (1 << 64) - 32), tensors=1, entries=0), "'t' lies at bytes"),
    ],
)
def test_a_hostile_header_is_refused_with_its_limit(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read_gguf_header(path)


def test_headers_are_bounded(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(whole)
    assert read_gguf_header(path).tensors
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1_000)
    with pytest.raises(InvalidCheckpoint, match="the header"):
        read_gguf_header(path)
    with pytest.raises(InvalidCheckpoint, match="cannot be read"):
        read_gguf_header(tmp_path / "none.gguf")
