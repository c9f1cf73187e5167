"""The reward that a policy implies: β times its log-ratio to the reference."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenratio.data.chat import Prompt, answered, render
from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.encoding import Limits, assemble, special_tokens, tokenise
from tokenratio.data.template import TemplateSettings, turn_end
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.bradley_terry import bradley_terry, weights_digest
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict
from tokenratio.models.generation import encode_prompts
from tokenratio.models.loading import check_model
from tokenratio.models.packing import model_inputs
from tokenratio.models.response import Response
from tokenratio.models.token_requests import TokenRequest, language_model
from tokenratio.models.token_rows import TokenRow, score_rows
from tokenratio.names import require_at_least
from tokenratio.types import CompletionBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ImplicitRewardJudge:
    """σ(r_a − r_b) with r = β Σ_t log π(y_t|s_t) / π_ref(y_t|s_t), DPO's implicit reward.

    Both models accept `token_request` afterwards (`answer_token_requests`), so that no logits are
    stored; nothing else about them changes.

    Args:
        model: the policy, with or without an adapter.
        ref_model: None for the policy with its adapter off.
        beta: the β it was trained with.
        name: for digests; default: the model's own name or folder.
        batch_size: rows in one forward pass.
        max_length: tokens of prompt and response; responses are cut on the right, as in training.
        max_prompt_length: tokens of the prompt, cut on the left, as in training.
        template: the arguments that the chat template had in training.
    Raises:
        TokenRatioError: no reference, or a model whose log-probabilities would be wrong.
    """

    order_matters = False

    def __init__(
        self,
        model: "PreTrainedModel | Any",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        ref_model: "PreTrainedModel | Any | None" = None,
        beta: float,
        name: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        template: TemplateSettings | None = None,
    ) -> None:
        from peft import PeftModel

        if ref_model is None and not isinstance(model, PeftModel):
            raise TokenRatioError(
                "the implicit reward needs a reference: give ref_model, or a policy with an adapter"
            )
        if not beta > 0:
            raise TokenRatioError(f"beta must be positive, not {beta}")
        require_at_least(1, batch_size=batch_size)
        for each in (model, ref_model):
            if each is not None:
                check_model(each)
        self._model: Any = model
        self._ref_model, self._tokenizer = ref_model, tokenizer
        self._beta, self._batch_size = beta, batch_size
        config = language_model(model).config
        self._name = str(name or config.name_or_path)
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._special = special_tokens(tokenizer)
        self._template = template or TemplateSettings()
        self._turn_end = turn_end(tokenizer, self._template)
        self._limits = Limits(max_length, max_prompt_length)
        self._limits.check(self._special)

    def identity(self) -> dict[str, Any]:
        reference = None if self._ref_model is None else weights_digest(self._ref_model)
        return {
            "judge": "implicit",
            "model": self._name,
            "weights": weights_digest(self._model),
            "reference": reference or "adapter off",
            "beta": self._beta,
            "max_length": self._limits.max_length,
            "max_prompt_length": self._limits.max_prompt_length,
            **self._template.record(self._tokenizer),
        }

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterator[Verdict]:
        return bradley_terry(comparisons, self.rewards, at_once=8 * self._batch_size)

    def rewards(self, responses: Sequence[tuple[Prompt, Response]]) -> list[float | str]:
        """β times each response's log-ratio, in nats, or why there is none.

        Token ids are used as they are if they decode to the text; otherwise the text is tokenised
        as for training, end included.
        """
        rewards: list[float | str] = [""] * len(responses)
        rows: dict[int, TokenRow] = {}
        for index, (prompt, response) in enumerate(responses):
            try:
                row = self._encode(prompt, response)
            except RowDefectError as error:
                rewards[index] = str(error)
                continue
            if self._positions is not None and row.num_tokens > self._positions:
                rewards[index] = (
                    f"{row.num_tokens} tokens, the model has {self._positions} positions"
                )
            else:
                rows[index] = row
        if rows:
            models = [each for each in (self._model, self._ref_model) if each is not None]
            log_ratios = score_rows(
                models,
                list(rows.values()),
                self._log_ratios,
                batch_size=self._batch_size,
                longest_first=True,
            )
            for index, log_ratio in zip(rows, log_ratios, strict=True):
                rewards[index] = self._beta * log_ratio
        return rewards

    def _encode(self, prompt: Prompt, response: Response) -> TokenRow:
        if response.token_ids and self._spells(response.token_ids, response.text):
            (prompt_ids,) = encode_prompts(
                self._tokenizer,
                [prompt],
                template=self._template,
                max_prompt_length=self._limits.max_prompt_length,
            )
            longest = self._limits.max_length
            left = None if longest is None else max(0, longest - len(prompt_ids))
            if left == 0:
                raise RowDefectError(
                    DefectKind.PROMPT_FILLS_MAX_LENGTH,
                    f"the prompt has {len(prompt_ids)} tokens, max_length is {longest}",
                )
            return TokenRow(prompt_ids, response.token_ids[:left])
        example = answered(prompt, response.text)
        rendered = render(example, self._tokenizer, self._template, self._turn_end)
        (ids,) = tokenise(self._tokenizer, [rendered], self._special)
        encoded = assemble(ids, ("the response",), self._special, self._limits)
        return TokenRow(tuple(encoded.prompt_ids.tolist()), tuple(encoded.response_ids[0].tolist()))

    def _spells(self, ids: tuple[int, ...], text: str) -> bool:
        """Whether the ids decode to the text with this tokenizer."""
        if max(ids) >= len(self._tokenizer):
            return False
        return self._tokenizer.decode(list(ids), skip_special_tokens=True) == text

    def _log_ratios(self, batch: CompletionBatch) -> list[float]:
        policy = _log_probs(self._model, batch)
        if self._ref_model is None:
            with self._model.disable_adapter():
                reference = _log_probs(self._model, batch)
        else:
            reference = _log_probs(self._ref_model, batch)
        log_ratio = policy.cpu().double() - reference.cpu().double()
        lengths = batch.completion_mask.sum(1).tolist()
        return [part.sum().item() for part in torch.split(log_ratio, lengths)]


def _log_probs(model: nn.Module, batch: CompletionBatch) -> Float[Tensor, "tokens"]:
    request = TokenRequest(batch.states, batch.labels)
    inputs = model_inputs(batch, language_model(model))
    log_probs: Tensor = model(**inputs, token_request=request)["log_probs"]
    return log_probs
