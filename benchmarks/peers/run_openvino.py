"""Measures OpenVINO GenAI; see harness.py for what is printed.

    PYTHON benchmarks/peers/run_openvino.py FOLDER [--prompt 512] ... [--set KEY=VALUE]

FOLDER is what `optimum-cli export openvino` wrote. One prompt goes through LLMPipeline, several through
ContinuousBatchingPipeline, both with paged attention and without a cache of prefixes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from harness import Prompts, Runtime, describe, measure, parse


def bytes_per_token(folder: Path) -> int:
    """Bytes of all constants but the embeddings'."""
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_byte_size() for node in constants if "embed_tokens" not in node.get_friendly_name())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", nargs="*", default=[], help="properties of the device, such as KV_CACHE_PRECISION=f16")
    arguments = parse(parser)
    folder = Path(arguments.model)
    if arguments.describe:
        describe(bytes_per_token(folder), "openvino", "openvino-genai")
        return
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = arguments.batch
    properties = {"INFERENCE_NUM_THREADS": arguments.threads, "NUM_STREAMS": 1}
    properties |= dict(item.split("=", 1) for item in arguments.set)

    def settings(new: int) -> genai.GenerationConfig:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        return config

    if arguments.batch == 1:
        pipeline = genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **properties)
    else:
        pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)

    def generate(prompts: Prompts, new: int) -> float | None:
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        if arguments.batch > 1:
            results = pipeline.generate(tensors, [settings(new)] * len(tensors))
            assert all(len(tokens) == new for result in results for tokens in result.m_generation_ids)
            return None
        mask = openvino.Tensor(np.ones((1, len(prompts[0])), dtype=np.int64))
        result = pipeline.generate(genai.TokenizedInputs(tensors[0], mask), settings(new))
        assert len(result.tokens[0]) == new
        return float(result.perf_metrics.get_ttft().mean / 1e3)

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    measure(Runtime(generate, vocab), arguments)


if __name__ == "__main__":
    main()
