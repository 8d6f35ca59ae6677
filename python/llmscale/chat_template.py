"""Renders a model's chat template within hard limits.

The template comes from the model's folder and counts as hostile: it runs in a sandbox without access to Python and pays
for its work out of a budget of steps and time, so `{% for i in range(10**9) %}` ends at once, on every machine and
every thread. The cost of a rendering is that of the template plus 0.1 us per charge. Knows nothing of tokens or of
HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError

from llmscale.errors import InvalidTokenizer, PromptTemplateError
from llmscale.template_budget import DEFAULT_LIMITS, Budget, TemplateLimits, current_budget
from llmscale.template_sandbox import SandboxedTemplates

# What a template's own mistakes look like in Python. Anything else is a defect of ours and must surface.
_TEMPLATE_MISTAKES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


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
        token = current_budget.set(Budget(limits))
        try:
            self._template = SandboxedTemplates().from_string(source)
        except (TemplateError, PromptTemplateError, SyntaxError, MemoryError, *_TEMPLATE_MISTAKES) as error:
            raise InvalidTokenizer(f"the chat template does not compile: {error}") from error
        finally:
            current_budget.reset(token)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt as text. Raises `PromptTemplateError` when the template refuses or breaks a limit."""
        token = current_budget.set(Budget(self._limits))
        try:
            text = self._template.render(variables)
        except TemplateError as error:
            raise PromptTemplateError(
                f"the chat template refused the messages: {error.message}", field="messages"
            ) from error
        except _TEMPLATE_MISTAKES as error:
            raise PromptTemplateError(
                f"the chat template failed on these messages ({type(error).__name__})", field="messages"
            ) from error
        finally:
            current_budget.reset(token)
        size = len(text.encode(errors="surrogatepass"))
        if size > self._limits.max_output_bytes:
            raise PromptTemplateError(
                f"the rendered prompt has {size} bytes, the limit is {self._limits.max_output_bytes};"
                " shorten the messages",
                field="messages",
            )
        return text
