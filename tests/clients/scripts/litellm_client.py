"""litellm: plain, streamed, tools, errors, by its openai/ and hosted_vllm/ providers."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices

import litellm

base, key = sys.argv[1:3]
said = {}
messages = [{"role": "user", "content": "hello"}]
for provider in ("openai", "hosted_vllm"):
    asked = {"model": f"{provider}/deepseek-r1", "api_base": base, "api_key": key}
    asked |= {"messages": messages, "temperature": 0, "num_retries": 0}
    answer = litellm.completion(**asked)
    message = answer.choices[0].message
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=messages)
    streamed = whole.choices[0].message
    errors = []
    for changes in (
        {"api_key": "sk-wrong"},
        {"model": f"{provider}/no-such-model"},
        {"temperature": 3},
    ):
        try:
            litellm.completion(**{**asked, **changes})
        except Exception as error:
            errors.append([type(error).__name__, getattr(error, "status_code", None)])
    said[provider] = {
        "plain": [message.content, message.get("reasoning_content")],
        "streamed": [streamed.content, streamed.get("reasoning_content")],
        "finish_reasons": [answer.choices[0].finish_reason, whole.choices[0].finish_reason],
        "usage": [answer.usage.total_tokens, whole.usage.total_tokens],
        "errors": errors,
    }
print(json.dumps(said))
