"""Request traces: what arrives, as pairs of prompt and output lengths."""

from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.load import load_trace
from kvarena.harness.trace.trace import Histogram, Trace, length_histogram

__all__ = ["Histogram", "Trace", "TraceConfig", "length_histogram", "load_trace"]
