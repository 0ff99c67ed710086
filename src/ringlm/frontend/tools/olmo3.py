"""OLMo 3: Python's calls, one a line, in <function_calls>."""

from ringlm.frontend.tools.tool_code import lines

FORMAT = lines("<function_calls>", "</function_calls>")
