"""The jinja2 environment that chat templates run in.

jinja2's immutable sandbox keeps templates away from Python; this adds what it lacks: an allow-list of filters and
methods, checks on every operation that can make a large value out of small ones, and charges for loops, calls,
comparisons and prints. Each check is O(1), or linear in the value it bounds. Syntax and extras are those of
transformers, so templates render the same text. Knows nothing of messages or of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError

from llmscale.errors import TemplateLimitReached
from llmscale.template_budget import (
    comparable,
    current_budget,
    measure,
    reserve,
    sliceable,
    spend,
    walk,
)

_MAX_INTEGER_BITS: Final = 1_024
_MAX_EXPONENT: Final = 64
_MAX_FORMAT_CHARACTERS: Final = 1_024
_MAX_TIME_FORMAT_CHARACTERS: Final = 64
_MAX_INDENT: Final = 64

# What chat templates on model hubs use, and nothing whose cost is not bounded by what it is given.
# fmt: off
_FILTERS: Final = frozenset((
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "sum",
    "title", "trim", "truncate", "unique", "upper",
))
_WALKING_FILTERS: Final = frozenset((
    "dictsort", "last", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "sort", "sum",
    "unique",
))
_METHODS: Final = frozenset((
    "capitalize", "casefold", "copy", "count", "endswith", "find", "get", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "isupper", "items", "keys", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values",
))
# fmt: on
# A width of four digits or more, a width taken from an argument, or a field nested in a field.
_LONG_WIDTH: Final = re.compile(r"\d{4}|\*|\{[^}]*\{")


def _printed(value: object) -> object:
    """Called for every value that the template prints."""
    current_budget.get().reserve(measure(value))
    return value


def _concatenate(first: object, *others: object) -> str:
    texts = [str(_printed(value)) for value in (first, *others)]
    current_budget.get().reserve(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: object, old: str, new: str, count: int | None = None) -> str:
    source = str(_printed(text))
    most = -1 if count is None else count
    found = source.count(old) if most < 0 else min(most, source.count(old))
    current_budget.get().reserve(len(source) + found * len(new))
    return source.replace(old, new, most)


def _join(values: Iterable[object], separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise SecurityError("join by attribute is not available in chat templates; use map(attribute=...) before it")
    walk(values)
    texts = [str(_printed(value)) for value in values]
    current_budget.get().reserve(sum(map(len, texts)) + len(texts) * len(separator))
    return str(separator).join(texts)


def _string(value: object) -> str:
    return str(_printed(value))


def _unchanged(value: object) -> object:
    # Nothing is escaped in prompts, so marking a text as safe means nothing.
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 - as above
) -> str:
    # jinja2's own filter escapes HTML characters, which prompts must not have; same signature as transformers.
    if isinstance(indent, str) or (indent is not None and not 0 <= indent <= _MAX_INDENT):
        raise TemplateLimitReached(f"the chat template indents by {indent!r}, the limit is {_MAX_INDENT}")
    current_budget.get().reserve(measure(value) * (1 + (indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(_printed(message)))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _MAX_TIME_FORMAT_CHARACTERS:
        raise TemplateLimitReached(
            f"the chat template formats the date with {len(pattern)} characters,"
            f" the limit is {_MAX_TIME_FORMAT_CHARACTERS}"
        )
    return datetime.now().astimezone().strftime(pattern)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function and not the class, so that a template cannot reach the class's attributes.
    return dict(*map(comparable, args), **kwargs)


def _make_range(*bounds: int) -> range:
    numbers = range(*bounds)
    current_budget.get().reserve_items(len(numbers))
    return numbers


class _Namespace(jinja2.utils.Namespace):
    """Like jinja2's, but without names that begin with an underscore, which reach into the interpreter."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}; names must not begin with an underscore")
        super().__setitem__(name, value)


def _make_namespace(*args: Any, **kwargs: Any) -> _Namespace:
    if any(str(name).startswith("_") for name in _make_dict(*args, **kwargs)):
        raise SecurityError("names in a namespace must not begin with an underscore")
    return _Namespace(*args, **kwargs)


def _check_format(text: str, values: object) -> None:
    if len(text) > _MAX_FORMAT_CHARACTERS or _LONG_WIDTH.search(text):
        raise SecurityError("a format of more than 1,024 characters or with a width above 999 is not available")
    current_budget.get().reserve(len(text) * 1_000 + measure(values))


def _check_bits(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise SecurityError(f"a number of {bits} bits is not available, the limit is {_MAX_INTEGER_BITS}")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    value, times = (left, right) if isinstance(right, int) else (right, left)
    if isinstance(times, int):
        if isinstance(value, str):
            current_budget.get().reserve(len(value) * max(times, 0))
        elif isinstance(value, list | tuple):
            current_budget.get().reserve_items(len(value) * max(times, 0))


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; when rendering a prompt its body is printed as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


_GLOBALS: Final[dict[str, Callable[..., Any]]] = {
    "range": _make_range,
    "dict": _make_dict,
    "namespace": _make_namespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
DEFINED_NAMES: Final = frozenset((*_GLOBALS, "loop", "self", "super", "caller", "varargs", "kwargs"))
"""What templates call or read besides their variables."""


class SandboxedTemplates(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with allow-lists, checked operators and a budget. Compile and render with `current_budget` set."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=_printed,
            cache_size=0,
        )
        filters = {name: _charged(name, function) for name, function in self.filters.items() if name in _FILTERS}
        filters.update(replace=_replace, join=_join, string=_string, safe=_unchanged, tojson=_tojson)
        filters.update(_spend=spend, _concatenate=_concatenate, _comparable=comparable, _sliceable=sliceable)
        self.filters.clear()
        self.filters.update(filters)
        checked: dict[str, Any] = dict(self.tests)
        self.tests.update({name: _charged_test(function) for name, function in checked.items()})
        self.globals.clear()
        self.globals.update(_GLOBALS)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _instrument(super()._parse(source, name, filename))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscription; a nested tuple as a key is hashed."""
        if isinstance(argument, tuple):
            measure(argument)
        return super().getitem(obj, argument)

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes through here."""
        spend(1)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):
            # What jinja2's compiler adds inside loops and blocks, for functions that ask for the context.
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return self._call_method(owner, function, args, kwargs)
        return super().call(context, function, *args, **kwargs)

    @staticmethod
    def _call_method(owner: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function.__name__
        if isinstance(owner, str):
            if name == "replace":
                return _replace(owner, *args, **kwargs)
            if name == "join":
                return _join(args[0] if args else (), owner)
        if name not in _METHODS:
            raise SecurityError(f"the method {name!r} is not available in chat templates")
        reserve(owner)
        for argument in args:
            comparable(argument)
        return function(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """jinja2 gives templates its own, sandboxed `str.format`; this bounds the widths in it."""
        sandboxed = super().wrap_str_format(value)
        if sandboxed is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [*args, *kwargs.values()])
            return sandboxed(*args, **kwargs)

        return bounded

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make a large value out of small ones."""
        if operator == "+":
            if type(left) is str and type(right) is str:
                current_budget.get().reserve(len(left) + len(right))
                return left + right
            reserve(left)
            reserve(right)
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**":
            if not isinstance(left, int | float) or not isinstance(right, int | float) or abs(right) > _MAX_EXPONENT:
                raise SecurityError(f"an exponent above {_MAX_EXPONENT} is not available in chat templates")
            _check_bits(int(left).bit_length() * int(abs(right)))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return super().call_binop(context, operator, left, right)


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for the size of what it gets and makes; jinja2's marks on the function are kept."""
    position = 1 if hasattr(function, "jinja_pass_arg") else 0
    walks = name in _WALKING_FILTERS
    compares = name in {"sort", "unique", "min", "max", "dictsort"}

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        value = args[position]
        if walks:
            walk(value)
        elif isinstance(value, str):
            reserve(value)
        if compares:
            comparable(value)
        result = function(*args, **kwargs)
        reserve(result)
        return result

    return charged


def _charged_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            comparable(value)
        return function(*args, **kwargs)

    return charged


def _weight(body: Sequence[nodes.Node]) -> int:
    """Nodes in a body and its text in units of 64 characters: what one execution costs, inner loops counted once."""
    weight = 1
    for statement in body:
        for node in [statement, *statement.find_all(nodes.Node)]:
            weight += 1
            if isinstance(node, nodes.TemplateData):
                weight += len(node.data) >> 6
    return weight


def _filter(name: str, value: nodes.Expr, arguments: list[nodes.Expr], line: int) -> nodes.Filter:
    return nodes.Filter(value, name, arguments, [], None, None, lineno=line)


def _instrument(tree: nodes.Template) -> nodes.Template:
    """Makes loops and macros pay per execution, concatenations per size and comparisons per nested value."""
    executed: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
        *tree.find_all(nodes.For),
        *tree.find_all(nodes.Macro),
        *tree.find_all(nodes.CallBlock),
    ]
    for block in executed:
        line = block.lineno
        charge = _filter("_spend", nodes.Const(_weight(block.body), lineno=line), [], line)
        block.body = [nodes.ExprStmt(charge, lineno=line), *block.body]
        if isinstance(block, nodes.For) and block.test is not None:
            # Items that the test rejects never reach the body.
            charge = _filter("_spend", nodes.Const(_weight([block.test]), lineno=line), [], line)
            block.test = nodes.And(charge, block.test, lineno=line)
    for concat in list(tree.find_all(nodes.Concat)):
        first, *others = concat.nodes
        concat.nodes = [_filter("_concatenate", first, others, concat.lineno)]
    for compare in list(tree.find_all(nodes.Compare)):
        compare.expr = _checked(compare.expr)
        for operand in compare.ops:
            operand.expr = _checked(operand.expr)
    for subscript in list(tree.find_all(nodes.Getitem)):
        if isinstance(subscript.arg, nodes.Slice):
            # Slices are compiled to Python's own and do not pass the environment.
            subscript.node = _filter("_sliceable", subscript.node, [], subscript.lineno)
    for pair in list(tree.find_all(nodes.Pair)):
        pair.key = _checked(pair.key)
    return tree


def _checked(expression: nodes.Expr) -> nodes.Expr:
    if isinstance(expression, nodes.Const):
        return expression
    return _filter("_comparable", expression, [], expression.lineno)
