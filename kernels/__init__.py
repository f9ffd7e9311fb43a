"""Fathom's kernels: work on tensors, each op one function with a Triton and a torch body."""

from kernels.activation import silu_and_mul
from kernels.attention import paged_attention
from kernels.batch import PagedBatch
from kernels.cache import rope_and_write_kv, rope_and_write_latent
from kernels.embedding import embedding
from kernels.linear import heads_linear, linear, linear_silu_and_mul
from kernels.mla import mla_attention
from kernels.moe import moe_experts, route_noaux_tc
from kernels.norm import add_rms_norm, rms_norm
from kernels.sampling import Sampled, SamplingBatch, count_tokens, sample

__all__ = [
    "PagedBatch",
    "Sampled",
    "SamplingBatch",
    "add_rms_norm",
    "count_tokens",
    "embedding",
    "heads_linear",
    "linear",
    "linear_silu_and_mul",
    "mla_attention",
    "moe_experts",
    "paged_attention",
    "rms_norm",
    "rope_and_write_kv",
    "rope_and_write_latent",
    "route_noaux_tc",
    "sample",
    "silu_and_mul",
]
