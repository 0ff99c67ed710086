"""transformers over the ring, by a model's own tensor-parallel plan.

torchrun --nproc-per-node 2 examples/torch/generate.py [MODEL] [PROMPT]

MODEL is a folder or a hub id; without one a tiny random Llama is made.
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def tiny_model() -> str:
    """The folder of a random model, the same for all ranks."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
        )
        LlamaForCausalLM(config).save_pretrained(folder[0])
    dist.barrier()
    return str(folder[0])


def main() -> None:
    dist.init_process_group("ring")
    folder = sys.argv[1] if len(sys.argv) > 1 else tiny_model()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    if len(sys.argv) > 1:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer(sys.argv[2] if len(sys.argv) > 2 else "Once", return_tensors="pt").input_ids
    else:
        prompt = torch.arange(3, 9)[None]
    found = model.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)[0]
    if len(sys.argv) > 1 and dist.get_rank() == 0:
        print(tokenizer.decode(found), flush=True)
    else:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        alone = whole.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)[0]
        print(f"rank {dist.get_rank()}: {found.tolist()}; as on one process: {torch.equal(found, alone)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
