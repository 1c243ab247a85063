"""The defaults that a model's authors recommend for generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.files import read_json


@dataclass(frozen=True)
class GenerationDefaults:
    """generation_config.json. A filter that the file does not set is off: ``top_k`` 0, ``top_p`` 1, ``min_p`` 0,
    ``repetition_penalty`` 1. (transformers samples with top_k 50 where the file is silent.)
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_generation_defaults(path: Path | None, config: Mapping[str, Any], name: str) -> GenerationDefaults:
    """Read ``path`` (which may be missing); token ids that it lacks come from ``config``, the model's config.json.

    Raises CheckpointError where a value cannot be used.
    """
    sampling = Config(read_json(path) if path is not None and path.exists() else {}, name, "generation_config.json")
    model = Config(config, name)
    sources = [sampling, model]
    if isinstance(config.get("text_config"), dict):
        sources.append(model.text())
    return GenerationDefaults(
        eos_token_ids=_token_ids(sources, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(sources, "bos_token_id")), None),
        pad_token_id=next(iter(_token_ids(sources, "pad_token_id")), None),
        do_sample=sampling.flag("do_sample", False),
        temperature=sampling.number("temperature", 1.0, minimum=0.0),
        top_k=sampling.integer("top_k", 0, minimum=0),
        top_p=sampling.number("top_p", 1.0, minimum=0.0, maximum=1.0),
        min_p=sampling.number("min_p", 0.0, minimum=0.0, maximum=1.0),
        repetition_penalty=sampling.number("repetition_penalty", 1.0, above=0.0),
    )


def _token_ids(sources: list[Config], key: str) -> tuple[int, ...]:
    """The ids under ``key`` in the first source that sets it: one id, or a list of ids."""
    for source in sources:
        value = source.get(key)
        if isinstance(value, list):
            return source.integers(key, minimum=0)
        if value == -1 and key == "pad_token_id":  # "no padding token" in original checkpoints of llama
            return ()
        if value is not None:
            return (source.integer(key, minimum=0),)
    return ()
