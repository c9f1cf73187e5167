"""The settings of methods: each method's own, with its published defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from tokenratio.errors import TokenRatioError
from tokenratio.foreign_names import loss_advice
from tokenratio.names import require_choice
from tokenratio.settings import option

if TYPE_CHECKING:
    from tokenratio.bregman import BregmanGenerator
    from tokenratio.losses import Method, RatioMatching

# The names of `tokenratio.losses.METHODS`, which imports torch: `--help` lists them without it.
METHOD_NAMES = (
    *("tbpo_a", "tbpo_q", "tbpo", "adpo", "dpo", "robust_dpo", "bpo", "bpo_a", "tdpo1", "tdpo2"),
    *("ipo", "simpo", "tis_dpo", "sepo", "t_reg", "arc_bpo", "sft"),
)

_OWN = "default: the method's own"


def _own(help_text: str) -> Any:
    """A setting that some methods have, each with its own published default."""
    return option(None, f"{help_text}; {_OWN}.")


# What a method's settings may be; `TokenRatioConfig` has a field for each.
_DOMAINS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda value: 0 < value < math.inf, "positive and finite"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "at least 0 and below 1/2"),
    "simpo_gamma": (lambda value: 0 <= value < math.inf, "0 or positive"),
    "tdpo_alpha": (lambda value: 0 <= value < math.inf, "0 or positive"),
    "tis_lower": (math.isfinite, "finite"),
    "tis_upper": (math.isfinite, "finite"),
    "sepo_share": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "t_reg_weight": (lambda value: 0 <= value < math.inf, "0 or positive"),
    "arc_chunk_length": (
        lambda value: isinstance(value, int) and value >= 1,
        "a whole number from 1",
    ),
    "arc_target_margin": (lambda value: 0 < value < math.inf, "positive and finite"),
}

# What makes the objective.
METHOD_SETTINGS = (
    *_DOMAINS,
    *("loss", "generator", "generator_lambda", "generator_scale"),
    *("state_weight", "aggregation", "sft_weight"),
)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise `TokenRatioError` unless a setting is as expected."""
    if not condition:
        raise TokenRatioError(f"{name} must be {expected}, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class MethodSettings:
    """Which method, and its settings. None stands for the method's own default.

    One that the method does not have is refused: it would be a silent no-op.
    """

    loss: str = option(
        "tbpo_a",
        f"Method: {', '.join(METHOD_NAMES)}; see `tokenratio methods`.",
        choices=METHOD_NAMES,
    )
    beta: float | None = _own(
        "Strength of the tie to the reference, > 0 (docs/method.md §1); scale of sepo and simpo"
    )
    generator: str | None = _own(
        "Bregman generator: logistic, kliep, lsif, ba, sba (docs/method.md §3), of tbpo*, bpo*, "
        "arc_bpo"
    )
    generator_lambda: float | None = _own("λ > -1 of ba and sba; only these take one")
    generator_scale: float | None = _own("s > 0 of sba; only it takes one")
    label_smoothing: float | None = _own(
        "ε in [0, 1/2), the share of labels assumed to be wrong: (1-ε) ℓ(u) + ε ℓ(-u); robust_dpo "
        "subtracts instead. An extension of ours for generators other than logistic"
    )
    state_weight: str | None = option(
        None, "Of loss tbpo: none, kl, baseline (docs/method.md §2); default none."
    )
    aggregation: str | None = option(
        None,
        "Of loss tbpo, over the steps both responses have: mean, sum; or sequence, the "
        "loss of the sum over whole responses; default mean.",
    )
    simpo_gamma: float | None = _own("Margin of simpo, in units of the reward")
    tdpo_alpha: float | None = _own("Weight of tdpo2's KL")
    tis_lower: float | None = _own("Lower clamp of tis_dpo's contrast, nats")
    tis_upper: float | None = _own("Upper clamp of tis_dpo's contrast, nats")
    sepo_share: float | None = _own("Share of each response's tokens that sepo trains on")
    t_reg_weight: float | None = _own("Weight α of t_reg's regulariser")
    arc_chunk_length: int | None = _own("Longest chunk of arc_bpo, tokens")
    arc_target_margin: float | None = _own("What arc_bpo's chunk targets add up to")
    sft_weight: float = option(
        0.0,
        "Weight of the chosen response's cross-entropy per token (RPO's NLL anchor). "
        "With it, token-level losses run whole responses.",
    )
    token_scores: str | None = option(
        None, "Folder of `tokenratio score-tokens`; tis_dpo, sepo and t_reg need it."
    )

    def resolve_method(self) -> None:
        """Fill in what the method has of its own, and refuse what it does not have.

        Raises:
            TokenRatioError: which setting, and what it may be.
        """
        advice = None if self.loss in METHOD_NAMES else loss_advice(self.loss)
        if advice is not None:
            raise TokenRatioError(f"unknown loss {self.loss!r}: {advice}")
        require_choice("loss", self.loss, METHOD_NAMES, listed="`tokenratio methods` lists them")
        self._resolve_space()
        own = self.method.settings
        for name, (is_valid, expected) in _DOMAINS.items():
            if name not in own:
                self._refuse_given(name)
                continue
            if getattr(self, name) is None:
                setattr(self, name, own[name])
            value = getattr(self, name)
            require(_is_number(value) and is_valid(value), name, value, expected)
        if "tis_lower" in own:
            require(
                self.tis_lower <= self.tis_upper, "tis_lower", self.tis_lower, "at most tis_upper"
            )
        self._resolve_generator(own.get("generator"))
        is_anchored = _is_number(self.sft_weight) and 0 <= self.sft_weight < math.inf
        require(is_anchored, "sft_weight", self.sft_weight, "0 or positive")
        require(
            self.sft_weight == 0 or self.loss != "sft",
            "sft_weight",
            self.sft_weight,
            "0: the loss is sft itself",
        )

    def _resolve_space(self) -> None:
        choices = {
            "state_weight": ("none", "kl", "baseline"),
            "aggregation": ("mean", "sum", "sequence"),
        }
        for name, known in choices.items():
            if self.loss != "tbpo":
                self._refuse_given(name)
                continue
            if getattr(self, name) is None:
                setattr(self, name, known[0])
            value = getattr(self, name)
            require_choice(name, value, known)

    def _resolve_generator(self, own: "BregmanGenerator | None") -> None:
        from tokenratio.bregman import GENERATORS

        names = ("generator", "generator_lambda", "generator_scale")
        if own is None:
            for name in names:
                self._refuse_given(name)
            return
        own_name = next(name for name, made in GENERATORS.items() if type(own) is made)
        if self.generator is None:
            self.generator = own_name
        defaults = {"lam": 0.0, "scale": 4.0} | (vars(own) if self.generator == own_name else {})
        for name, parameter, takers in (
            ("generator_lambda", "lam", ("ba", "sba")),
            ("generator_scale", "scale", ("sba",)),
        ):
            given = getattr(self, name)
            if given is not None and self.generator not in takers:
                raise TokenRatioError(f"generator {self.generator!r} takes no {name}")
            if given is None and self.generator in takers:
                setattr(self, name, defaults[parameter])
        self.bregman_generator  # noqa: B018 - a bad one is refused now, not at the first step

    def _refuse_given(self, name: str) -> None:
        if getattr(self, name) is not None:
            raise TokenRatioError(
                f"loss {self.loss!r} takes no {name}; `tokenratio methods` lists what each takes"
            )

    @property
    def method(self) -> "Method":
        """What `loss` names; for tbpo the point of the space that the settings choose."""
        from tokenratio.losses import METHODS

        method = METHODS[self.loss]
        if self.loss == "tbpo":
            return replace(
                cast("RatioMatching", method),
                state_weight=self.state_weight,
                aggregation=self.aggregation,
            )
        return method

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The arguments of the method's `per_pair` and `per_step`."""
        settings = {name: getattr(self, name) for name in self.method.settings}
        if "generator" in settings:
            settings["generator"] = self.bregman_generator
        return settings

    @property
    def bregman_generator(self) -> "BregmanGenerator":
        """The generator that `generator`, `generator_lambda` and `generator_scale` name.

        Raises:
            TokenRatioError: the loss takes none, or there is no such generator.
        """
        if self.generator is None:
            raise TokenRatioError(f"loss {self.loss!r} takes no generator")
        from tokenratio.bregman import make_generator

        given = {"lam": self.generator_lambda, "scale": self.generator_scale}
        params = {name: value for name, value in given.items() if value is not None}
        try:
            return make_generator(self.generator, **params)
        except ValueError as error:
            raise TokenRatioError(str(error)) from None
