"""langchain-openai: invoke, stream with usage, structured output, tools."""

import json
import sys
from typing import Literal

import openai
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

base, key = sys.argv[1:3]
model = ChatOpenAI(
    base_url=base,
    api_key=key,
    model="deepseek-r1",
    temperature=0,
    max_tokens=400,
    max_retries=0,
    timeout=60,
    stream_usage=True,  # off by default for any other base URL than OpenAI's
)
messages = [SystemMessage("Be short."), HumanMessage([{"type": "text", "text": "hello"}])]
answer = model.invoke(messages)
said = {"plain": answer.content, "usage": answer.usage_metadata}
said["metadata"] = {
    name: answer.response_metadata.get(name) for name in ("finish_reason", "model_name", "id")
}
whole = None
num_usages = 0
for part in model.stream(messages):
    num_usages += part.usage_metadata is not None
    whole = part if whole is None else whole + part
said |= {"streamed": whole.content, "streamed_usage": whole.usage_metadata}
said["num_usages"] = num_usages


class Sum(BaseModel):
    """A sum of two numbers."""

    model_config = ConfigDict(extra="forbid")  # else a toy writes properties without end
    first: Literal[7, 8, 9]
    second: Literal[5, 6]


for method in ("json_schema", "function_calling"):
    runnable = model.with_structured_output(Sum, method=method)
    said[method] = runnable.invoke("What is 7 + 5?").model_dump()


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"20 degrees in {city}"


bound = model.bind_tools([weather], tool_choice="required")
called = bound.invoke("Weather in Paris?")
said["calls"] = [[call["name"], call["args"]] for call in called.tool_calls]
said["invalid_calls"] = called.invalid_tool_calls
if called.tool_calls:
    result = ToolMessage("20 degrees", tool_call_id=called.tool_calls[0]["id"])
    history = [HumanMessage("Weather in Paris?"), called, result]
    said["after"] = model.bind_tools([weather]).invoke(history).content
try:
    ChatOpenAI(base_url=base, api_key="sk-wrong", model="deepseek-r1").invoke("hello")
except openai.AuthenticationError as error:
    said["wrong_key"] = error.code
print(json.dumps(said))
