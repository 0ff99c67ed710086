"""LFM2: Python's calls between words of their own."""

from ringlm.frontend.tools.pythonic import between

FORMAT = between("<|tool_call_start|>", "<|tool_call_end|>")
