"""Fathom's runtime: weights, cache, scheduler and decode loop. This is its public face."""

from runtime.admission import check_params, check_token_ids
from runtime.config import GenerationDefaults
from runtime.engine import Completion, Engine
from runtime.engine_config import EngineConfig, EngineInfo
from runtime.errors import (
    BadRequest,
    CheckpointError,
    ConfigError,
    ContextLengthExceeded,
    EngineDead,
    FathomError,
    ModelNotFound,
    Quarantined,
    QueueFull,
    QueueTimeout,
    RequestError,
)
from runtime.generation import Generation
from runtime.grammar import Grammar, check_grammar
from runtime.inspect_model import (
    Gpu,
    ModelReport,
    context_left,
    describe_model,
    find_gpus,
    imagine_gpu,
)
from runtime.memory import give_back_memory, return_large_blocks
from runtime.process import EngineClient
from runtime.request import (
    INT64_MAX,
    INT64_MIN,
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from runtime.supervision import EngineStatus, SupervisorPolicy
from runtime.text import Detokenizer, TextAssembler, TextPiece
from runtime.tokenizer import ChatPrompt, Tokenizer
from runtime.tool_calls import ToolCallParser, ToolDelta
from runtime.tool_grammar import calls_grammar
from runtime.tool_prompts import ToolFormat, ToolStyle, with_object_arguments
from runtime.weights import Checkpoint, find_checkpoint, inspect_checkpoint, pull

__all__ = [
    "INT64_MAX",
    "INT64_MIN",
    "MAX_LOGIT_BIAS",
    "MAX_STOP_CHARS",
    "MAX_STOP_STRINGS",
    "MAX_TOP_LOGPROBS",
    "BadRequest",
    "ChatPrompt",
    "Checkpoint",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ContextLengthExceeded",
    "Detokenizer",
    "Engine",
    "EngineClient",
    "EngineConfig",
    "EngineDead",
    "EngineInfo",
    "EngineStatus",
    "FathomError",
    "FinishReason",
    "Generation",
    "GenerationDefaults",
    "Gpu",
    "Grammar",
    "ModelNotFound",
    "ModelReport",
    "Quarantined",
    "QueueFull",
    "QueueTimeout",
    "RequestError",
    "SamplingParams",
    "SupervisorPolicy",
    "TextAssembler",
    "TextPiece",
    "TokenEvent",
    "TokenLogprobs",
    "Tokenizer",
    "ToolCallParser",
    "ToolDelta",
    "ToolFormat",
    "ToolStyle",
    "calls_grammar",
    "check_grammar",
    "check_params",
    "check_token_ids",
    "context_left",
    "describe_model",
    "find_checkpoint",
    "find_gpus",
    "give_back_memory",
    "imagine_gpu",
    "inspect_checkpoint",
    "pull",
    "return_large_blocks",
    "with_object_arguments",
]
