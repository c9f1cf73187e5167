"""Where the gradient of the trainer's loss goes, against autograd on whole logits."""

import copy

import pytest
import torch

from loss_oracles import ORACLES, logistic, per_response, per_token, sba
from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.bregman import ScaledBasu
from tokenratio.losses import METHODS

BETA = 0.3
ANCHOR = 0.4
LAYOUTS = ("evaluation", "never", "always")
# Settings by the name of the case; the oracle is the loss's own unless one is named here.
CASES = {
    **{
        f"{loss}, {generator}": {"loss": loss, "generator": generator}
        for loss in ("tbpo_a", "tbpo_q", "tbpo", "bpo", "bpo_a")
        for generator in ("logistic", "sba")
    },
    **{loss: {"loss": loss} for loss in ("dpo", "adpo", "tdpo1", "tdpo2", "ipo", "robust_dpo")},
    "simpo": {"loss": "simpo", "simpo_gamma": 0.6},
    # Under its own generator the divergence is the same both ways.
    "arc_bpo": {"loss": "arc_bpo", "arc_chunk_length": 3, "generator_lambda": 0.5},
    "tbpo, kl, sum": {"loss": "tbpo", "state_weight": "kl", "aggregation": "sum"},
    "tbpo, baseline, sum": {"loss": "tbpo", "state_weight": "baseline", "aggregation": "sum"},
    "tbpo, baseline, sequence": {
        "loss": "tbpo",
        "state_weight": "baseline",
        "aggregation": "sequence",
    },
    "smoothed tbpo_a": {"loss": "tbpo_a", "label_smoothing": 0.2},
    "smoothed adpo": {"loss": "adpo", "label_smoothing": 0.2},
    "smoothed tdpo2": {"loss": "tdpo2", "label_smoothing": 0.2, "tdpo_alpha": 0.8},
    "anchored tbpo_a": {"loss": "tbpo_a", "sft_weight": ANCHOR},
    "anchored tbpo_q": {"loss": "tbpo_q", "sft_weight": ANCHOR},
    "anchored dpo": {"loss": "dpo", "sft_weight": ANCHOR},
    "anchored simpo": {"loss": "simpo", "sft_weight": ANCHOR},
}


def sequence_with_baseline(w, l, weight, *, beta, label_smoothing, ell):  # noqa: E741
    plain = per_response(False, lambda u: u)(w, l, None, beta=beta, label_smoothing=0.0)
    u = plain + beta * weight.sum()
    return (1 - label_smoothing) * ell(u) + label_smoothing * ell(-u)


SPACE = {
    "tbpo, kl, sum": per_token("kl", False),
    "tbpo, baseline, sum": per_token("baseline", False),
    "tbpo, baseline, sequence": sequence_with_baseline,
}


def make_trainer(folder, layout, **settings):
    """GPT-2 in float64 throughout; Llama's norms round to float32 on the way."""
    args = TokenRatioConfig(
        output_dir=str(folder),
        use_cpu=True,
        baseline_hidden_size=8,
        beta=BETA,
        share_prompt="always" if layout == "always" else "never",
        **settings,
    )
    trainer = TokenRatioTrainer(
        tiny_model("gpt2").double(),
        ref_model=tiny_model("gpt2", seed=1).double() if args.method.has_reference else None,
        args=args,
        train_dataset=word_pairs(6),
        processing_class=tiny_tokenizer(),
    )
    if trainer.baseline is not None:
        trainer.baseline.double()
        for parameter in trainer.baseline.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer


def tokens_of(row, side, policy, reference):
    """What the oracles read of each token, and the policy's hidden states, from whole logits."""
    prompt, response = row["prompt_ids"], row[f"{side}_ids"]
    ids = torch.tensor([prompt + response])
    states = slice(len(prompt) - 1, -1)
    log_p = policy(input_ids=ids).logits[0, states].log_softmax(-1)
    with torch.no_grad():
        hidden = policy.base_model(input_ids=ids).last_hidden_state[0, states]
        log_q = torch.zeros_like(log_p)
        if reference is not None:
            log_q = reference(input_ids=ids).logits[0, states].log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    tokens = [
        {"p": log_p[t, token], "q": log_q[t, token], "kl": kl[t]}
        for t, token in enumerate(response)
    ]
    return tokens, hidden


def expected_loss(case, trainer, policy, rows):
    """The mean over rows of the oracle's loss of each, and of the anchor."""
    args, total = trainer.args, torch.zeros((), dtype=torch.float64)
    settings = {**args.loss_settings}
    if settings.pop("generator", None) is not None:
        lam = args.generator_lambda
        settings["ell"] = logistic if args.generator == "logistic" else sba(lam)
        if args.loss == "arc_bpo":
            del settings["ell"]
            settings |= {"h": ScaledBasu(lam).h, "h_prime": ScaledBasu(lam).h_prime}
    reference = trainer.reference and trainer.reference.model
    for row in rows:
        (w, of_w), (l, of_l) = (  # noqa: E741
            tokens_of(row, side, policy, reference) for side in ("chosen", "rejected")
        )
        weight = None
        if trainer.baseline is not None:
            longest = max(len(w), len(l))
            of_sides = (trainer.baseline.layers(hidden).squeeze(-1) for hidden in (of_w, of_l))
            b_w, b_l = (torch.nn.functional.pad(b, (0, longest - len(b))) for b in of_sides)
            weight = b_l - b_w
        total = total + SPACE.get(case, ORACLES[args.loss])(w, l, weight, **settings)
        anchor = sum(token["p"] for token in w) / len(w)
        total = total - args.sft_weight * anchor
    return total / len(rows)


def layouts(settings):
    """Whole responses in rows of their own; cut to what the loss sees; with the prompt shared."""
    is_local = METHODS[settings["loss"]].is_local and settings.get("aggregation") != "sequence"
    return LAYOUTS if is_local and "sft_weight" not in settings else LAYOUTS[:2]


@pytest.mark.parametrize(
    ("case", "layout"), [(case, layout) for case in CASES for layout in layouts(CASES[case])]
)
def test_gradient_of_every_parameter(case, layout, tmp_path):
    """The KL is differentiated through, the state baseline sees a detached hidden state."""
    trainer = make_trainer(tmp_path, layout, **CASES[case])
    policy = copy.deepcopy(trainer.model)
    rows = list(trainer.train_dataset)
    trainer.model.eval()
    if layout == "evaluation":
        batch = trainer.data_collator(rows)
    else:
        (batch,) = trainer.get_train_dataloader()
        assert ("branch" in batch) == (layout == "always")
        assert ("lengths" in batch) == ("always" in layouts(CASES[case]))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = {name: p.grad for name, p in trainer.model.named_parameters()}
    if trainer.baseline is not None:
        ours |= {f"b.{name}": p.grad.clone() for name, p in trainer.baseline.named_parameters()}
        trainer.baseline.zero_grad()

    expected = expected_loss(case, trainer, policy, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    expected.backward()
    theirs = {name: p.grad for name, p in policy.named_parameters()}
    if trainer.baseline is not None:
        theirs |= {f"b.{name}": p.grad for name, p in trainer.baseline.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_every_method_without_scores_has_a_case():
    """Those that need a contrast take rows that have it, and are tested with them."""
    scored = {name for name, method in METHODS.items() if "contrast" in method.needs}
    assert {settings["loss"] for settings in CASES.values()} == set(METHODS) - scored - {"sft"}
