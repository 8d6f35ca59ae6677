"""The exceptions: the tree in the docstring is the tree of the classes, codes are unique and stable, and every reason
with which the core ends a request has its exception.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from llmscale import errors
from llmscale.errors import LlmscaleError

GATEWAY = Path(errors.__file__).parent / "gateway"
# Reasons with which a request ends well, or because its own client wanted so; they are no errors.
GOOD_ENDS = {"stop", "length", "aborted"}
# Kinds of one error that a client need not tell apart.
SHARE_THEIR_PARENTS_CODE = {"TemplateLimitReached"}


def tree() -> dict[str, str | None]:
    """Each class in the module's docstring with the class above it, by indentation."""
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.fullmatch(r"( *)([A-Z]\w+)(?:  +\S.*)?", line)
        if found is None or (not found[1] and found[2] != "LlmscaleError"):
            continue
        indent = len(found[1])
        above = [entry for entry in above if entry[0] < indent]
        parents[found[2]] = above[-1][1] if above else None
        above.append((indent, found[2]))
    return parents


def defined() -> dict[str, type[LlmscaleError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }


def all_errors() -> list[type[LlmscaleError]]:
    """Every error class of the package, those of the gateway's own included."""
    for path in sorted(GATEWAY.glob("*.py")):
        if not path.stem.startswith("__"):
            importlib.import_module(f"llmscale.gateway.{path.stem}")

    def below(kind: type[LlmscaleError]) -> list[type[LlmscaleError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    return [kind for kind in dict.fromkeys(below(LlmscaleError)) if kind.__module__.startswith("llmscale")]


def test_the_docstring_shows_every_exception_under_its_parent() -> None:
    bases = {name: kind.__base__.__name__ if kind.__base__ else None for name, kind in defined().items()}
    assert tree() == {name: None if base == "Exception" else base for name, base in bases.items()}


def test_a_status_in_the_docstring_is_the_status_of_the_class() -> None:
    stated = dict(re.findall(r"^ *([A-Z]\w+) .*HTTP (\d{3})", errors.__doc__ or "", flags=re.MULTILINE))
    assert stated
    assert {name: str(defined()[name].http_status) for name in stated} == stated


def test_every_exception_has_a_code_of_its_own() -> None:
    codes = [kind.__dict__.get("code") for kind in all_errors() if kind.__name__ not in SHARE_THEIR_PARENTS_CODE]
    assert None not in codes, "a class without a code of its own would be reported as its parent"
    assert len(codes) == len(set(codes)), sorted(str(code) for code in codes)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]+", str(code)) for code in codes)


def test_every_exception_says_what_it_is_and_has_a_status_of_an_error() -> None:
    for kind in all_errors():
        assert kind.__doc__, kind
        assert 400 <= kind.http_status <= 599, kind


def test_errors_of_requests_are_statuses_of_clients_and_failures_are_the_servers() -> None:
    for kind in all_errors():
        if issubclass(kind, errors.RequestError):
            assert kind.http_status < 500, kind
        if issubclass(kind, errors.RequestFailed | errors.ModelError | errors.TransportError):
            assert kind.http_status >= 500, kind


def test_every_code_that_the_gateway_compares_or_writes_exists() -> None:
    codes = {kind.code for kind in all_errors()}
    used = set()
    for path in sorted(GATEWAY.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                used.add(node.value.value)
            if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".code"):
                used |= {side.value for side in node.comparators if isinstance(side, ast.Constant)}
    assert {code for code in used if isinstance(code, str)} <= codes


@pytest.mark.parametrize(
    "reason", ["deadline_exceeded", "request_poisoned", "not_a_number", "unavailable", "nothing_to_sample"]
)
def test_every_bad_end_of_a_request_is_an_exception_that_names_it(reason: str) -> None:
    from llmscale.choice import failure

    assert reason not in GOOD_ENDS
    error = failure(reason)
    assert error.http_status >= 400
    assert str(error), "the message says what happened"
    assert error.code == reason


def test_the_requests_own_filters_are_at_fault_where_they_leave_nothing_to_sample() -> None:
    from llmscale.choice import failure

    assert isinstance(failure("nothing_to_sample"), errors.RequestError)
