"""The steps that ours is compared with, each as its own code does it.

The same models, the same rows; β = 0.1; no gradient checkpointing, no dropout, no autocast in any
case. Rows are `[all chosen, all rejected]`, padded on the right.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models import Models
from step_case import Step, UnavailableError

BETA = 0.1


def padded_rows(rows: list[dict]) -> dict[str, Tensor]:
    """Two rows per pair: ids, attention mask, and completion mask (1 on response tokens)."""
    ids, attention, completion = [], [], []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            prompt, response = len(row["prompt_ids"]), len(row[side])
            ids.append(torch.tensor(row["prompt_ids"] + row[side]))
            attention.append(torch.ones(prompt + response, dtype=torch.long))
            completion.append(torch.tensor([0] * prompt + [1] * response))
    names = ("input_ids", "attention_mask", "completion_mask")
    columns = (ids, attention, completion)
    return {n: pad_sequence(c, batch_first=True) for n, c in zip(names, columns, strict=True)}


def body(models: Models) -> Step:
    """The floor: forward and backward of the backbones, no output head, no loss."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            models.reference.base_model(**inputs)
        return models.inner.base_model(**inputs).last_hidden_state.sum()

    return Step(padded_rows, loss)


def straightforward_tbpo_a(models: Models) -> Step:
    """TBPO-A as the formulas are written down: whole float32 logits of both models, autograd."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ref_logits = models.reference(**inputs).logits[:, :-1].float()
            ref_log_probs = ref_logits.log_softmax(-1)
        log_probs = models.policy(**inputs).logits[:, :-1].float().log_softmax(-1)
        labels = batch["input_ids"][:, 1:, None]
        log_ratio = (log_probs.gather(-1, labels) - ref_log_probs.gather(-1, labels)).squeeze(-1)
        kl = (ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(-1)
        # Both rows of a pair have the same prompt, so equal indices are equal steps.
        chosen_mask, rejected_mask = batch["completion_mask"][:, 1:].bool().chunk(2)
        mask = chosen_mask & rejected_mask
        chosen_ratio, rejected_ratio = log_ratio.chunk(2)
        chosen_kl, rejected_kl = kl.chunk(2)
        u = BETA * (rejected_ratio - chosen_ratio + rejected_kl - chosen_kl)
        u = u.masked_fill(~mask, 0.0)
        per_token = (u.exp() + u) / 4 * mask  # SBA, λ = 0, s = 4
        return (per_token.sum(-1) / mask.sum(-1)).mean()

    return Step(padded_rows, loss)


def trl_dpo(models: Models) -> Step:
    """TRL's `DPOTrainer.compute_loss` as installed.

    Its chunked head scores every position, prompt and padding included, where the device has no
    Triton, and response positions only where it has (`trl.trainer.utils.add_fused_lm_head`).
    """
    trainer = _trl_trainer(models)

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        return trainer.compute_loss(models.policy, inputs)

    return Step(trainer.data_collator, loss)


def trl_dpo_completions(models: Models) -> Step:
    """The same with response positions only, as TRL does on CUDA: the fair peer on a CPU.

    TRL decides by one function, looked up in `trl.trainer.utils` for this choice alone; the tiles
    themselves are still computed in torch, which `trl.kernels.chunked_logprob` decides for itself.
    """
    if next(models.policy.parameters()).is_cuda:
        raise UnavailableError("on CUDA trl_dpo already scores response positions only")
    installed = trl_dpo(models)

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        with completions_only():
            return installed.loss(inputs)

    return Step(installed.collate, loss)


@contextmanager
def completions_only() -> Iterator[None]:
    """Inside, TRL's head scores response positions only, as it does where Triton runs."""
    import trl.trainer.utils

    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise UnavailableError("this version of trl chooses its positions in another way")
    with patch.object(trl.trainer.utils, "_use_triton", lambda device: True):
        yield


def _trl_trainer(models: Models) -> Any:
    try:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise UnavailableError(f"trl is not installed ({error})") from None
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "word": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    args = DPOConfig(
        output_dir=tempfile.gettempdir(),  # created by the constructor; nothing is written
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        report_to="none",
        use_cpu=not next(models.policy.parameters()).is_cuda,
    )
    # The constructor insists on a data set; the step's batches come from its collator.
    row = {"prompt": ["word"], "chosen": ["word"], "rejected": ["word"]}
    return DPOTrainer(
        model=models.policy,
        ref_model=models.reference,
        args=args,
        train_dataset=Dataset.from_dict(row),
        processing_class=tokenizer,
    )


def liger_dpo(models: Models) -> Step:
    """Liger's chunked linear DPO loss on the response states of both bodies.

    It takes every position it is given to the head, so it is given responses only, aligned on
    their first token: the best it can be given. One pair per chunk and compiled, its defaults; on
    CPU that needs a C++ compiler. Compiling falls before the first measured step.
    """
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise UnavailableError(f"liger-kernel is not installed ({error})") from None
    dpo = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False)

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        sides = [
            (row["prompt_ids"], row[k]) for k in ("chosen_ids", "rejected_ids") for row in rows
        ]
        batch = padded_rows(rows)
        targets = pad_sequence(
            [torch.tensor(response) for _, response in sides], batch_first=True, padding_value=-100
        )
        first = torch.tensor([len(prompt) - 1 for prompt, _ in sides])
        steps = first[:, None] + torch.arange(targets.shape[1])
        return batch | {
            "targets": targets,
            "steps": steps.clamp(max=batch["input_ids"].shape[1] - 1),
        }

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        index = batch["steps"][:, :, None]

        def states(hidden: Tensor) -> Tensor:
            return hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))

        with torch.no_grad():
            ref_hidden = states(models.reference.base_model(**inputs).last_hidden_state)
        hidden = states(models.inner.base_model(**inputs).last_hidden_state)
        head, ref_head = models.inner.lm_head.weight, models.reference.lm_head.weight
        value, *_ = dpo(head, hidden, batch["targets"], ref_input=ref_hidden, ref_weight=ref_head)
        return value

    return Step(collate, loss)
