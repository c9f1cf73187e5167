"""A method's settings: published defaults, what is refused, and the way back from a run's file."""

import dataclasses
import math

import pytest

from tokenratio import TokenRatioConfig
from tokenratio.bregman import Basu, Kliep, Logistic, Lsif, ScaledBasu
from tokenratio.errors import TokenRatioError
from tokenratio.losses import METHODS
from tokenratio.training.method_settings import MethodSettings

# Typed out from the papers (docs/methods.md names them), not read from the table under test.
SBA = {"generator": "sba", "generator_lambda": 0.0, "generator_scale": 4.0}
SMOOTHED = {"beta": 0.1, "label_smoothing": 0.0}
PUBLISHED = {
    "tbpo_a": SMOOTHED | SBA,
    "tbpo_q": SMOOTHED | SBA,
    "tbpo": SMOOTHED | SBA | {"state_weight": "none", "aggregation": "mean"},
    "adpo": SMOOTHED,
    "dpo": SMOOTHED,
    "robust_dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "bpo": SMOOTHED | SBA | {"generator_lambda": -0.5},
    "bpo_a": SMOOTHED | SBA | {"generator_lambda": -0.5},
    "tdpo1": SMOOTHED,
    "tdpo2": SMOOTHED | {"tdpo_alpha": 0.5},
    "ipo": SMOOTHED,
    "simpo": {"beta": 2.0, "label_smoothing": 0.0, "simpo_gamma": 1.0},
    "tis_dpo": SMOOTHED | {"tis_lower": -0.5, "tis_upper": 1.5},
    "sepo": {"beta": 2.5, "label_smoothing": 0.0, "sepo_share": 0.3},
    "t_reg": SMOOTHED | {"t_reg_weight": 0.25},
    "arc_bpo": {"beta": 0.1, "arc_chunk_length": 16, "arc_target_margin": 2.0}
    | SBA
    | {"generator_lambda": 1.0},
    "sft": {},
}
# A value each setting may have, other than any default.
OTHER = {
    "beta": 0.37,
    "label_smoothing": 0.05,
    "generator": "kliep",
    "generator_lambda": 0.25,
    "generator_scale": 2.0,
    "state_weight": "kl",
    "aggregation": "sum",
    "simpo_gamma": 0.5,
    "tdpo_alpha": 1.0,
    "tis_lower": -1.0,
    "tis_upper": 2.0,
    "sepo_share": 0.4,
    "t_reg_weight": 0.5,
    "arc_chunk_length": 4,
    "arc_target_margin": 2.5,
}
each_method = pytest.mark.parametrize("loss", METHODS)


FIELDS = {field.name for field in dataclasses.fields(MethodSettings)}


def make(tmp_path, **settings):
    return TokenRatioConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def own(args):
    """The method's settings that are not None."""
    return {name: getattr(args, name) for name in OTHER if getattr(args, name) is not None}


def test_every_method_and_setting_is_typed_out():
    assert set(PUBLISHED) == set(METHODS)
    assert {*OTHER, "loss", "sft_weight", "token_scores"} == FIELDS


@each_method
def test_published_defaults(loss, tmp_path):
    args = make(tmp_path, loss=loss)
    assert own(args) == PUBLISHED[loss]
    assert (args.sft_weight, args.token_scores) == (0.0, None)


def test_the_default_is_tbpo_a(tmp_path):
    args = make(tmp_path)
    assert args.loss == "tbpo_a"
    assert args.method is METHODS["tbpo_a"]
    assert args.bregman_generator == ScaledBasu(0.0, 4.0)


@each_method
def test_the_loss_gets_exactly_its_settings(loss, tmp_path):
    args = make(tmp_path, loss=loss)
    assert args.loss_settings == dict(args.method.settings)
    given = {name: OTHER[name] for name in PUBLISHED[loss] if name not in SBA}
    for changed in ("state_weight", "aggregation"):
        given.pop(changed, None)
    if "generator" in PUBLISHED[loss]:
        given["generator"] = "lsif"
    args = make(tmp_path, loss=loss, **given)
    expected = given | ({"generator": Lsif()} if "generator" in given else {})
    assert args.loss_settings == expected


@each_method
def test_a_setting_is_taken_where_it_is_one_and_refused_elsewhere(loss, tmp_path):
    for name, value in OTHER.items():
        settings = {"loss": loss, name: value}
        if name in PUBLISHED[loss]:
            assert getattr(make(tmp_path, **settings), name) == value, name
        else:
            with pytest.raises(TokenRatioError, match=f"{loss}.*takes no {name}"):
                make(tmp_path, **settings)


def fields_of(args):
    """The method's part of a resolved config."""
    return {name: getattr(args, name) for name in FIELDS}


@each_method
def test_resolved_settings_resolve_to_themselves(loss, tmp_path):
    args = make(tmp_path, loss=loss, **({"sft_weight": 0.2} if loss != "sft" else {}))
    again = make(tmp_path, **fields_of(args))
    assert fields_of(again) == fields_of(args)
    assert again.method == args.method
    assert again.loss_settings == args.loss_settings


@each_method
def test_a_whole_resolved_config_can_be_made_again(loss, tmp_path):
    args = make(tmp_path, loss=loss)
    fields = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init
    }
    again = TokenRatioConfig(**fields)
    assert again.to_dict() == args.to_dict()
    assert again.loss_settings == args.loss_settings


@pytest.mark.parametrize("loss", [name for name in METHODS if "generator" in PUBLISHED[name]])
def test_generators(loss, tmp_path):
    """λ and s default to the method's own under its own generator, else to 0 and 4."""
    own_lambda = PUBLISHED[loss]["generator_lambda"]
    for settings, expected in (
        ({}, ScaledBasu(own_lambda)),
        ({"generator": "sba"}, ScaledBasu(own_lambda)),
        ({"generator": "sba", "generator_scale": 2.0}, ScaledBasu(own_lambda, 2.0)),
        ({"generator_lambda": 0.5}, ScaledBasu(0.5)),
        ({"generator": "ba"}, Basu(0.0)),
        ({"generator": "ba", "generator_lambda": 0.5}, Basu(0.5)),
        ({"generator": "logistic"}, Logistic()),
        ({"generator": "kliep"}, Kliep()),
        ({"generator": "lsif"}, Lsif()),
    ):
        args = make(tmp_path, loss=loss, **settings)
        assert args.bregman_generator == args.loss_settings["generator"] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator": "tsallis"}, "tsallis"),
        ({"generator": "kliep", "generator_lambda": 0.5}, "takes no generator_lambda"),
        ({"generator": "ba", "generator_scale": 2.0}, "takes no generator_scale"),
        ({"generator_lambda": -1.0}, "lambda"),
        ({"generator_lambda": math.nan}, "lambda"),
        ({"generator_scale": 0.0}, "scale"),
    ],
)
def test_generators_refused(settings, message, tmp_path):
    with pytest.raises(TokenRatioError, match=message):
        make(tmp_path, **settings)


def test_a_method_with_a_generator_of_its_own_says_so(tmp_path):
    with pytest.raises(TokenRatioError, match="takes no generator"):
        make(tmp_path, loss="dpo").bregman_generator  # noqa: B018


NAN, INF = math.nan, math.inf
DOMAINS = {  # loss, then values at and beyond each end
    "beta": ("dpo", (1e-6, 50.0), (0.0, -0.1, INF, NAN)),
    "label_smoothing": ("tbpo_a", (0.0, 0.49), (0.5, -0.01, 1.0, NAN)),
    "simpo_gamma": ("simpo", (0.0, 5.0), (-0.1, INF, NAN)),
    "tdpo_alpha": ("tdpo2", (0.0, 5.0), (-0.1, INF, NAN)),
    "tis_lower": ("tis_dpo", (-9.0, 1.5), (1.6, -INF, NAN)),
    "tis_upper": ("tis_dpo", (-0.5, 9.0), (-0.6, INF, NAN)),
    "sepo_share": ("sepo", (0.01, 1.0), (0.0, -0.3, 1.01, NAN)),
    "t_reg_weight": ("t_reg", (0.0, 5.0), (-0.1, INF, NAN)),
    "arc_chunk_length": ("arc_bpo", (1, 10**6), (0, -4, NAN, INF, 2.5)),
    "arc_target_margin": ("arc_bpo", (1e-6, 9.0), (0.0, -2.0, INF, NAN)),
    "sft_weight": ("tbpo_a", (0.0, 5.0), (-0.1, INF, NAN)),
    "state_weight": ("tbpo", ("none", "kl", "baseline"), ("value", "")),
    "aggregation": ("tbpo", ("mean", "sum", "sequence"), ("max", "")),
}


def test_every_setting_has_its_domain_tested():
    others = {"generator", "generator_lambda", "generator_scale", "loss", "token_scores"}
    assert set(DOMAINS) == FIELDS - others


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in DOMAINS for value in DOMAINS[name][1]]
)
def test_the_ends_of_the_domains_are_taken(name, value, tmp_path):
    assert getattr(make(tmp_path, loss=DOMAINS[name][0], **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in DOMAINS for value in DOMAINS[name][2]]
)
def test_what_lies_outside_is_refused(name, value, tmp_path):
    # A clamp above the other is named by the lower one.
    named = "tis_lower" if value == -0.6 else name
    with pytest.raises(TokenRatioError, match=named):
        make(tmp_path, loss=DOMAINS[name][0], **{name: value})


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("ppo", "the loss ppo is not available; `tokenratio methods`"),
        ("tbpo-a", "did you mean 'tbpo_a'"),
        ("sigmoid", "it is called dpo here"),
        ("wibble", "unknown loss 'wibble'; `tokenratio methods` lists"),
        (3, "unknown loss 3"),
    ],
)
def test_an_unknown_method_is_refused(loss, expected, tmp_path):
    with pytest.raises(TokenRatioError, match=expected):
        make(tmp_path, loss=loss)


def test_cross_entropy_is_not_anchored_on_itself(tmp_path):
    with pytest.raises(TokenRatioError, match="sft_weight"):
        make(tmp_path, loss="sft", sft_weight=0.1)


@pytest.mark.parametrize("state_weight", ["none", "kl", "baseline"])
@pytest.mark.parametrize("aggregation", ["mean", "sum", "sequence"])
def test_tbpo_is_the_whole_space(state_weight, aggregation, tmp_path):
    args = make(tmp_path, loss="tbpo", state_weight=state_weight, aggregation=aggregation)
    assert (args.method.state_weight, args.method.aggregation) == (state_weight, aggregation)
    needs = {"none": set(), "kl": {"kl_ref_policy"}, "baseline": {"baseline"}}[state_weight]
    assert args.method.needs == {"ref_log_probs"} | needs
    assert args.compares_steps == args.method.is_local == (aggregation != "sequence")
    assert METHODS["tbpo"].state_weight == "none"  # the table is as it was


def test_the_anchor_looks_at_whole_responses(tmp_path):
    assert make(tmp_path, loss="tbpo_a").compares_steps
    assert not make(tmp_path, loss="tbpo_a", sft_weight=0.1).compares_steps
    with pytest.raises(TokenRatioError, match=r"share_prompt.*sft_weight"):
        make(tmp_path, loss="tbpo_a", sft_weight=0.1, share_prompt="always")


@each_method
def test_what_is_kept_of_the_reference(loss, tmp_path):
    """Nothing without one; log-probabilities for a loss without KL; hidden states step by step."""
    method = METHODS[loss]
    keeps_hidden = "kl_ref_policy" in method.needs and method.is_local
    if not method.has_reference or ("kl_ref_policy" in method.needs and not keeps_hidden):
        with pytest.raises(TokenRatioError, match="cache_reference"):
            make(tmp_path, loss=loss, cache_reference=True)
    else:
        args = make(tmp_path, loss=loss, cache_reference=True)
        assert args.keeps_log_probs == (not keeps_hidden)


def test_a_baseline_and_fp16_do_not_go_together(tmp_path):
    for settings in ({"loss": "tbpo_q"}, {"loss": "tbpo", "state_weight": "baseline"}):
        with pytest.raises(TokenRatioError, match="fp16"):
            make(tmp_path, fp16=True, **settings)


def test_every_setting_is_documented():
    for field in dataclasses.fields(MethodSettings):
        assert field.metadata["help"].endswith("."), field.name
