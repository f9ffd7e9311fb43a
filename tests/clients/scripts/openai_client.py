"""The newest openai package: plain, async, stream helpers, structured answers, tools."""

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

base, key = sys.argv[1:3]
client = openai.OpenAI(base_url=base, api_key=key, max_retries=0)
HELLO = {"model": "deepseek-r1", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}
said = {"version": openai.__version__, "models": [model.id for model in client.models.list()]}


def message_of(completion):
    choice = completion.choices[0]
    message = choice.message
    return [message.content, message.to_dict().get("reasoning_content"), choice.finish_reason]


said["plain"] = message_of(client.chat.completions.create(**HELLO))
with client.chat.completions.stream(**HELLO) as stream:
    kinds = {event.type for event in stream}
    said["streamed"] = message_of(stream.get_final_completion())
    said["kinds"] = sorted(kinds)


async def several():
    async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as client:
        plain, stream = await asyncio.gather(
            client.chat.completions.create(**HELLO),
            client.chat.completions.create(**HELLO, stream=True),
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return [plain.choices[0].message.content, text]


said["async"] = asyncio.run(several())


class Sum(BaseModel):
    """Bounded, since a toy that may write any number writes a very long one."""

    first: Literal[7, 8, 9]
    second: Literal[5, 6]
    exact: bool


completion = client.chat.completions.parse(**HELLO, response_format=Sum, max_tokens=400)
said["parsed"] = completion.choices[0].message.parsed.model_dump()
with client.chat.completions.stream(**HELLO, response_format=Sum, max_tokens=400) as stream:
    for _ in stream:
        pass
    final = stream.get_final_completion()
said["parsed_stream"] = final.choices[0].message.parsed.model_dump()


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


tool = openai.pydantic_function_tool(Weather)
asked = {**HELLO, "tools": [tool], "tool_choice": "required", "max_tokens": 400}
asked["messages"] = [{"role": "user", "content": "Weather in Paris?"}]
completion = client.chat.completions.parse(**asked)
choice = completion.choices[0]
said["tools"] = {"finish_reason": choice.finish_reason, "content": choice.message.content}
calls = choice.message.tool_calls or []
said["tools"]["calls"] = [
    [call.id, call.function.name, call.function.parsed_arguments.model_dump()] for call in calls
]
with client.chat.completions.stream(**asked) as stream:
    for _ in stream:
        pass
    streamed = stream.get_final_completion().choices[0].message.tool_calls or []
said["tools"]["streamed"] = [
    [call.function.name, call.function.parsed_arguments.model_dump()] for call in streamed
]
if calls:
    history = [*asked["messages"], choice.message.to_dict()]
    history += [{"role": "tool", "tool_call_id": calls[0].id, "content": "20 degrees"}]
    answer = client.chat.completions.create(**{**HELLO, "messages": history, "tools": [tool]})
    said["tools"]["after"] = answer.choices[0].message.content
print(json.dumps(said))
