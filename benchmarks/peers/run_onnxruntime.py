"""Measures onnxruntime-genai; see harness.py for what is printed.

    PYTHON benchmarks/peers/run_onnxruntime.py FOLDER [--prompt 512] ...

FOLDER is what `python -m onnxruntime_genai.models.builder` wrote.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from harness import Prompts, Runtime, describe, measure, parse


def bytes_per_token(folder: Path) -> int:
    """Bytes of all tensors that are kept beside the graph but the embeddings'."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    entries = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer}
    return sum(int(entry.get("length", 0)) for name, entry in entries.items() if "embed_tokens" not in name)


def main() -> None:
    arguments = parse(argparse.ArgumentParser(description=__doc__))
    folder = Path(arguments.model)
    if arguments.describe:
        describe(bytes_per_token(folder), "onnxruntime", "onnxruntime-genai")
        return
    settings = json.loads((folder / "genai_config.json").read_text())
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": arguments.threads}}}}))
    model = genai.Model(config)

    def generate(prompts: Prompts, new: int) -> float:
        parameters = genai.GeneratorParams(model)
        length = len(prompts[0]) + new
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        generator = genai.Generator(model, parameters)
        began = time.perf_counter()
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        generator.generate_next_token()
        first = time.perf_counter() - began
        for _ in range(new - 1):
            generator.generate_next_token()
        assert len(generator.get_sequence(0)) == length
        return first

    vocab = settings["model"]["vocab_size"]
    measure(Runtime(generate, vocab), arguments)


if __name__ == "__main__":
    main()
