"""The settings of methods, with each method's published defaults. Imports no torch.

`--help` and a misspelt setting are answered from here; the methods themselves are
`tokenratio.losses.METHODS`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tokenratio.errors import TokenRatioError
from tokenratio.foreign_names import loss_advice
from tokenratio.names import require_choice
from tokenratio.settings import option

if TYPE_CHECKING:
    from tokenratio.bregman import BregmanGenerator
    from tokenratio.losses import Method

# The keys of `tokenratio.losses.METHODS`, which imports torch.
METHOD_NAMES = (
    *("tbpo_a", "tbpo_q", "tbpo", "adpo", "dpo", "robust_dpo", "bpo", "bpo_a", "tdpo1", "tdpo2"),
    *("ipo", "simpo", "tis_dpo", "sepo", "t_reg", "arc_bpo", "sft"),
)

# What the losses that read a contrast compare, as published: the starting policy (`reference`),
# the same after DPO on the run's pairs (`dpo`) or on the pairs swapped (`reversed_dpo`). T-REG's
# prompts ask for the same answer rewritten; the words are ours.
PUBLISHED_CONTRASTS: dict[str, dict[str, str]] = {
    "tis_dpo": {"positive": "dpo", "negative": "reversed_dpo"},
    "sepo": {"positive": "dpo", "negative": "reference"},
    "t_reg": {
        "positive": "reference",
        "negative": "reference",
        "positive_prompt": "{prompt}\n\nGive an answer that is helpful, correct, coherent and "
        "to the point.",
        "negative_prompt": "{prompt}\n\nGive an answer that is unhelpful, wrong, incoherent and "
        "rambling.",
    },
}

# Of loss tbpo; the first of each is the default.
_STATE_WEIGHTS = ("none", "kl", "baseline")
_AGGREGATIONS = ("mean", "sum", "sequence")

_Domain = tuple[Callable[[Any], bool], str]
_POSITIVE: _Domain = (lambda value: 0 < value < math.inf, "positive and finite")
_NOT_NEGATIVE: _Domain = (lambda value: 0 <= value < math.inf, "0 or positive")
_FINITE: _Domain = (math.isfinite, "finite")


def _own(help_text: str, domain: _Domain | None = None) -> Any:
    """A setting of some methods; None stands for the method's own default."""
    help_text = f"{help_text}. Default: the method's."
    return dataclasses.field(default=None, metadata={"help": help_text, "domain": domain})


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise `TokenRatioError` unless a setting is as expected."""
    if not condition:
        raise TokenRatioError(f"{name} must be {expected}, not {value!r}")


def _require_number(name: str, value: object, domain: _Domain) -> None:
    is_valid, expected = domain
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number and is_valid(value), name, value, expected)


@dataclass
class MethodSettings:
    """Which method, and its settings. None stands for the method's own default.

    A setting that the method does not have is an error, because it would have no effect.
    """

    loss: str = option(
        "tbpo_a",
        f"Method: {', '.join(METHOD_NAMES)}; see `tokenratio methods`.",
        choices=METHOD_NAMES,
    )
    beta: float | None = _own(
        "How strongly the policy is kept close to the reference, > 0 (docs/method.md §1); for sepo "
        "and simpo, the scale of the reward",
        _POSITIVE,
    )
    generator: str | None = _own(
        "Bregman generator of tbpo*, bpo* and arc_bpo: logistic, kliep, lsif, ba or sba "
        "(docs/method.md §3)"
    )
    generator_lambda: float | None = _own("λ > -1 of the generators ba and sba")
    generator_scale: float | None = _own("s > 0 of the generator sba")
    label_smoothing: float | None = _own(
        "ε in [0, 1/2), the share of labels assumed wrong: (1-ε) ℓ(u) + ε ℓ(-u); robust_dpo "
        "subtracts instead. For generators other than logistic, an extension of tokenratio",
        (lambda value: 0 <= value < 0.5, "at least 0 and below 1/2"),
    )
    state_weight: str | None = option(
        None, "State weight of loss tbpo: none, kl, baseline (docs/method.md §2). Default: none."
    )
    aggregation: str | None = option(
        None,
        "Aggregation of loss tbpo: the mean or sum over the steps both responses have, or "
        "sequence, the loss of the sum over whole responses. Default: mean.",
    )
    simpo_gamma: float | None = _own("Margin of simpo, in units of the reward", _NOT_NEGATIVE)
    tdpo_alpha: float | None = _own("Weight of tdpo2's KL", _NOT_NEGATIVE)
    tis_lower: float | None = _own("Lower clamp of tis_dpo's contrast, in nats", _FINITE)
    tis_upper: float | None = _own("Upper clamp of tis_dpo's contrast, in nats", _FINITE)
    sepo_share: float | None = _own(
        "Share of each response's tokens that sepo trains on",
        (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    )
    t_reg_weight: float | None = _own("Weight α of t_reg's regulariser", _NOT_NEGATIVE)
    arc_chunk_length: int | None = _own(
        "Longest chunk of arc_bpo, in tokens",
        (lambda value: isinstance(value, int) and value >= 1, "a whole number from 1"),
    )
    arc_target_margin: float | None = _own("Sum of arc_bpo's chunk targets", _POSITIVE)
    sft_weight: float = option(
        0.0,
        "Weight of the chosen response's cross-entropy per token (RPO's NLL anchor). "
        "With it, token-level losses also have to compute whole responses.",
    )
    token_scores: str | None = option(
        None, "Output folder of `tokenratio score-tokens`; tis_dpo, sepo and t_reg need it."
    )

    def resolve_method(self) -> None:
        """Fill in the method's own defaults and refuse settings that it does not have."""
        advice = None if self.loss in METHOD_NAMES else loss_advice(self.loss)
        if advice is not None:
            raise TokenRatioError(f"unknown loss {self.loss!r}: {advice}")
        require_choice("loss", self.loss, METHOD_NAMES, listed="`tokenratio methods` lists them")
        self._resolve_variant()
        own = self.method.settings
        for field in dataclasses.fields(MethodSettings):
            domain = field.metadata.get("domain")
            if domain is None:
                continue
            if field.name not in own:
                self._refuse_given(field.name)
                continue
            if getattr(self, field.name) is None:
                setattr(self, field.name, own[field.name])
            _require_number(field.name, getattr(self, field.name), domain)
        if self.tis_lower is not None and self.tis_upper is not None:
            is_ordered = self.tis_lower <= self.tis_upper
            require(is_ordered, "tis_lower", self.tis_lower, "at most tis_upper")
        self._resolve_generator(own.get("generator"))
        _require_number("sft_weight", self.sft_weight, _NOT_NEGATIVE)
        is_anchored = self.sft_weight != 0 and self.loss == "sft"
        require(not is_anchored, "sft_weight", self.sft_weight, "0: the loss is sft itself")

    def _resolve_variant(self) -> None:
        for name, known in (("state_weight", _STATE_WEIGHTS), ("aggregation", _AGGREGATIONS)):
            if self.loss != "tbpo":
                self._refuse_given(name)
                continue
            if getattr(self, name) is None:
                setattr(self, name, known[0])
            require_choice(name, getattr(self, name), known)

    def _resolve_generator(self, own: "BregmanGenerator | None") -> None:
        from tokenratio.bregman import GENERATORS, ScaledBasu

        parameters = {"generator_lambda": "lam", "generator_scale": "scale"}
        if own is None:
            for name in ("generator", *parameters):
                self._refuse_given(name)
            return
        if self.generator is None:
            self.generator = own.name
        require_choice("generator", self.generator, GENERATORS)
        taken = {field.name for field in dataclasses.fields(cast(Any, GENERATORS[self.generator]))}
        defaults = vars(own if self.generator == own.name else ScaledBasu())
        for name, parameter in parameters.items():
            is_given = getattr(self, name) is not None
            if is_given and parameter not in taken:
                raise TokenRatioError(f"generator {self.generator!r} takes no {name}")
            if not is_given and parameter in taken:
                setattr(self, name, defaults[parameter])
        self.bregman_generator  # noqa: B018 - an invalid one is refused now, not at the first step

    def _refuse_given(self, name: str) -> None:
        if getattr(self, name) is not None:
            raise TokenRatioError(
                f"loss {self.loss!r} takes no {name}; `tokenratio methods` lists what each takes"
            )

    @property
    def method(self) -> "Method":
        """The method that `loss` names; for tbpo the variant that its settings choose."""
        from tokenratio.losses import METHODS, tbpo_variant

        if self.loss == "tbpo":
            return tbpo_variant(cast(Any, self.state_weight), cast(Any, self.aggregation))
        return METHODS[self.loss]

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The arguments of the method's `per_pair` and `per_step`."""
        settings = {name: getattr(self, name) for name in self.method.settings}
        if "generator" in settings:
            settings["generator"] = self.bregman_generator
        return settings

    @property
    def bregman_generator(self) -> "BregmanGenerator":
        """The generator that `generator`, `generator_lambda` and `generator_scale` name."""
        if self.generator is None:
            raise TokenRatioError(f"loss {self.loss!r} takes no generator")
        from tokenratio.bregman import make_generator

        given = {"lam": self.generator_lambda, "scale": self.generator_scale}
        params = {name: value for name, value in given.items() if value is not None}
        try:
            return make_generator(self.generator, **params)
        except ValueError as error:
            raise TokenRatioError(str(error)) from None
