"""Measures llama.cpp through llama-cpp-python's bindings of its C interface; see harness.py for what is printed.

    PYTHON benchmarks/peers/run_llamacpp.py FILE.gguf [--prompt 512] ... [--flash-attention 0|1] [--kv f16|q8_0|q4_0]

The most likely token of each step is the next step's input, so reading the logits is part of the time.
"""

from __future__ import annotations

import argparse
import time

import llama_cpp
import numpy as np
from harness import Prompts, Runtime, describe, measure, parse

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
AT_ONCE = 2048  # tokens in a call


def bytes_per_token(path: str) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if tensor.name != "token_embd.weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flash-attention", type=int, default=0, choices=(0, 1))
    parser.add_argument("--kv", default="f16", choices=list(KV_TYPES))
    arguments = parse(parser)
    if arguments.describe:
        describe(bytes_per_token(arguments.model), "llama-cpp-python")
        return
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(arguments.model.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = arguments.batch * (max(arguments.prompt, arguments.warm) + arguments.new + 32)
    settings.n_batch, settings.n_ubatch, settings.n_seq_max = AT_ONCE, 512, arguments.batch
    settings.n_threads = settings.n_threads_batch = arguments.threads
    settings.flash_attn_type = arguments.flash_attention
    settings.kv_unified = True
    settings.type_k = settings.type_v = KV_TYPES[arguments.kv]
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context, "llama.cpp made no context"
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(AT_ONCE, 0, 1)

    def step(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Computes (token, position, sequence, whether its logits are wanted); gives the tokens that follow."""
        batch.n_tokens = len(tokens)
        for row, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = [row for row, (*_, wanted) in enumerate(tokens) if wanted]
        logits = (llama_cpp.llama_get_logits_ith(context, row) for row in rows)
        return [int(np.argmax(np.ctypeslib.as_array(pointer, (vocab,)))) for pointer in logits]

    def generate(prompts: Prompts, new: int) -> float:
        began = time.perf_counter()
        llama_cpp.llama_memory_clear(memory, False)
        following: list[int] = []
        for sequence, prompt in enumerate(prompts):
            rows = [(token, place, sequence, place == len(prompt) - 1) for place, token in enumerate(prompt)]
            for start in range(0, len(rows), AT_ONCE):
                following += step(rows[start : start + AT_ONCE])
        first = time.perf_counter() - began
        for place in range(len(prompts[0]), len(prompts[0]) + new - 1):
            following = step([(token, place, sequence, True) for sequence, token in enumerate(following)])
        return first

    measure(Runtime(generate, vocab), arguments)


if __name__ == "__main__":
    main()
