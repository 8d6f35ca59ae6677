"""Goal: any fleet that can be written is read back as it was meant, and any text at all is a fleet or a `ConfigError`.

Method: hypothesis makes fleets from the structs' own types and writes them as TOML in several styles; it also spoils
texts in the middle. The line that an error names is compared with the line that was spoilt.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.errors import ConfigError
from llmscale.fleet_file import FleetFile, GatewayEntry, KeysEntry, LimitsEntry, ModelEntry, parse_fleet_file

PATH = Path("/somewhere/llmscale.toml")
paths = st.text(string.ascii_letters + "é 'ü\"\\#=[]", min_size=1, max_size=20).map("/{}".format)
names = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_/:-]{0,20}", fullmatch=True)


def entries(kind: type[msgspec.Struct], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Structs with any subset of their fields set, each within its bounds."""
    for field in msgspec.structs.fields(kind):
        if field.name not in given:
            given[field.name] = within(field.type)
    required = [field.name for field in msgspec.structs.fields(kind) if field.required]
    return st.fixed_dictionaries(
        {name: given[name] for name in required},
        optional={name: made for name, made in given.items() if name not in required},
    ).map(lambda fields: kind(**fields))


def within(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a bounded type, as msgspec describes it."""
    described = msgspec.inspect.type_info(kind)
    if isinstance(described, msgspec.inspect.UnionType):
        described = next(one for one in described.types if not isinstance(one, msgspec.inspect.NoneType))
    if isinstance(described, msgspec.inspect.BoolType):
        return st.booleans()
    if isinstance(described, msgspec.inspect.IntType):
        assert described.ge is not None, "a number has no lower bound"
        assert described.le is not None, "a number has no upper bound"
        return st.integers(described.ge, described.le)
    assert isinstance(described, msgspec.inspect.FloatType), described
    low = described.ge if described.ge is not None else described.gt
    assert low is not None, "a number has no lower bound"
    assert described.le is not None, "a number has no upper bound"
    return st.floats(low, described.le, exclude_min=described.ge is None)


def fleets() -> st.SearchStrategy[FleetFile]:
    model = entries(
        ModelEntry,
        model=paths,
        dtype=st.sampled_from(["auto", "float32"]),
        quantization=st.sampled_from(["int8", "int4-64"]),
        kv_dtype=st.sampled_from(["auto", "int8"]),
        executor=st.sampled_from(["auto", "native", "torch"]),
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        kv_disk=paths,
        replicas=st.integers(1, 4),
        nodes=st.just(()),
    )
    gateway = entries(
        GatewayEntry,
        host=st.just("0.0.0.0"),
        api_key_file=paths,
        kill_button=st.just(False),
        allowed_origins=st.lists(st.sampled_from(["https://a.example", "http://localhost:3000"]), max_size=3).map(
            tuple
        ),
        limits=entries(LimitsEntry),
    )
    keys = entries(KeysEntry, folder=paths, gateway=st.just("edge"))
    fields = {"models": st.dictionaries(names, model, min_size=1, max_size=4)}
    optional = {"fleet": st.text(string.ascii_letters, min_size=1, max_size=9), "gateway": gateway, "keys": keys}
    made = st.fixed_dictionaries(fields, optional=optional).map(lambda fields: FleetFile(**fields))
    return made.map(with_nodes)


def with_nodes(fleet: FleetFile) -> FleetFile:
    """Every second model has nodes beside its replicas, all different."""
    models = {
        name: msgspec.structs.replace(
            entry, nodes=(f"tcp://host-{number}:7000", f"ipc:///node-{number}"), replicas=entry.local_replicas
        )
        if number % 2
        else entry
        for number, (name, entry) in enumerate(fleet.models.items())
    }
    return msgspec.structs.replace(fleet, models=models)


def written(fleet: FleetFile, *, inline: bool) -> list[str]:
    """The file, line by line. `inline` puts the limits into braces and the nodes on lines of their own."""
    lines = [f"fleet = {text(fleet.fleet)}", "", "# the gateway", "[gateway]"]
    lines += set_fields(fleet.gateway, skip={"limits"})
    limits = list(set_fields(fleet.gateway.limits))
    lines += [f"limits = {{ {', '.join(limits)} }}"] if inline else ["[gateway.limits]", *limits]
    if fleet.keys is not None:
        lines += ["[keys]", *set_fields(fleet.keys)]
    for name, entry in fleet.models.items():
        lines += [f"[ models . {text(name)} ]", *set_fields(entry, skip={"nodes"})]
        if entry.nodes:
            addresses = [text(node) for node in entry.nodes]
            lines += (
                ["nodes = [", *(f"{one}," for one in addresses), "]"]
                if inline
                else [f"nodes = [{', '.join(addresses)}]"]
            )
    return lines


def set_fields(entry: msgspec.Struct, skip: frozenset[str] | set[str] = frozenset()) -> Iterator[str]:
    for name, value in msgspec.structs.asdict(entry).items():
        if value is not None and name not in skip:
            yield f"{name} = {text(value) if isinstance(value, str) else json.dumps(value)}"


def text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


@given(fleets(), st.booleans())
def test_a_fleet_that_is_written_is_read_back_the_same(fleet: FleetFile, inline: bool) -> None:
    assert parse_fleet_file("\n".join(written(fleet, inline=inline)), PATH) == fleet


@given(fleets(), st.booleans(), st.data())
def test_an_unknown_name_is_found_on_its_line(fleet: FleetFile, inline: bool, data: st.DataObject) -> None:
    lines = written(fleet, inline=inline)
    fields = [number for number, line in enumerate(lines) if line.partition(" =")[0].replace("_", "").isalpha()]
    spoilt = data.draw(st.sampled_from([number for number in fields if " = " in lines[number]]))
    name, _, rest = lines[spoilt].partition(" = ")
    lines[spoilt] = f"{name}x = {rest}"
    with pytest.raises(ConfigError) as caught:
        parse_fleet_file("\n".join(lines), PATH)
    assert str(caught.value).startswith(f"{PATH}:{spoilt + 1}: ")
    assert f"did you mean {name}?" in str(caught.value)


@settings(max_examples=200)
@given(fleets(), st.data())
def test_a_text_that_was_cut_about_is_a_fleet_or_an_error_of_one_line(fleet: FleetFile, data: st.DataObject) -> None:
    whole = "\n".join(written(fleet, inline=data.draw(st.booleans())))
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, min(len(whole), begin + 40)))
    junk = data.draw(st.text(string.printable + "é\0", max_size=12))
    check_junk(whole[:begin] + junk + whole[end:])


@given(st.text())
def test_any_text_is_a_fleet_or_an_error_of_one_line(junk: str) -> None:
    check_junk(junk)
    check_junk(f"[models.a]\nmodel = 'tiny-chat'\n{junk}")


def check_junk(junk: str) -> None:
    try:
        parse_fleet_file(junk, PATH)
    except ConfigError as error:
        said = str(error)
    else:
        return
    assert said.startswith(str(PATH))
    assert "\n" not in said
