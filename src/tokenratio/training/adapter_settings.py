"""The configuration of a new adapter from its settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftType, PromptLearningConfig

from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.names import suggestion

# Initialisations of LoRA that move weights out of the base, or need a pass over data.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
_NEED_DATA = ("eva", "lora_ga")
# Kinds that a test trains, switches off, saves, loads and merges.
SUPPORTED = frozenset(
    (
        *("LORA", "ADAMSS", "BOFT", "DEFT", "DELORA", "GLORA", "GRALORA", "HIRA", "HRA", "IA3"),
        *("LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "RANDLORA", "SHIRA", "VERA"),
    )
)


def peft_config_of(settings: PeftConfig | Mapping[str, Any]) -> PeftConfig:
    """The configuration of an adapter from its settings: LoRA, or another kind by `peft_type`.

    Raises:
        TokenRatioError: a kind or setting that PEFT does not have, or an adapter whose reference
            would be wrong.
    """
    config = settings if isinstance(settings, PeftConfig) else _built(dict(settings))
    kind = PeftType(config.peft_type).value
    if config.is_prompt_learning or kind not in SUPPORTED:
        why = "prompt learning" if config.is_prompt_learning else "not tested"
        raise TokenRatioError(f"peft_type {kind} is not supported ({why}): use {_listed()}")
    _check_start(getattr(config, "init_lora_weights", True))
    if getattr(config, "kasa_config", None) is not None:
        raise TokenRatioError("peft: kasa_config changes the weights of the base: leave it out")
    return config


def _check_start(init: Any) -> None:
    """Refuse an initialisation that changes the base or needs data."""
    name = init.lower() if isinstance(init, str) else ""
    if name.startswith(_CHANGE_THE_BASE):
        raise TokenRatioError(
            f"peft: init_lora_weights {init!r} changes the weights under the adapter, so that the "
            "model with its adapter off is no longer the starting policy: use true, 'gaussian' or "
            "'orthogonal'"
        )
    if name in _NEED_DATA:
        raise TokenRatioError(
            f"peft: init_lora_weights {init!r} needs a pass over data before training, which is "
            "not supported: use true, 'gaussian' or 'orthogonal'"
        )


def _built(settings: dict[str, Any]) -> PeftConfig:
    kind = str(settings.pop("peft_type", "LORA")).upper().rpartition(".")[2]
    known = {each.value: config for each, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise TokenRatioError(f"unknown peft_type {kind!r}; supported: {_listed()}")
    names = [field.name for field in dataclasses.fields(known[kind]) if field.init]
    for name in settings:
        if name not in names:
            raise TokenRatioError(f"peft: {kind} has no setting {name!r}{suggestion(name, names)}")
    if kind not in SUPPORTED and not issubclass(known[kind], PromptLearningConfig):
        raise TokenRatioError(f"peft_type {kind} is not supported (not tested): use {_listed()}")
    _check_start(settings.get("init_lora_weights", True))  # before PEFT warns of them
    with reported_as("peft", ValueError, TypeError):
        return known[kind](**{"task_type": "CAUSAL_LM", **settings})


def _listed() -> str:
    return ", ".join(sorted(SUPPORTED))
