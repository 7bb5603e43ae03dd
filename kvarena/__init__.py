"""kvarena: a benchmark harness for KV-cache memory allocation in LLM serving."""

__version__ = "0.1.0"
