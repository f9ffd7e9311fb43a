"""Chat templates of the released families, written anew to their formats.

The releases' own templates cannot be had where the tests run. Each of these does what its family's
does, with the means it uses: namespaces, loop filters, ``raise_exception``, ``tojson``, string
methods, whitespace control.
"""

from __future__ import annotations

# deepseek-llm, -math, moe-16b, V2, V2-Lite, Coder-V2: plain words for the roles
LLM_CHAT = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# deepseek-coder-instruct: a system text of its own, sections, <|EOT|>
CODER = (
    "{% set ns = namespace(found=false) %}"
    "{%- for message in messages -%}{%- if message['role'] == 'system' -%}"
    "{%- set ns.found = true -%}{%- endif -%}{%- endfor -%}"
    "{{ bos_token }}{%- if not ns.found -%}"
    "{{ 'You are an AI programming assistant.\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}\n{{ message['content'] }}"
    "{%- else %}{%- if message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n' }}{%- else %}"
    "{{ '### Response:\\n' + message['content'] + '\\n<|EOT|>\\n' }}"
    "{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '### Response:\\n' }}{%- endif %}"
)

# V2-Chat-0628: roles are tags
V2_0628 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

# V3: system texts in front; tool calls as fenced JSON. The words in capitals differ by family: how
# system texts are gathered, calls told, answers cut, results parted, and the next answer opened
_V3 = """\
{%- if not add_generation_prompt is defined -%}
  {%- set add_generation_prompt = false -%}
{%- endif -%}
{%- set ns = namespace(after_output=false, system='', first=true) -%}
{%- for message in messages -%}{%- if message['role'] == 'system' -%}
  {%- set ns.system = GATHER -%}
  {%- set ns.first = false -%}
{%- endif -%}{%- endfor -%}
{{- bos_token -}}{{- ns.system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set ns.after_output = false -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' and CALLS -%}
    {{- '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' -}}
    {%- for tool in message['tool_calls'] -%}
      {{- '' if loop.first else '\\n' -}}
      {{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] -}}
      {{- '\\n```json\\n' + tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
    {%- endfor -%}
    {{- '<｜tool▁calls▁end｜>' + eos_token -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = message['content'] -%}
    CUT
    {%- if ns.after_output -%}
      {{- '<｜tool▁outputs▁end｜>' + content + eos_token -}}
      {%- set ns.after_output = false -%}
    {%- else -%}
      {{- '<｜Assistant｜>' + content + eos_token -}}
    {%- endif -%}
  {%- elif message['role'] == 'tool' -%}
    {{- 'BETWEEN' if ns.after_output else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
    {%- set ns.after_output = true -%}
  {%- else -%}{%- if message['role'] != 'system' -%}
    {{- raise_exception('no role ' + message['role']) -}}
  {%- endif -%}{%- endif -%}
{%- endfor -%}
{{- '<｜tool▁outputs▁end｜>' if ns.after_output else '' -}}
{%- if add_generation_prompt and not ns.after_output -%}{{- 'OPENS' -}}{%- endif -%}
"""
_CUT_THOUGHT = """\
{%- if '</think>' in content -%}
      {%- set content = content.split('</think>')[-1] -%}
    {%- endif -%}"""
_HAS_CALLS, _HAS_NO_TEXT = "message['tool_calls'] is defined", "message['content'] is none"
_JOINED = "ns.system + ('' if ns.first else '\\n\\n') + message['content']"


def _v3(
    *,
    gather: str = _JOINED,
    calls: str = _HAS_CALLS,
    cut: str = _CUT_THOUGHT,
    between: str = "\\n",
    thought: str = "",
) -> str:
    template = _V3.replace("GATHER", gather).replace("CALLS", calls).replace("CUT", cut)
    return template.replace("BETWEEN", between).replace("OPENS", f"<｜Assistant｜>{thought}")


V3 = _v3(calls=_HAS_NO_TEXT, cut="")
# V2.5 writes its indent in front, once for each system text, and keeps the last of them
V25 = (
    "{%- for message in messages if message['role'] == 'system' -%}{{ '        ' }}{%- endfor -%}"
    + _v3(gather="message['content']", calls=_HAS_NO_TEXT, cut="")
)
R1 = _v3(between="", thought="<think>\\n")
R1_DISTILL = _v3(gather="message['content']", calls=_HAS_NO_TEXT, thought="<think>\\n")
# R1-0528 looks for </think> in the text beside calls too, and fails where it is None
R1_0528 = _v3().replace("(message['content'] or '')", "message['content'].split('</think>')[-1]")

# V3.1: one switch for thoughts; calls without a fence; tools are not shown
V31 = """\
{%- if not thinking is defined -%}{%- set thinking = false -%}{%- endif -%}
{%- set ns = namespace(system='', after_user=false, after_output=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set ns.system = ns.system + ('' if loop.first else '\\n\\n') + message['content'] -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set ns.after_user = true -%}{%- set ns.after_output = false -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- if ns.after_user -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}
    {%- set ns.after_user = false -%}{%- set ns.after_output = false -%}
    {%- set content = message['content'] or '' -%}
    {{- content.split('</think>', 1)[1] if '</think>' in content else content -}}
    {%- if message['tool_calls'] is defined and message['tool_calls'] is not none -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for tool in message['tool_calls'] -%}
        {{- '<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' -}}
        {{- tool['function']['arguments'] + '<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- elif message['role'] == 'tool' -%}
    {%- set ns.after_user = false -%}{%- set ns.after_output = true -%}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.after_user and not ns.after_output -%}
  {{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}
{%- endif -%}
"""
