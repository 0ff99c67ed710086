"""FunctionGemma: <start_function_call>call:f{a:<escape>text<escape>}<end_function_call> for each call."""

from ringlm.frontend.tools.gemma import Gemma

FORMAT = Gemma("<start_function_call>", "<escape>", "<end_function_call>").format()
