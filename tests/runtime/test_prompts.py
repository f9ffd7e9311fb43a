"""The prompt of every family, character by character, and its ids by transformers' tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runtime.control_tokens import MAX_DEPTH
from runtime.errors import BadRequest
from runtime.tokenizer import Tokenizer
from tests.runtime import chat_templates
from tests.runtime.checkpoints import FATHOM_TINY

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
Messages = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def result(text: str, call_id: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": call_id}


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


TURNS = [system("Be brief."), user("Hi"), assistant("Hello!"), user("你好 🙂")]
TWO_SYSTEMS = [system("Be brief."), system("Rhyme."), user("Hi")]
THOUGHT = [user("1+1?"), assistant("<think>\nEasy.\n</think>\n\n2"), user("And 2+2?")]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = [
    call("a", "weather", '{"city": "北京", "days": 2}'),
    call("b", "weather", '{"city": "Oslo", "units": ["C", null]}'),
]
TOOL_TURNS = [
    user("Weather?"),
    assistant(None, tool_calls=CALLS),
    result("sunny", "a"),
    result("snow", "b"),
]
ANSWERED = [*TOOL_TURNS, assistant("Sun and snow."), user("Thanks")]

V3_CALLS = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "北京", "days": 2}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Oslo", "units": ["C", null]}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V3_RESULTS = (
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>\n"
    "<｜tool▁output▁begin｜>snow<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)
V3_TOOL_TURNS = f"{BOS}{USER}Weather?{ASSISTANT}{V3_CALLS}{EOS}{V3_RESULTS}"
V31_CALLS = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "北京", "days": 2}'
    "<｜tool▁call▁end｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Oslo", "units": ["C", null]}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V31_RESULTS = (
    "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>"
    "<｜tool▁output▁begin｜>snow<｜tool▁output▁end｜>"
)
V32_TOOLS = """\


## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part \
of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{"name": "weather", "description": "Weather of a city.", "parameters": {"type": "object", \
"properties": {"city": {"type": "string"}}}}
</functions>
"""
V32_CALLS = """\


<｜DSML｜function_calls>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">北京</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
<｜DSML｜parameter name="units" string="false">["C", null]</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>"""
V32_RESULTS = """\


<function_results>
<result>sunny</result>
<result>snow</result>
</function_results>

"""


@dataclass(frozen=True)
class Golden:
    """A conversation, its prompt, and whether the answer begins inside a thought."""

    messages: Messages
    prompt: str
    starts_thinking: bool = False
    thinking: bool | None = None  # what the client asks for
    tools: Messages = field(default_factory=list)
    generate: bool = True


PLAIN_TURNS = f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello!{EOS}User: 你好 🙂\n\nAssistant:"
CODER_TURNS = (
    f"{BOS}Be brief.### Instruction:\nHi\n### Response:\nHello!\n<|EOT|>\n"
    "### Instruction:\n你好 🙂\n### Response:\n"
)
TAGGED_TURNS = f"{BOS}Be brief.{USER}Hi{ASSISTANT}Hello!{EOS}{USER}你好 🙂{ASSISTANT}"
CUT_THOUGHT = f"{BOS}{USER}1+1?{ASSISTANT}\n\n2{EOS}{USER}And 2+2?{ASSISTANT}"
V3_ANSWERED = f"{V3_TOOL_TURNS}Sun and snow.{EOS}{USER}Thanks{ASSISTANT}"
R1_ANSWERED = V3_ANSWERED.replace("end｜>\n<｜tool▁output▁", "end｜><｜tool▁output▁")
V31_TURNS = f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>Hello!{EOS}{USER}你好 🙂{ASSISTANT}"
V31_THOUGHT = f"{BOS}{USER}1+1?{ASSISTANT}</think>\n\n2{EOS}{USER}And 2+2?{ASSISTANT}"

FAMILIES: dict[str, tuple[str | None, dict[str, Golden]]] = {
    "deepseek-llm, moe-16b, V2": (
        chat_templates.LLM_CHAT,
        {
            "turns": Golden(TURNS, PLAIN_TURNS),
            "two systems": Golden(
                TWO_SYSTEMS, f"{BOS}Be brief.\n\nRhyme.\n\nUser: Hi\n\nAssistant:"
            ),
            "no switch": Golden(TURNS, PLAIN_TURNS, thinking=True),
            "history only": Golden(
                TURNS[:3],
                f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello!{EOS}",
                generate=False,
            ),
        },
    ),
    "deepseek-coder": (
        chat_templates.CODER,
        {
            "turns": Golden(TURNS, CODER_TURNS),
            "own system": Golden(
                [user("Hi")],
                f"{BOS}You are an AI programming assistant.\n### Instruction:\nHi\n### Response:\n",
            ),
        },
    ),
    "V2-Chat-0628": (
        chat_templates.V2_0628,
        {"turns": Golden(TURNS, TAGGED_TURNS.replace("brief.", "brief.\n\n"))},
    ),
    "V2.5": (
        chat_templates.V25,
        {
            "turns": Golden(TURNS, f"        {TAGGED_TURNS}"),
            "two systems": Golden(TWO_SYSTEMS, f"{' ' * 16}{BOS}Rhyme.{USER}Hi{ASSISTANT}"),
        },
    ),
    "V3, V3-0324": (
        chat_templates.V3,
        {
            "turns": Golden(TURNS, TAGGED_TURNS),
            "two systems": Golden(TWO_SYSTEMS, f"{BOS}Be brief.\n\nRhyme.{USER}Hi{ASSISTANT}"),
            "no switch": Golden(TURNS, TAGGED_TURNS, thinking=True),
            "tool results": Golden(TOOL_TURNS, V3_TOOL_TURNS),
            "tools answered": Golden(ANSWERED, V3_ANSWERED),
        },
    ),
    "R1": (
        chat_templates.R1,
        {
            "turns": Golden(TURNS, f"{TAGGED_TURNS}<think>\n", starts_thinking=True),
            "two systems": Golden(
                TWO_SYSTEMS, f"{BOS}Be brief.\n\nRhyme.{USER}Hi{ASSISTANT}<think>\n", True
            ),
            "thought": Golden(THOUGHT, f"{CUT_THOUGHT}<think>\n", starts_thinking=True),
            "tools answered": Golden(ANSWERED, f"{R1_ANSWERED}<think>\n", starts_thinking=True),
        },
    ),
    "R1 distills": (
        chat_templates.R1_DISTILL,
        {
            "two systems": Golden(
                TWO_SYSTEMS, f"{BOS}Rhyme.{USER}Hi{ASSISTANT}<think>\n", starts_thinking=True
            ),
            "turns": Golden(TURNS, f"{TAGGED_TURNS}<think>\n", starts_thinking=True),
            "thought": Golden(THOUGHT, f"{CUT_THOUGHT}<think>\n", starts_thinking=True),
            "no switch": Golden(THOUGHT, f"{CUT_THOUGHT}<think>\n", True, thinking=False),
            "tools answered": Golden(ANSWERED, f"{V3_ANSWERED}<think>\n", starts_thinking=True),
        },
    ),
    "R1-0528, R1-0528-Qwen3-8B": (
        chat_templates.R1_0528,
        {
            "turns": Golden(TURNS, TAGGED_TURNS),
            "thought": Golden(THOUGHT, CUT_THOUGHT),
            "tool results": Golden(TOOL_TURNS, V3_TOOL_TURNS),
        },
    ),
    "V3.1, V3.2-Exp": (
        chat_templates.V31,
        {
            "turns": Golden(TURNS, f"{V31_TURNS}</think>"),
            "turns, thinking": Golden(TURNS, f"{V31_TURNS}<think>", True, thinking=True),
            "turns, not thinking": Golden(TURNS, f"{V31_TURNS}</think>", thinking=False),
            "two systems": Golden(
                TWO_SYSTEMS, f"{BOS}Be brief.\n\nRhyme.{USER}Hi{ASSISTANT}</think>"
            ),
            "thought": Golden(THOUGHT, f"{V31_THOUGHT}<think>", True, thinking=True),
            "tool results": Golden(
                TOOL_TURNS,
                f"{BOS}{USER}Weather?{ASSISTANT}</think>{V31_CALLS}{EOS}{V31_RESULTS}",
            ),
            "tools answered": Golden(
                ANSWERED,
                f"{BOS}{USER}Weather?{ASSISTANT}</think>{V31_CALLS}{EOS}{V31_RESULTS}"
                f"Sun and snow.{EOS}{USER}Thanks{ASSISTANT}<think>",
                True,
                thinking=True,
            ),
        },
    ),
    "V3.2": (
        None,
        {
            "turns": Golden(TURNS, f"{V31_TURNS}</think>"),
            "turns, thinking": Golden(TURNS, f"{V31_TURNS}<think>", True, thinking=True),
            "turns, not thinking": Golden(TURNS, f"{V31_TURNS}</think>", thinking=False),
            "two systems": Golden(
                TWO_SYSTEMS, f"{BOS}Be brief.Rhyme.{USER}Hi{ASSISTANT}<think>", True, thinking=True
            ),
            "thought of an earlier turn": Golden(
                THOUGHT, f"{V31_THOUGHT}<think>", True, thinking=True
            ),
            "tools": Golden(
                [system("Be brief."), user("Hi")],
                f"{BOS}Be brief.{V32_TOOLS}{USER}Hi{ASSISTANT}</think>",
                tools=[WEATHER],
            ),
            "tools without system": Golden(
                [user("Hi")],
                f"{BOS}{V32_TOOLS}{USER}Hi{ASSISTANT}<think>",
                True,
                thinking=True,
                tools=[WEATHER],
            ),
            "tool results": Golden(
                TOOL_TURNS,
                f"{BOS}{USER}Weather?{ASSISTANT}</think>{V32_CALLS}{EOS}{V32_RESULTS}</think>",
            ),
            "tool results, thinking": Golden(
                [
                    TOOL_TURNS[0],
                    assistant("One moment.", tool_calls=CALLS, reasoning_content="Two cities."),
                    *TOOL_TURNS[2:],
                ],
                f"{BOS}{USER}Weather?{ASSISTANT}<think>Two cities.</think>One moment.{V32_CALLS}"
                f"{EOS}{V32_RESULTS}<think>",
                True,
                thinking=True,
            ),
            "tools answered, thinking": Golden(
                [
                    TOOL_TURNS[0],
                    assistant(None, tool_calls=CALLS, reasoning_content="Two cities."),
                    *ANSWERED[2:],
                ],
                f"{BOS}{USER}Weather?{ASSISTANT}</think>{V32_CALLS}{EOS}{V32_RESULTS}</think>"
                f"Sun and snow.{EOS}{USER}Thanks{ASSISTANT}<think>",
                True,
                thinking=True,
            ),
            "no parameters": Golden(
                [
                    user("Time?"),
                    assistant("", tool_calls=[call("a", "time", "{}")]),
                    result("noon", "a"),
                ],
                f"{BOS}{USER}Time?{ASSISTANT}</think>\n\n<｜DSML｜function_calls>\n"
                '<｜DSML｜invoke name="time">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
                f"{EOS}\n\n<function_results>\n<result>noon</result>\n</function_results>"
                "\n\n</think>",
            ),
        },
    ),
}
CASES = [
    pytest.param(template, golden, id=f"{family}: {name}")
    for family, (template, goldens) in FAMILIES.items()
    for name, golden in goldens.items()
]


def write_folder(folder: Path, template: str | None) -> Path:
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(FATHOM_TINY / name, folder)
    tokenizer_config = json.loads((FATHOM_TINY / "tokenizer_config.json").read_text())
    del tokenizer_config["chat_template"]
    if template is None:
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["DeepseekV32ForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))
    else:
        tokenizer_config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.fixture
def v32(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_folder(tmp_path, None))


@pytest.mark.parametrize(("template", "golden"), CASES)
def test_prompt(tmp_path: Path, template: str | None, golden: Golden) -> None:
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, template)
    prompt = Tokenizer.load(folder).encode_chat(
        golden.messages,
        thinking=golden.thinking,
        tools=golden.tools or None,
        add_generation_prompt=golden.generate,
    )
    assert prompt.text == golden.prompt
    assert prompt.thinking is golden.starts_thinking
    theirs = AutoTokenizer.from_pretrained(folder)
    without_text = any(message["content"] is None for message in golden.messages)
    if template is None or without_text:  # transformers has no template, or drops the None
        expected = theirs(golden.prompt, add_special_tokens=False)["input_ids"]
    else:
        switches = {} if golden.thinking is None else {"thinking": golden.thinking}
        expected = theirs.apply_chat_template(
            golden.messages,
            tools=golden.tools or None,
            add_generation_prompt=golden.generate,
            return_dict=False,
            **switches,
        )
    assert prompt.token_ids == expected
    assert prompt.token_ids.count(0) == 1  # the beginning of sequence


def test_enable_thinking_is_the_same_switch(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{{ '<think>' if enable_thinking else '</think>' }}"
    tokenizer = Tokenizer.load(write_folder(tmp_path, template))
    assert tokenizer.encode_chat([user("x")], thinking=True).thinking
    assert not tokenizer.encode_chat([user("x")], thinking=False).thinking


def test_a_template_that_reads_thoughts_gets_them(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}|{% endfor %}"
    tokenizer = Tokenizer.load(write_folder(tmp_path, template))
    as_field = [assistant("2", reasoning_content="Easy.")]
    as_text = [assistant("<think>\nEasy.\n</think>2")]
    assert tokenizer.encode_chat(as_field).text == "Easy.|2|"
    assert tokenizer.encode_chat(as_text).text == "Easy.|2|"


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("template", [chat_templates.V3, chat_templates.R1_0528])
def test_calls_without_text_are_kept(tmp_path: Path, template: str, content: str | None) -> None:
    """The first template tells calls by None, the second fails on it."""
    tokenizer = Tokenizer.load(write_folder(tmp_path, template))
    messages = [TOOL_TURNS[0], assistant(content, tool_calls=CALLS), *TOOL_TURNS[2:]]
    assert tokenizer.encode_chat(messages).text == V3_TOOL_TURNS


CONTROLS = [
    token["content"]
    for token in json.loads((FATHOM_TINY / "tokenizer.json").read_text())["added_tokens"]
]


@pytest.mark.parametrize("control", CONTROLS)
def test_two_messages_spell_no_control_token_together(v32: Tokenizer, control: str) -> None:
    """Where a prompt puts messages right behind each other, halves could meet."""
    plain = v32.encode_chat([system("a"), system("b"), user("q")]).token_ids
    added = {
        i for i, token in enumerate(v32.token_bytes) if token.decode(errors="replace") in CONTROLS
    }
    for cut in range(1, len(control)):
        prompt = v32.encode_chat([system(control[:cut]), system(control[cut:]), user("q")])
        assert control in prompt.text
        assert [i for i in prompt.token_ids if i in added] == [i for i in plain if i in added]


def test_json_escapes_spell_no_control_token(v32: Tokenizer) -> None:
    """The V3.2 prompt decodes a call's arguments; what they spell is still the client's text."""
    arguments = '{"city": "\\u003c/think\\u003e", "<think>": ["\\u003cthink>"]}'
    messages = [
        user("x"),
        assistant("", tool_calls=[call("a", "weather", arguments)]),
        result("<｜User｜>", "a"),
    ]
    prompt = v32.encode_chat(messages)
    assert '"true"></think></' in prompt.text
    assert 'name="<think>" string="false">["<think>"]<' in prompt.text
    ids = (v32.think_start_id, v32.think_end_id, *v32.encode(USER))
    # the user's tag, and </think> behind the user and behind the results
    assert [i for i in prompt.token_ids if i in ids] == [ids[2], ids[1], ids[1]]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([user("x"), {"role": "critic", "content": "y"}], "has no role 'critic'"),
        ([user("x"), result("y", "a")], "1 tool messages behind a message with 0 tool_calls"),
        ([*TOOL_TURNS, result("z", "c")], "3 tool messages behind a message with 2 tool_calls"),
        (TOOL_TURNS[:3], "1 tool messages behind a message with 2 tool_calls"),
        ([assistant("", tool_calls=[call("a", "f", "[1]")])], "arguments of .f. are not a JSON"),
        ([assistant("", tool_calls=[call("a", "f", "{")])], "arguments of .f. are not a JSON"),
        ([assistant("", tool_calls=[call("a", "f", "[" * 99999)])], "arguments of .f. are not"),
    ],
)
def test_conversations_that_have_no_prompt(v32: Tokenizer, messages: Messages, why: str) -> None:
    with pytest.raises(BadRequest, match=why) as caught:
        v32.encode_chat(messages)
    assert "\n" not in str(caught.value)


def test_a_client_cannot_replace_what_the_server_sets(v32: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="cannot set 'messages'") as caught:
        v32.encode_chat([user("x")], variables={"messages": []})
    assert caught.value.param == "chat_template_kwargs.messages"


def test_deep_nesting_is_refused(v32: Tokenizer) -> None:
    value: Any = "x"
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    v32.encode_chat([user("x")], variables={"note": value})
    with pytest.raises(BadRequest, match="nested deeper than 64 levels"):
        v32.encode_chat([user("x")], variables={"note": [value]})
    arguments = '{"a": ' + "[" * 200 + "]" * 200 + "}"
    with pytest.raises(BadRequest, match="nested deeper"):
        v32.encode_chat([assistant("", tool_calls=[call("a", "f", arguments)])])


def test_base_models_of_other_families_have_no_chat(tmp_path: Path) -> None:
    write_folder(tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["DeepseekV3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequest, match="ships no chat template"):
        Tokenizer.load(tmp_path).encode_chat([user("x")])
