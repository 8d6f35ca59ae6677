"""Chat templates render as in transformers, and hostile ones end at once."""

# ruff: noqa: E501 - templates are data
from __future__ import annotations

import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llmscale.chat_template import ChatTemplate
from llmscale.errors import InvalidTokenizer, PromptTemplateError
from llmscale.final_message import FinalMessage
from llmscale.template_budget import TemplateLimits

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. <b>&amp;</b>"},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "<think>\nsum\n</think>\n\n4"},
    {"role": "user", "content": 'Say "é" and 😀'},
]

# The constructs of the templates that are in use: ChatML, Llama 2 and 3, Mistral, Gemma, Phi, Qwen 3, DeepSeek.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>' +"
    " message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = '26 Jul 2024' %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{%- for message in messages %}\n"
    "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}\n"
    "    {%- elif 'tool_calls' in message %}\n        {{- message.tool_calls | tojson(indent=4) }}\n    {%- endif %}\n{%- endfor %}",
    "gemma": "{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' ~ role ~ '\n' ~ message['content'] | trim ~ '\n' }}"
    "{%- if loop.last %}{{ loop.length }}/{{ loop.revindex }}{% endif %}{% endfor %}",
    "qwen3": "{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not"
    " (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}"
    "{%- set ns.multi_step_tool = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- set reasoning = '' %}{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- elif '</think>' in content %}{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{{ loop.index0 > ns.last }}"
    "{{- reasoning.strip('\\n') + '|' + content }}{%- else %}{{- message.role + ':' + message.content }}{%- endif %}"
    "{%- endfor %}{%- if enable_thinking is defined and enable_thinking is false %}no thinking{%- endif %}",
    "macros": "{% macro render(m, depth=1) -%}{{ m.role | upper }}{{ '#' * depth }}{{ m.content | replace('2', 'two') }}"
    "{%- endmacro %}{% for m in messages if m.role != 'system' %}{{ render(m, depth=loop.index) }}"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{% generation %}done{% endgeneration %}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' / ') }}"
    "{{ messages | length }}{{ messages[0] | tojson }}{{ [3,1,2] | sort | list }}{{ {'b': 1, 'a': none} | dictsort }}"
    "{{ none is none }}{{ 1.5 }}{{ missing | default('none') }}{{ missing }}{{ (messages | last).role | title }}"
    "{{ '%s-%d' % ('x', 3) }}{{ 'a{}b'.format(7) }}{{ 2 ** 5 }}{{ 7 // 2 }}{{ [1] + [2] }}{{ 'x' in 'xyz' }}"
    "{% filter upper %}tail{% endfilter %}{% set block %}set {{ 1 }}{% endset %}{{ block }}{{ messages[0].items() | list }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
def test_a_template_renders_the_text_that_transformers_renders(name: str, generation: bool) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    messages = CONVERSATION[1:] if name == "llama2" else CONVERSATION
    expected, _ = render_jinja_template(
        [messages], chat_template=TEMPLATES[name], add_generation_prompt=generation, **variables
    )
    given = {**variables, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation}
    assert ChatTemplate(TEMPLATES[name]).render(given) == expected[0]


OPEN_TEXTS = ("4", "", " ", "It is", "  It is \n", "2 + 2", "<think>\nsum\n</think>\n\nIt is", "<think>sum</think>It")


@pytest.mark.parametrize("text", OPEN_TEXTS)
@pytest.mark.parametrize("role", ["assistant", "user"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_last_message_is_left_open_where_transformers_leaves_it_open(name: str, role: str, text: str) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    before = CONVERSATION[1:2] if name == "llama2" else CONVERSATION
    messages = [*(before if role == "assistant" else before[:-1]), {"role": role, "content": text}]
    given = {**variables, "tools": None, "documents": None, "add_generation_prompt": False}
    final = FinalMessage(messages)
    rendered = ChatTemplate(TEMPLATES[name]).render({**given, "messages": final.messages})
    try:
        expected, _ = render_jinja_template(
            [messages],
            chat_template=TEMPLATES[name],
            add_generation_prompt=False,
            continue_final_message=True,
            **variables,
        )
    except ValueError:
        with pytest.raises(PromptTemplateError, match="leaves out or changes"):
            final.cut(rendered)
    else:
        assert final.cut(rendered) == expected[0]


def test_what_the_template_says_with_raise_exception_reaches_the_user() -> None:
    template = ChatTemplate(TEMPLATES["llama2"])
    with pytest.raises(PromptTemplateError, match="roles must alternate"):
        template.render({"messages": [CONVERSATION[1], CONVERSATION[1]], "bos_token": "", "eos_token": ""})


# Ways out of the sandbox and ways to a name that a template should not have. None may print an object of the process.
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "{{ '%s' % namespace }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ dict.__mro__ }}{{ dict.fromkeys }}",
    "{{ range.__self__ }}",
    "{{ range }}",
    "{{ 'x'.upper }}",
    "{{ [1] | map('upper') }}",
    "{% for x in messages %}{{ loop.__class__ }}{{ loop }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}{{ messages[0].setdefault('x', 1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{{ caller() }}{{ get_flashed_messages.__globals__ }}{{ config }}{{ request }}",
    "{{ (1).__class__.__base__ }}{{ none.__class__ }}{{ true.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}{{ m._func }}{{ m }}",
    "{{ messages | tojson(default=raise_exception) }}",
)


@pytest.mark.parametrize("source", ESCAPES, ids=range(len(ESCAPES)))
def test_a_template_cannot_reach_or_print_an_object_of_the_process(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = ChatTemplate(source).render({"messages": messages})
    except (InvalidTokenizer, PromptTemplateError):
        text = ""
    assert not any(word in text for word in ("0x", "<class", "<function", "object at", "module", "root:", "uid="))
    assert messages == [{"role": "user", "content": "hi"}]


# Ways to spend time or memory without bound.
BOMBS = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(20000) %}{% for j in range(20000) %}x{% endfor %}{% endfor %}",
    "{% for i in range(20000) %}{% for j in range(20000) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(20000) %}{% for j in range(20000) %}{% continue %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**1000 }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x='a,') %}{% for i in range(99) %}{% set ns.x = ns.x.replace(',', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='a,') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
    "{% endfor %}{{ ns.x == ns.y }}",
    "{% set ns = namespace(x=(1,), y=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ messages[0][ns.x] }}",
    "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ messages[0].get(ns.x) }}",
    "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
    "{% endfor %}{{ [ns.x, ns.y] | sort }}{{ ns.x is eq(ns.y) }}{{ [ns.x].index(ns.y) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=999999999) }}",
    "{{ 'a'.center(10**9) }}{{ 'a'.ljust(10**9) }}{{ 'a'.zfill(10**9) }}{{ '\t'.expandtabs(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | indent(10**9) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ 1.5 | round(10**9) }}",
    "{{ ('a' * 8000000) | map('upper') | list | length }}",
    "{{ ('a' * 8000000) | join | length }}",
    "{% for i in range(20000) %}{{ range(20000) | list | sort | join }}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(900) }}",
    "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for x in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% call(x) f() %}{% endcall %}{% macro f() %}{% for i in range(20000) %}{% for j in range(20000) %}{{ caller(1) }}"
    "{% endfor %}{% endfor %}{% endmacro %}",
    "{% set x = 'a' * 8000000 %}" + "{% if x[1:] == x[:1] %}{% endif %}" * 400,
    "{{ strftime_now('%c' * 100000) }}",
    "{{ lipsum(n=10**6) }}",
)


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_a_template_that_wants_too_much_ends_within_its_limits(source: str) -> None:
    started = time.thread_time()
    with pytest.raises((InvalidTokenizer, PromptTemplateError)):
        ChatTemplate(source).render({"messages": [{"role": "user", "content": "hi"}]})
    # The limit of 100 ms of CPU, the compilation, and the operation that was running when it was reached.
    assert time.thread_time() - started < 1.0


def test_the_limit_of_steps_is_the_same_on_every_machine() -> None:
    source = "{% for i in range(20000) %}{% for j in range(20000) %}x{% endfor %}{% endfor %}"
    patient = TemplateLimits(max_render_us=60_000_000, max_steps=50_000)
    with pytest.raises(PromptTemplateError, match="took more than 50000 steps"):
        ChatTemplate(source, limits=patient).render({})


def test_the_limit_of_time_counts_the_cpu_time_of_the_rendering() -> None:
    source = "{% for i in range(20000) %}{% for j in range(20000) %}x{% endfor %}{% endfor %}"
    hasty = TemplateLimits(max_render_us=1_000, max_steps=10**12)
    with pytest.raises(PromptTemplateError, match="ran for more than 1 ms"):
        ChatTemplate(source, limits=hasty).render({})


def test_constants_are_folded_within_the_limits_too() -> None:
    started = time.thread_time()
    with pytest.raises((InvalidTokenizer, PromptTemplateError)):
        ChatTemplate("{{ '" + "a" * 500_000 + "' | replace('a', '" + "b" * 500_000 + "') }}").render({})
    assert time.thread_time() - started < 1.0


def test_a_conversation_of_two_thousand_messages_renders_within_the_limits() -> None:
    messages = [{"role": "user", "content": "x" * 200}] * 2_048
    text = ChatTemplate(TEMPLATES["qwen3"]).render({"messages": messages})
    assert text.count("user:") == 2_048


def test_a_template_that_is_too_large_or_malformed_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(InvalidTokenizer, match="the limit is 1048576"):
        ChatTemplate("x" * (1 << 20) + "x")
    with pytest.raises(InvalidTokenizer, match="does not compile"):
        ChatTemplate("{% for %}")
