"""Decoder-only transformers for small language models, in plain PyTorch."""

from matilda_model.cache import KVCache
from matilda_model.check import KernelCheck, KernelMismatchError, self_check
from matilda_model.config import ModelConfig
from matilda_model.export import export_transformers
from matilda_model.flops import count_matmul_params, count_params, flops_per_token
from matilda_model.generate import generate, sample, stream_tokens
from matilda_model.loss import LossOutput, linear_cross_entropy
from matilda_model.model import Block, Transformer
from matilda_model.pretrained import load_pretrained, save_pretrained

__all__ = [
    "Block",
    "KVCache",
    "KernelCheck",
    "KernelMismatchError",
    "LossOutput",
    "ModelConfig",
    "Transformer",
    "count_matmul_params",
    "count_params",
    "export_transformers",
    "flops_per_token",
    "generate",
    "linear_cross_entropy",
    "load_pretrained",
    "sample",
    "save_pretrained",
    "self_check",
    "stream_tokens",
]
