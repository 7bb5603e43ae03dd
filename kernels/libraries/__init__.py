"""Attention out of libraries for GPUs: FlashAttention, FlashInfer, vLLM."""
