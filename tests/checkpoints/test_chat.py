"""Chat templates: the same prompts as transformers renders, and no harm from a hostile one."""

from __future__ import annotations

import itertools
from typing import Any

import jinja2
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from tightfit.checkpoints import chat
from tightfit.checkpoints.chat import ChatTemplate
from tightfit.errors import CheckpointError, UsageError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls[0].function | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "chatml": """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{% endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
  {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
  {% endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
""",
    "qwen3": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "loop controls and generation blocks": """{% set seen = "outside" %}
{% for message in messages %}
  {% if message.role == "tool" %}{% continue %}{% endif %}
  {% if loop.index > 3 %}{% break %}{% endif %}
  {% if message.role == "assistant" %}
    {% generation %}{% set seen = "inside" %}{{ message.content }}{{ eos_token }}{{ seen }}{% endgeneration %}
  {% else %}
{{ loop.index0 }}: {{ message.content | tojson(ensure_ascii=True, sort_keys=true) }}
  {% endif %}
{% endfor %}
{{ seen }} {{ documents is defined }} {{ unk_token is defined }} {{ missing }} {{ pad_token }}""",
}

USER = {"role": "user", "content": "  Où est <b>東京</b>? \"quotes\" & 'more' "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nLà-bas. 🙂\n"}
CALL = {
    "role": "assistant",
    "content": None,  # as clients of OpenAI's interface send it
    "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"city": "Zürich", "n": [1, 2.5, None]}}}
    ],
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief.\n"}, USER],
    "turns": [USER, ASSISTANT, USER, ASSISTANT, USER],
    "tools": [USER, CALL, {"role": "tool", "content": "12 °C"}, ASSISTANT],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "Le temps qu'il fait <b>", "parameters": {}}}


def transformers_renders(source: str, messages: list[dict[str, Any]], prompt: bool, tools: list[Any] | None) -> str:
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **SPECIAL)
    rendered = theirs.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=prompt, tools=tools
    )
    assert isinstance(rendered, str)
    return rendered


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, SPECIAL, "org/model")


@pytest.mark.parametrize(("name", "conversation"), list(itertools.product(TEMPLATES, CHATS)))
def test_prompts_are_those_of_transformers(name: str, conversation: str) -> None:
    for prompt, tools in itertools.product((True, False), (None, [TOOL])):
        try:
            expected = transformers_renders(TEMPLATES[name], CHATS[conversation], prompt, tools)
        except jinja2.UndefinedError:  # a call of a tool has no content, which chatml does not expect
            with pytest.raises(CheckpointError, match="has no attribute 'content'"):
                template(TEMPLATES[name]).render(CHATS[conversation], prompt, tools)
        except jinja2.TemplateError:  # the template's own refusal
            with pytest.raises(UsageError, match="must alternate"):
                template(TEMPLATES[name]).render(CHATS[conversation], prompt, tools)
        else:
            assert template(TEMPLATES[name]).render(CHATS[conversation], prompt, tools) == expected


def test_content_in_parts_reaches_the_template() -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ]
    expected = transformers_renders(TEMPLATES["gemma"], parts, True, None)
    assert template(TEMPLATES["gemma"]).render(parts) == expected
    assert "ab" in expected


def test_a_refusal_of_the_template_names_its_reason_and_is_the_users_to_mend() -> None:
    with pytest.raises(UsageError, match="org/model refuses these messages: roles must alternate user"):
        template(TEMPLATES["mistral"]).render([USER, USER])


def test_the_template_for_tools_is_preferred_where_tools_are_given() -> None:
    both = ChatTemplate({"default": "plain", "tool_use": "tools"}, {}, "org/model")
    assert both.render([USER]) == "plain"
    assert both.render([USER], tools=[TOOL]) == "tools"
    assert ChatTemplate({"default": "plain"}, {}, "org/model").render([USER], tools=[TOOL]) == "plain"
    with pytest.raises(CheckpointError, match="no default chat template, only: rag"):
        ChatTemplate({"rag": "x"}, {}, "org/model").render([USER])


def test_the_messages_of_the_caller_are_not_changed() -> None:
    messages = [dict(USER), dict(CALL)]
    template("{{ messages[0].content }}{% for m in messages %}{{ m.tool_calls is defined }}{% endfor %}").render(
        messages
    )
    assert messages == [USER, CALL]


@pytest.mark.parametrize("messages", [[], ["hello"], "hello", [{"role": "user", "content": {1, 2}}], [object()]])
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(UsageError):
        template("x").render(messages)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ('{0.__class__.__mro__}' | string).format_map({'0': 1}) }}",
        "{{ dict.__base__ }}{{ dict.mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_tricks_are_stopped_by_the_sandbox(attack: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template of org/model failed"):
        template(attack).render([USER])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_private_attributes_look_empty(attack: str) -> None:
    assert template("before" + attack + "after").render([USER]) == "beforeafter"


@pytest.mark.parametrize(
    "broken",
    ["{% if %}", "{% for x in messages %}", "{{ 'open }}", "{% unknown %}", "{{ x | nofilter }}", "{% break %}"],
)
def test_a_template_that_does_not_parse_is_refused(broken: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template of org/model cannot be read"):
        template(broken).render([USER])


@pytest.mark.parametrize("failing", ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ nothing.at.all }}"])
def test_a_template_that_fails_is_refused(failing: str) -> None:
    with pytest.raises(CheckpointError, match=r"the chat template of org/model failed: [A-Z][A-Za-z]+Error"):
        template(failing).render([USER])


def test_endless_output_and_recursion_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_PROMPT_CHARACTERS", 10_000)
    nested = "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match="wrote more than 10000 characters"):
        template(nested).render([USER])
    assert len(template("{% for a in range(1000) %}xxxxxxxx{% endfor %}").render([USER])) == 8000
    with pytest.raises(CheckpointError, match="RecursionError"):
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").render([USER])
    with pytest.raises(CheckpointError, match="OverflowError"):
        template("{{ range(999999999) }}").render([USER])
