"""Renders a model's chat template in a sandbox with hard limits.

The template comes from the model's folder and counts as hostile: it runs in jinja2's immutable sandbox with an
allow-list of filters and methods, and it pays for its work out of a budget. Every loop iteration, macro call, filter,
method call and printed value is charged in steps (O(1) each), so `{% for i in range(10**9) %}` ends after a bounded
number of steps on every machine, and the clock is checked at every charge as a second bound. It knows nothing of tokens
or of HTTP.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from llmscale.errors import InvalidTokenizer, PromptTemplateError

_MAX_INTEGER_BITS: Final = 1_024
_MAX_FORMAT_CHARACTERS: Final = 1_024
_MAX_TIME_FORMAT_CHARACTERS: Final = 64
_MAX_INDENT: Final = 64
_SMALL_SIZE: Final = 4_096

# What chat templates on model hubs use, and nothing that can make a large value out of a small one without being
# checked.
# fmt: off
_FILTERS: Final = frozenset((
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "safe", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim", "truncate",
    "unique", "upper",
))
# fmt: on
# fmt: off
_METHODS: Final = frozenset((
    "capitalize", "casefold", "copy", "count", "endswith", "find", "format", "get", "index", "isalnum",
    "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "isupper", "items", "join",
    "keys", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "upper", "values",
))
# fmt: on
_LONG_WIDTH: Final = re.compile(r"\d{4}|\*|\{[^}]*\{")


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Bounds of one template and of one rendering. A step is one visited node, loop iteration, call or 64
    characters."""

    max_template_bytes: int = 1 << 20
    max_output_bytes: int = 8 << 20
    max_steps: int = 1_000_000
    max_render_us: int = 100_000


DEFAULT_LIMITS: Final = TemplateLimits()


class _LimitReached(PromptTemplateError):
    """Rendering broke a limit. Not a jinja2 error, so no template construct can catch or rewrap it."""


class _Budget:
    """What one rendering, or the compilation, may still spend."""

    __slots__ = ("_deadline_ns", "_limits", "_started_cpu_ns", "_steps")

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._steps = limits.max_steps
        self._started_cpu_ns = time.thread_time_ns()
        self._deadline_ns = time.perf_counter_ns() + limits.max_render_us * 1_000

    def spend(self, steps: int) -> None:
        """Pays for steps and looks at the clock."""
        self._steps -= steps
        if self._steps < 0:
            raise _LimitReached(
                f"the chat template took more than {self._limits.max_steps} steps;"
                " shorten the messages or fix the template"
            )
        # The wall clock costs 40 ns and the thread's CPU clock 300 ns, so the second one is asked only after the first
        # has run out: a thread that merely waited for a core is not at fault.
        now_ns = time.perf_counter_ns()
        if now_ns > self._deadline_ns:
            left_ns = self._limits.max_render_us * 1_000 - (time.thread_time_ns() - self._started_cpu_ns)
            if left_ns <= 0:
                raise _LimitReached(
                    f"the chat template ran for more than {self._limits.max_render_us // 1_000} ms;"
                    " shorten the messages or fix the template"
                )
            self._deadline_ns = now_ns + left_ns

    def reserve(self, size: int) -> None:
        """Pays for a text or list of this size before it is made."""
        if size < _SMALL_SIZE:
            # The loop or macro around it looks at the clock.
            self._steps -= 1 + (size >> 6)
            return
        if size > self._limits.max_output_bytes:
            raise _LimitReached(
                f"the chat template makes a value of {size} characters, the limit is {self._limits.max_output_bytes};"
                " shorten the messages or fix the template"
            )
        self.spend(1 + (size >> 6))


# Rendering is synchronous and runs on one thread, so the budget belongs to the thread's context.
_budget: ContextVar[_Budget] = ContextVar("llmscale_template_budget")


def _spend(steps: int) -> bool:
    _budget.get().spend(steps)
    return True


def _reserve(size: int) -> None:
    _budget.get().reserve(size)


def _size(value: object) -> int:
    """Characters or items of a value; numbers are bounded elsewhere and count as one."""
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _printed(value: object) -> object:
    """Called for every value that the template prints."""
    if type(value) is str:
        _reserve(len(value))
    else:
        _reserve(_deep_size(value))
    return value


def _deep_size(value: object, depth: int = 0) -> int:
    if depth > 64:
        raise _LimitReached("the chat template prints a value that is nested deeper than 64; fix the template")
    if isinstance(value, dict):
        total = sum(_deep_size(key, depth + 1) + _deep_size(item, depth + 1) for key, item in value.items())
    elif isinstance(value, list | tuple):
        total = sum(_deep_size(item, depth + 1) for item in value)
    elif value is None or isinstance(value, str | int | float | jinja2.Undefined):
        return len(value) if isinstance(value, str) else 8
    else:
        # Printing a function or a generator would put an address of this process into the prompt.
        raise SecurityError(f"a value of type {type(value).__name__} cannot be printed in a chat template")
    _reserve(total)
    return total


def _concatenate(first: object, *others: object) -> str:
    texts = [str(_printed(value)) for value in (first, *others)]
    _reserve(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: object, old: str, new: str, count: int | None = None) -> str:
    source = str(text)
    found = source.count(old) if count is None or count < 0 else min(count, source.count(old))
    _reserve(len(source) + found * len(new))
    return source.replace(old, new, -1 if count is None else count)


def _string(value: object) -> str:
    return str(_printed(value))


def _join(values: Iterable[object], separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise _LimitReached(
            "the chat template joins by attribute, which is not supported; use map(attribute=...) first"
        )
    texts = [str(_printed(value)) for value in values]
    _reserve(sum(map(len, texts)) + len(texts) * len(separator))
    return str(separator).join(texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    # jinja2's own filter escapes HTML characters, which prompts must not have; same signature as transformers.
    if isinstance(indent, str) or (indent is not None and not 0 <= indent <= _MAX_INDENT):
        raise _LimitReached(f"the chat template indents by {indent!r}, the limit is {_MAX_INDENT}; fix the template")
    _reserve(_deep_size(value) * (1 + (indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _MAX_TIME_FORMAT_CHARACTERS:
        raise _LimitReached(
            f"the chat template formats the date with {len(pattern)} characters,"
            f" the limit is {_MAX_TIME_FORMAT_CHARACTERS}"
        )
    return datetime.now().astimezone().strftime(pattern)


def _check_format(text: str, values: object) -> None:
    if len(text) > _MAX_FORMAT_CHARACTERS or _LONG_WIDTH.search(text):
        raise SecurityError("a format of more than 1,024 characters or with a width above 999 is not available")
    _reserve(len(text) * 1_000 + _deep_size(values))


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function and not the class, so that a template cannot reach the class's attributes.
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Like jinja2's, but without names that begin with an underscore, which reach into the interpreter."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}; names must not begin with an underscore")
        super().__setitem__(name, value)


def _make_namespace(*args: Any, **kwargs: Any) -> _Namespace:
    if any(str(name).startswith("_") for name in dict(*args, **kwargs)):
        raise SecurityError("names in a namespace must not begin with an underscore")
    return _Namespace(*args, **kwargs)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; when rendering a prompt its body is printed as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _charge_node(weight: int, line: int) -> nodes.Filter:
    return nodes.Filter(nodes.Const(weight, lineno=line), "_spend", [], [], None, None, lineno=line)


def _weight(body: Sequence[nodes.Node]) -> int:
    """Nodes in a body and its text in units of 64 characters: what one execution costs, inner loops counted once."""
    weight = 1
    for statement in body:
        for node in [statement, *statement.find_all(nodes.Node)]:
            weight += 1
            if isinstance(node, nodes.TemplateData):
                weight += len(node.data) >> 6
    return weight


def _instrument(tree: nodes.Template) -> nodes.Template:
    """Makes loops and macros pay per execution, and concatenations per size."""
    executed: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
        *tree.find_all(nodes.For),
        *tree.find_all(nodes.Macro),
        *tree.find_all(nodes.CallBlock),
    ]
    for block in executed:
        weight = _weight(block.body)
        block.body = [nodes.ExprStmt(_charge_node(weight, block.lineno), lineno=block.lineno), *block.body]
        if isinstance(block, nodes.For) and block.test is not None:
            # Items that the test rejects never reach the body.
            test_weight = _weight([block.test])
            block.test = nodes.And(_charge_node(test_weight, block.lineno), block.test, lineno=block.lineno)
    for concat in list(tree.find_all(nodes.Concat)):
        first, *others = concat.nodes
        concat.nodes = [nodes.Filter(first, "_concatenate", others, [], None, None, lineno=concat.lineno)]
    return tree


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with allow-lists, checked operators and a budget."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=_printed,
            cache_size=0,
        )
        kept = {name: _charged(function) for name, function in self.filters.items() if name in _FILTERS}
        self.filters.clear()
        self.filters.update(kept)
        self.filters.update(
            replace=_replace, join=_join, string=_string, tojson=_tojson, _spend=_spend, _concatenate=_concatenate
        )
        self.globals.clear()
        self.globals.update(
            range=self._range,
            dict=_make_dict,
            namespace=_make_namespace,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
        )

    @staticmethod
    def _range(*bounds: int) -> range:
        numbers = range(*bounds)
        _reserve(len(numbers))
        return numbers

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _instrument(super()._parse(source, name, filename))

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes through here."""
        _spend(1)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            return self._call_text_method(owner, function, args, kwargs)
        if isinstance(owner, list | tuple | dict):
            self._check_method(function.__name__)
            _reserve(len(owner))
        return super().call(context, function, *args, **kwargs)

    @staticmethod
    def _check_method(name: str) -> None:
        if name not in _METHODS:
            raise SecurityError(f"the method {name!r} is not available in chat templates")

    def _call_text_method(self, text: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = function.__name__
        if name == "replace":
            return _replace(text, *args, **kwargs)
        if name == "join":
            return _join(args[0], text)
        self._check_method(name)
        _reserve(len(text))
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
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            if not isinstance(left, int | float) or not isinstance(right, int | float) or abs(right) > 64:
                raise SecurityError("an exponent above 64 is not available in chat templates")
            self._check_bits(int(left).bit_length() * int(abs(right)))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "+":
            _reserve(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def _check_bits(bits: int) -> None:
        if bits > _MAX_INTEGER_BITS:
            raise SecurityError(
                f"a number of {bits} bits is not available in chat templates, the limit is {_MAX_INTEGER_BITS}"
            )

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, str | list | tuple) and isinstance(right, int):
            _reserve(len(left) * max(right, 0))
        elif isinstance(right, str | list | tuple) and isinstance(left, int):
            _reserve(len(right) * max(left, 0))


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for the size of what it gets and makes; jinja2's marks on the function are kept."""
    has_context = hasattr(function, "jinja_pass_arg")

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        value = args[1] if has_context else args[0]
        _reserve(_size(value))
        result = function(*args, **kwargs)
        _spend(1 + (_size(result) >> 6))
        return result

    return charged


class ChatTemplate:
    """One compiled template. Thread-safe after construction.

    Raises `InvalidTokenizer` when the template is too large or does not compile.
    """

    def __init__(self, source: str, *, limits: TemplateLimits = DEFAULT_LIMITS) -> None:
        size = len(source.encode())
        if size > limits.max_template_bytes:
            raise InvalidTokenizer(
                f"the chat template has {size} bytes, the limit is {limits.max_template_bytes}; shorten it"
            )
        self.source = source
        self._limits = limits
        # jinja2 folds constant filters while it compiles, which must not be a way around the budget.
        token = _budget.set(_Budget(limits))
        try:
            self._template = _Environment().from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise InvalidTokenizer(f"the chat template does not compile: {error}") from error
        finally:
            _budget.reset(token)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt as text. Raises `PromptTemplateError` when the template refuses or breaks a limit."""
        token = _budget.set(_Budget(self._limits))
        try:
            text = self._template.render(variables)
        except PromptTemplateError:
            raise
        except TemplateError as error:
            raise PromptTemplateError(
                f"the chat template refused the messages: {error.message}", field="messages"
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            # What a template's own mistakes look like in Python; anything else is a defect of ours and must surface.
            raise PromptTemplateError(
                f"the chat template failed on these messages ({type(error).__name__})", field="messages"
            ) from error
        finally:
            _budget.reset(token)
        size = len(text.encode(errors="surrogatepass"))
        if size > self._limits.max_output_bytes:
            raise PromptTemplateError(
                f"the rendered prompt has {size} bytes, the limit is {self._limits.max_output_bytes};"
                " shorten the messages",
                field="messages",
            )
        return text
