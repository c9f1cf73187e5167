"""Refuses files of weights that do not fit a model: what is missing would be random."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from tokenratio.errors import TokenRatioError
from tokenratio.models.pretrained_arguments import DATA_ALONE, WHERE_KWARGS, loading

_NUM_NAMED = 3  # weights of each kind in a message


def load_whole(
    kind: Any,
    name: str,
    arguments: Mapping[str, Any],
    what: str,
    *,
    only_body: bool = False,
) -> PreTrainedModel:
    """`kind.from_pretrained(name)`, if the files hold every weight of the model and no other.

    Args:
        kind: one of transformers' automatic classes.
        what: what is loaded, for messages: "model 'x'".
        only_body: the head may be new, and the files may hold another head.
    Raises:
        TokenRatioError: it cannot be loaded, or weights are missing or left over; names them.
    """
    with loading(what):
        model, info = kind.from_pretrained(name, **arguments, output_loading_info=True)
        unexpected = info["unexpected_keys"]
        # transformers takes the text part of a model that also reads images.
        if unexpected and type(model.config) is not type(_saved_config(name, arguments)):
            unexpected = ()
    require_whole(
        model, info["missing_keys"], unexpected, f"cannot load {what}", only_body=only_body
    )
    return model


def require_whole(
    model: PreTrainedModel,
    missing: Iterable[str],
    unexpected: Iterable[str],
    problem: str,
    *,
    only_body: bool = False,
) -> None:
    """Refuse weights that were not in a model's files, and weights in them that it does not have.

    A weight that is tied to one in the files is not missing. Buffers that are computed, and what a
    quantisation adds, are not left over.

    Raises:
        TokenRatioError: names some of both.
    """
    body = f"{model.base_model_prefix}." if only_body else ""
    weights = dict(model.named_parameters(remove_duplicate=False))
    wanting = {key for key in missing if key.startswith(body)}
    read = {id(weight) for key, weight in weights.items() if key not in wanting}
    wanting = {key for key in wanting if key not in weights or id(weights[key]) not in read}
    buffers = {key for key, _ in model.named_buffers()}
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    over = {
        key
        for key in unexpected
        if key.startswith(body) and key not in buffers and not is_quantised
    }
    if wanting or over:
        raise TokenRatioError(
            f"{problem}: {describe(wanting, over)}. The weights and the config.json are of "
            "different models, or the weights were renamed"
        )


def describe(missing: Collection[str], unexpected: Collection[str]) -> str:
    """Names some of the weights that files lack, and some that the model has no place for."""
    parts = [f"it has no weights for {_some(missing)}"] if missing else []
    if unexpected:
        parts.append(f"the model has no place for its {_some(unexpected)}")
    return ", and ".join(parts)


def _saved_config(name: str, arguments: Mapping[str, Any]) -> Any:
    where = {key: value for key, value in arguments.items() if key in WHERE_KWARGS}
    return AutoConfig.from_pretrained(name, **where, **DATA_ALONE)


def _some(keys: Iterable[str]) -> str:
    named = sorted(keys)
    more = f" and {len(named) - _NUM_NAMED} more" if len(named) > _NUM_NAMED else ""
    return f"{', '.join(named[:_NUM_NAMED])}{more}"
