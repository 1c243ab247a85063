"""The settings of rotary position embeddings, from both forms in which config.json carries them.

transformers 4: ``rope_theta`` and ``partial_rotary_factor`` beside ``rope_scaling`` (whose kind is ``type`` or
``rope_type``); gemma3 adds ``rope_local_base_freq`` for its sliding layers. transformers 5: all of it in
``rope_parameters``, either flat or one object per layer type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeParameters:
    """One set of rotary frequencies. Names are those of ``rope_parameters`` in transformers 5.

    ``original_max_position_embeddings`` is always set: where the file is silent, and for ``dynamic`` always, it is
    ``max_position_embeddings``. ``factor`` is always set too: for yarn and longrope it is the ratio of
    ``max_position_embeddings`` to the original length where the file is silent. ``attention_factor`` None means that
    the rope type's own formula gives it.
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int = 0
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the range of corrected dimensions to whole ones
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    attention_factor: float | None = None  # yarn, longrope
    short_factor: tuple[float, ...] = ()  # longrope, one per rotated pair
    long_factor: tuple[float, ...] = ()  # longrope, one per rotated pair


def rope_parameters(
    config: Config,
    layer_types: Iterable[str] = ("full_attention",),
    *,
    default_theta: float = 10_000.0,
    local_theta: float | None = None,
) -> dict[str, RopeParameters]:
    """The rotary settings of each layer type.

    ``default_theta`` is the base of the family where the file names none. ``local_theta`` is set for families whose
    ``sliding_attention`` layers have a base of their own (gemma3: 10000) and never scale it.
    Raises CheckpointError for an unknown kind, a missing key, or a value out of range.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    section = config.section(key) if config.get(key) else Config({}, config.name, config.file)
    nested = any(isinstance(value, dict) for value in section.values.values())
    result = {}
    for layer_type in layer_types:
        theta_key, theta = "rope_theta", default_theta
        if layer_type == "sliding_attention" and local_theta is not None:
            theta_key, theta = "rope_local_base_freq", local_theta
        if nested:
            part = section.section(layer_type)
        elif theta_key == "rope_local_base_freq":
            part = Config({}, config.name, config.file)
        else:
            part = section
        result[layer_type] = _read(part, config, config.number(theta_key, theta, above=0.0))
    return result


def _read(section: Config, config: Config, theta: float) -> RopeParameters:
    """One set from ``section``; what it lacks comes from the top level of ``config``."""
    rope_type = section.string("rope_type", section.string("type", "default"))
    if rope_type == "su" or (rope_type == "yarn" and "short_factor" in section):
        rope_type = "longrope"  # its names in the first checkpoints of phi3
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"{config.file} of {config.name} asks for rope type '{rope_type}'", f"Known are: {', '.join(ROPE_TYPES)}."
        )
    longest = config.integer("max_position_embeddings")
    original = longest
    if rope_type in ("llama3", "yarn", "longrope"):
        # The top level wins, as in transformers: phi3 keeps the true value there.
        original = config.integer(
            "original_max_position_embeddings", section.integer("original_max_position_embeddings", longest)
        )
    partial = config.number("partial_rotary_factor", 1.0, above=0.0, maximum=1.0)
    parameters = RopeParameters(
        rope_type=rope_type,
        rope_theta=section.number("rope_theta", theta, above=0.0),
        partial_rotary_factor=section.number("partial_rotary_factor", partial, above=0.0, maximum=1.0),
        original_max_position_embeddings=original,
    )
    if rope_type == "default":
        return parameters
    implied = longest / original if rope_type in ("yarn", "longrope") else None
    parameters = replace(parameters, factor=section.number("factor", implied, above=0.0))
    if rope_type == "llama3":
        low = section.number("low_freq_factor", above=0.0)
        return replace(parameters, low_freq_factor=low, high_freq_factor=section.number("high_freq_factor", above=low))
    if rope_type == "yarn":
        return replace(
            parameters,
            beta_fast=section.number("beta_fast", 32.0, above=0.0),
            beta_slow=section.number("beta_slow", 1.0, above=0.0),
            truncate=section.flag("truncate", True),
            mscale=section.optional_number("mscale"),
            mscale_all_dim=section.optional_number("mscale_all_dim"),
            attention_factor=section.optional_number("attention_factor", above=0.0),
        )
    if rope_type == "longrope":
        short, long = section.numbers("short_factor", above=0.0), section.numbers("long_factor", above=0.0)
        if len(short) != len(long):
            raise section.wrong("long_factor", f"{len(short)} numbers, as many as 'short_factor' has")
        return replace(
            parameters,
            short_factor=short,
            long_factor=long,
            attention_factor=section.optional_number("attention_factor", above=0.0),
        )
    return parameters
