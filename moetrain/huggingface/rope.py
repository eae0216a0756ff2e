"""Rotary positions in a config.json, and back: base, scaling, and the share of a head."""

from collections.abc import Iterator, Mapping
from typing import Any

from moetrain.huggingface.names import ConversionError
from moetrain.settings import ModelSettings

# Of each type of scaling: our settings, and the keys of rope_parameters.
_SCALED = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
# As where they are missing: what they say is what is computed here.
_DEFAULTS = {"truncate": True, "mscale": None, "mscale_all_dim": None}
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_DEFAULTS}
_SCALINGS = " or ".join(_SCALED)


def rope_json(settings: ModelSettings, *, silent: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a config.json, for transformers 4 and 5 alike.

    Version 5 reads `rope_parameters`; version 4, and tools made for it, the others. `silent` are
    transformers' defaults.
    """
    scaling = settings.rope_scaling
    keys = {} if scaling.type == "none" else _SCALED[scaling.type]
    parameters: dict[str, Any] = {
        "rope_type": "default" if scaling.type == "none" else scaling.type,
        **{theirs: getattr(scaling, ours) for ours, theirs in keys.items()},
    }
    parameters = {name: value for name, value in parameters.items() if value is not None}
    values: dict[str, Any] = {"rope_theta": settings.rope_theta}
    if scaling.type != "none":
        values["rope_scaling"] = dict(parameters)
    if "partial_rotary_factor" in silent:
        values["partial_rotary_factor"] = settings.partial_rotary_factor
        parameters["partial_rotary_factor"] = settings.partial_rotary_factor
    return values | {"rope_parameters": parameters | {"rope_theta": settings.rope_theta}}


def read_rope(config: Mapping[str, Any], *, silent: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of rotary positions, where `silent` are transformers' defaults.

    Raises ConversionError for what isn't computed here, and where two places contradict each other.
    """
    parts = list(_parts(config))
    values = {
        "rope_theta": _agreed("rope_theta", config, parts, silent.get("rope_theta")),
        "rope_scaling": _scaling(parts, length=config.get("max_position_embeddings")),
        "partial_rotary_factor": _agreed(
            "partial_rotary_factor", config, parts, silent.get("partial_rotary_factor", 1.0)
        ),
    }
    if "partial_rotary_factor" not in silent and values["partial_rotary_factor"] != 1.0:
        raise ConversionError(
            f"config.json: partial_rotary_factor={values['partial_rotary_factor']}: "
            f"{config.get('model_type')} rotates whole heads: it can't be imported"
        )
    return values


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in ("rope_scaling", "rope_parameters"):
        part = config.get(name) or {}
        if not isinstance(part, Mapping):
            raise ConversionError(f"config.json: {name}={part!r}: must be an object")
        yield name, part


def _agreed(
    key: str, config: Mapping[str, Any], parts: list[tuple[str, Mapping[str, Any]]], silent: Any
) -> Any:
    """Returns a value that may stand alone or in either object; they must agree."""
    found = {} if config.get(key) is None else {key: config[key]}
    found |= {f"{name}.{key}": part[key] for name, part in parts if part.get(key) is not None}
    if len(set(found.values())) > 1:
        told = " and ".join(f"{name}={value}" for name, value in found.items())
        raise ConversionError(f"config.json: {told}: which of them holds can't be known")
    return next(iter(found.values()), silent)


def _scaling(parts: list[tuple[str, Mapping[str, Any]]], *, length: object) -> dict[str, Any]:
    """Returns the settings of the scaling; `length` is what transformers takes for the original
    length where none is given."""
    found: list[dict[str, Any]] = []
    for name, part in parts:
        kind = part.get("rope_type", part.get("type", "default"))
        keys = {} if kind == "default" else _SCALED.get(kind)
        others = sorted(set(part) - _KNOWN - set((keys or {}).values()))
        others += [key for key, value in _DEFAULTS.items() if part.get(key, value) != value]
        if keys is None or others:
            what = ", ".join(others) if keys is not None else f"{kind!r} scaling"
            raise ConversionError(
                f"config.json: {name}={dict(part)}: {what} is not computed here ({_SCALINGS} is): "
                "it can't be imported"
            )
        if kind != "default":
            given = {ours: part[theirs] for ours, theirs in keys.items() if theirs in part}
            if "original_max_seq_len" in keys:
                given.setdefault("original_max_seq_len", length)
            found.append({"type": kind, **given})
    if found and found[0] != found[-1]:
        raise ConversionError(
            "config.json: rope_scaling and rope_parameters differ: which of them holds can't be "
            "known"
        )
    return found[0] if found else {}
