"""config.json, read with its types checked. The names of keys are those of the file.

Keys that real checkpoints leave out, with the value that the family's configuration class in transformers implies, and
that a family file passes as ``default``:

- ``head_dim``: hidden_size / num_attention_heads, but 128 for qwen3, 256 for gemma2 and gemma3, 64 for gpt_oss.
- ``num_key_value_heads``: num_attention_heads (old llama, phi3, olmo2).
- ``tie_word_embeddings``: false, but true for gemma2, gemma3 and smollm3.
- ``rope_theta``: 10000, but 1000000 for mixtral, 2000000 for smollm3, 150000 for gpt_oss; gemma3: 1000000 in
  full_attention layers, 10000 in sliding_attention ones.
- ``sliding_window``: absent means 4096 for mistral, gemma2 and gemma3, 128 for gpt_oss, and none for mixtral, phi3 and
  smollm3; ``null`` means none everywhere. qwen2, qwen3 and their mixtures use it only where ``use_sliding_window`` is
  true.
- ``layer_types``: not written before transformers 4.53. Implied, counting layers from 0: qwen2 and qwen3 slide from
  layer ``max_window_layers`` on; qwen2_moe slides in even layers before it; gemma2 and gpt_oss slide in even layers;
  gemma3 slides in all but every ``sliding_window_pattern``-th (6th) layer.
- gemma3 in its multimodal wrapper writes only what differs from Gemma3TextConfig: num_attention_heads 8,
  num_key_value_heads 4, head_dim 256, vocab_size 262208, max_position_embeddings 131072, query_pre_attn_scalar 256,
  rms_norm_eps 1e-6 may all be absent.
- Configurations made from GGUF headers have ``rope_interleave`` (deepseek_v3 has it too): neighbouring features are
  rotated together; and for gemma ``norm_weights_add_one`` false: norms multiply by their weight as it is.
- deepseek_v2, deepseek_v3: ``q_lora_rank`` null means a plain q_proj; deepseek_v3 checkpoints have ``topk_method``
  and ``scoring_func`` from their original code, which transformers does not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tightfit.errors import CheckpointError

MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e30  # also refuses the Infinity and NaN that Python's JSON reader accepts


class Config:
    """Typed access to the keys of one JSON object; ``file`` of model ``name`` stands in messages.

    A getter without a default requires its key. ``null`` counts as absent, except in the ``optional_`` getters, where
    an absent key gives the default and ``null`` gives None: ``"sliding_window": null`` switches a window off.
    All getters raise CheckpointError for a missing key and for a value of the wrong type or out of range.
    """

    def __init__(self, values: Mapping[str, Any], name: str, file: str = "config.json") -> None:
        self.values = values
        self.name = name
        self.file = file

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands in the file, unchecked."""
        return self.values.get(key, default)

    @property
    def model_type(self) -> str:
        """The family: ``llama``, ``qwen3_moe``, ... Raises CheckpointError where it is missing."""
        return self.string("model_type")

    def section(self, key: str) -> Config:
        """The object under ``key``."""
        value = self._require(key, None)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Config(value, self.name, f"'{key}' in {self.file}")

    def text(self) -> Config:
        """The language model of a multimodal wrapper (``text_config``), or this configuration itself."""
        return self.section("text_config") if self.get("text_config") is not None else self

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        value = self._require(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(key, f"an integer of at least {minimum}" + self._at_most(maximum, MAX_INTEGER))
        return value

    def optional_integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int | None:
        if self.get(key, default) is None:
            return None
        return self.integer(key, default, minimum=minimum)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        above: float = -math.inf,
    ) -> float:
        """A finite number with ``minimum`` <= number <= ``maximum`` and ``above`` < number."""
        value = self._require(key, default)
        return self._number(key, value, minimum, maximum, above)

    def optional_number(
        self, key: str, default: float | None = None, *, minimum: float = -math.inf, above: float = -math.inf
    ) -> float | None:
        if self.get(key, default) is None:
            return None
        return self.number(key, default, minimum=minimum, above=above)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._require(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        value = self._require(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def integers(self, key: str, default: tuple[int, ...] | None = None, *, minimum: int = 1) -> tuple[int, ...]:
        values = self._list(key, default, "integers")
        if not all(type(value) is int and minimum <= value <= MAX_INTEGER for value in values):
            raise self.wrong(key, f"a list of integers of at least {minimum}")
        return values

    def numbers(
        self, key: str, default: tuple[float, ...] | None = None, *, above: float = -math.inf
    ) -> tuple[float, ...]:
        values = self._list(key, default, "numbers")
        return tuple(self._number(key, value, -math.inf, math.inf, above) for value in values)

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        values = self._list(key, default, "strings")
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of strings")
        return values

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that is there and cannot be used."""
        value = str(self.get(key))
        shown = value if len(value) <= 60 else value[:57] + "..."
        return CheckpointError(
            f"{self.file} of {self.name} has '{key}' = {shown}, expected {expected}",
            "The file is damaged or was written for another version of the model: download it again.",
        )

    def _require(self, key: str, default: Any) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self.file} of {self.name} has no '{key}'",
                "The file is incomplete, or belongs to another kind of model: download it again.",
            )
        return value

    def _list(self, key: str, default: tuple[Any, ...] | None, of: str) -> tuple[Any, ...]:
        value = self._require(key, default)
        if not isinstance(value, (list, tuple)):
            raise self.wrong(key, f"a list of {of}")
        return tuple(value)

    def _number(self, key: str, value: Any, minimum: float, maximum: float, above: float) -> float:
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not abs(value) < MAX_NUMBER or not (minimum <= value <= maximum and value > above):
            limits = f" above {above:g}" * (above > -math.inf) + f" of at least {minimum:g}" * (minimum > -math.inf)
            raise self.wrong(key, f"a number{limits}" + self._at_most(maximum, math.inf))
        return float(value)

    @staticmethod
    def _at_most(maximum: float, unbounded: float) -> str:
        return f" and at most {maximum:g}" if maximum < unbounded else ""
