"""Where the gradient of the trainer's loss goes, against autograd on whole logits."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer

BETA = 0.3


@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q", "tbpo", "dpo"])
@pytest.mark.parametrize("generator", ["logistic", "sba"])
@pytest.mark.parametrize("layout", ["evaluation", "never", "always"])
def test_gradient_of_every_parameter(loss, generator, layout, tmp_path):
    """The KL is differentiated through, the state baseline sees a detached hidden state.

    Whole responses in rows of their own; cut to what the loss sees; with the prompt shared. GPT-2
    computes in float64 throughout; Llama's norms round to float32 on the way.
    """
    args = TokenRatioConfig(
        output_dir=str(tmp_path),
        loss=loss,
        beta=BETA,
        generator=generator,
        use_cpu=True,
        baseline_hidden_size=8,
        share_prompt=layout if layout == "always" and loss != "dpo" else "never",
    )
    trainer = TokenRatioTrainer(
        tiny_model("gpt2").double(),
        ref_model=tiny_model("gpt2", seed=1).double(),
        args=args,
        train_dataset=word_pairs(6),
        processing_class=tiny_tokenizer(),
    )
    if trainer.baseline is not None:
        trainer.baseline.double()
        for parameter in trainer.baseline.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    twin = copy.deepcopy(trainer.model)
    reference = trainer.reference.model
    rows = list(trainer.train_dataset)
    trainer.model.eval()
    if layout == "evaluation":
        batch = trainer.data_collator(rows)
    else:
        (batch,) = trainer.get_train_dataloader()
        assert ("branch" in batch) == (layout == "always" and loss != "dpo")
    trainer.compute_loss(trainer.model, batch).backward()
    ours = {name: p.grad for name, p in trainer.model.named_parameters()}
    if trainer.baseline is not None:
        ours |= {f"b.{name}": p.grad.clone() for name, p in trainer.baseline.named_parameters()}
        trainer.baseline.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        rho, state = {}, {}
        for side in ("chosen", "rejected"):
            prompt, response = row["prompt_ids"], row[f"{side}_ids"]
            ids = torch.tensor([prompt + response])
            states = slice(len(prompt) - 1, -1)
            log_p = twin(input_ids=ids).logits[0, states].log_softmax(-1)
            with torch.no_grad():
                log_q = reference(input_ids=ids).logits[0, states].log_softmax(-1)
                hidden = twin.base_model(input_ids=ids).last_hidden_state[0, states]
            index = torch.tensor(response)[:, None]
            rho[side] = (log_p - log_q).gather(-1, index).squeeze(-1)
            state[side] = torch.zeros_like(rho[side])
            if loss == "tbpo_a":
                state[side] = (log_q.exp() * (log_q - log_p)).sum(-1)
            elif loss == "tbpo_q":
                state[side] = trainer.baseline.layers(hidden).squeeze(-1)
        if loss == "dpo":
            total = total + F.softplus(BETA * (rho["rejected"].sum() - rho["chosen"].sum()))
            continue
        length = min(len(rho["chosen"]), len(rho["rejected"]))
        score = {side: (rho[side] + state[side])[:length] for side in rho}
        u = BETA * (score["rejected"] - score["chosen"])
        per_token = F.softplus(u) if generator == "logistic" else (u.exp() + u) / 4
        total = total + per_token.mean()
    (total / len(rows)).backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    if trainer.baseline is not None:
        theirs |= {f"b.{name}": p.grad for name, p in trainer.baseline.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
