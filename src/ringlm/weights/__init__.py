"""Model files, mapped and read by slice: Hugging Face folders of safetensors, and GGUF. Importing is torch-free."""

from ringlm.weights.files import ModelFiles, open_model
from ringlm.weights.gguf_header import GGUFHeader
from ringlm.weights.source import WeightSource

__all__ = ["GGUFHeader", "ModelFiles", "WeightSource", "open_model"]
