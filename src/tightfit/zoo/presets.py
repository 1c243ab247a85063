"""What is trained and how: the shape of a model, the settings of a run, and the named presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.errors import UsageError

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model, or with ``num_local_experts`` a Mixtral-shaped one. Names are those of ``config.json``."""

    hidden_size: int
    intermediate_size: int  # of each expert, where there are experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    rope_theta: float = 50000.0
    rms_norm_eps: float = 1e-5

    def config(self, vocab_size: int) -> dict[str, Any]:
        """The ``config.json`` of this shape, in the form that transformers 4 and 5 both read."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }
        if self.num_local_experts:
            del config["attention_bias"], config["mlp_bias"]
            config |= {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "num_local_experts": self.num_local_experts,
                "num_experts_per_tok": self.num_experts_per_tok,
                "sliding_window": None,
            }
        return config


@dataclass(frozen=True)
class Settings:
    """One training run. It ends after ``tokens``, or after ``minutes`` of training where that is given.

    ``curriculum`` lists (share of the run, row length): each length is used until its share is over. Learning rates
    warm up over ``warmup_steps``, stay flat until ``decay_from`` of the run, then fall linearly to ``final_lr`` of
    their value.
    """

    shape: Shape
    tokens: int
    minutes: float | None = None
    curriculum: tuple[tuple[float, int], ...] = ((0.6, 512), (0.85, 1024), (1.0, 2048))
    batch_tokens: int = 8192
    micro_tokens: int = 4096  # tokens of one forward and backward pass: bounds memory, does not change the result
    task_share: float = 0.3  # of the rows; without them a model of this size does not learn to look things up
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    warmup_steps: int = 40
    decay_from: float = 0.55
    final_lr: float = 0.02
    clip_norm: float = 1.0
    balance: float = 0.01  # weight of the router's load-balancing loss
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise UsageError("a run without tokens or minutes trains nothing", "Give a number above zero.")

    def length(self, progress: float) -> int:
        """Tokens of a row at ``progress`` (0 to 1) of the run."""
        return next((length for until, length in self.curriculum if progress < until), self.curriculum[-1][1])

    def lr_scale(self, step: int, progress: float) -> float:
        """The factor on both learning rates at ``step`` and ``progress``."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = max(self.final_lr, 1 - (progress - self.decay_from) / (1 - self.decay_from))
        return warmup * min(1.0, decay)


_TO_8192 = ((0.5, 1024), (0.75, 2048), (0.9, 4096), (1.0, 8192))
_GPU: dict[str, Any] = {"curriculum": _TO_8192, "batch_tokens": 131072, "micro_tokens": 32768, "warmup_steps": 100}

PRESETS: dict[str, Settings] = {
    # What ships: one hour on two CPU cores. Its positions were declared to 4096 and trained to 2048.
    "nano": Settings(Shape(256, 640, 8, 4, 2, 64, 4096), tokens=16_500_000),
    # Many small experts, to judge what is cached of them: over an hour on one CPU core.
    "nano-moe": Settings(
        Shape(192, 96, 6, 3, 1, 64, 1024, num_local_experts=32, num_experts_per_tok=4),
        tokens=2_000_000,
        curriculum=((0.8, 256), (1.0, 1024)),
        batch_tokens=2048,
        micro_tokens=2048,
        task_share=0.05,
    ),
    # The next three are for a GPU; they share a tokenizer, so that `draft` can propose tokens for the other two.
    "small": Settings(Shape(512, 896, 12, 8, 4, 64, 8192), tokens=1_000_000_000, **_GPU),
    "small-moe": Settings(Shape(384, 192, 12, 8, 4, 64, 8192, num_local_experts=8), tokens=1_000_000_000, **_GPU),
    "draft": Settings(Shape(192, 512, 4, 3, 1, 64, 8192), tokens=1_000_000_000, **_GPU),
}


def preset(name: str) -> Settings:
    """The settings called ``name``. Raises UsageError for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f"there is no training preset named {name!r}", f"Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]
