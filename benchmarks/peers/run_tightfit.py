"""Measures tightfit through its Python interface; see harness.py for what is printed.

    python benchmarks/peers/run_tightfit.py MODEL [--prompt 512] ... [--memory SIZE] [--weights FORMAT] [--kv METHODS]

The tokenizer must make a token of each digit, as the embedded model's does, which the random models of the benchmarks
share. What it would measure is told by `tightfit plan`, so it has no --describe.
"""

from __future__ import annotations

import argparse

from harness import Prompts, Runtime, measure, parse

import tightfit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory")
    parser.add_argument("--weights")
    parser.add_argument("--kv")
    arguments = parse(parser)
    model = tightfit.load(
        arguments.model,
        arguments.memory,
        context=max(arguments.prompt + arguments.new + 1, arguments.warm + 2),
        batch=arguments.batch,
        weights=arguments.weights,
        kv=arguments.kv,
        threads=arguments.threads,
    )

    def prefill_seconds() -> float:
        receipt = model.receipt()
        rate = receipt["prefill_tokens_per_s"]
        return receipt["prompt_tokens"] / rate if rate else 0.0

    def generate(prompts: Prompts, new: int) -> float:
        # After <|bos|> a sign and digits, each a token.
        texts = ["#" + "".join(str(token % 10) for token in prompt[2:]) for prompt in prompts]
        before = prefill_seconds()
        completions = model.generate(texts, max_new_tokens=new, temperature=0, ignore_eos=True)
        for prompt, completion in zip(prompts, completions, strict=True):
            assert (completion.prompt_tokens, len(completion.tokens)) == (len(prompt), new)
        return prefill_seconds() - before

    measure(Runtime(generate, model.checkpoint.config["vocab_size"]), arguments)


if __name__ == "__main__":
    main()
