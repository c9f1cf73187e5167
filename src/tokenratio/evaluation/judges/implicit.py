"""The reward that a policy implies: β times its log-ratio to the reference."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenratio.data.chat import Prompt, answered, render
from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.encoding import Limits, assemble, special_tokens, tokenise
from tokenratio.data.template import TemplateSettings, turn_end
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.bradley_terry import (
    batches_by_length,
    bradley_terry,
    weights_digest,
)
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict
from tokenratio.models.generation import encode_prompts, eval_mode
from tokenratio.models.response import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    EncodedResponse = tuple[tuple[int, ...], tuple[int, ...]]


class ImplicitRewardJudge:
    """σ(r_a − r_b) with r = β Σ_t log π(y_t|s_t) / π_ref(y_t|s_t), DPO's implicit reward.

    Both models run through `token_request`, so no logits are held. The judge leaves them taught
    that argument (`answer_token_requests`) and otherwise as they were.

    Args:
        model: the policy, an adapter around it or not.
        ref_model: None for the policy with its adapter off.
        beta: the β it was trained with.
        name: for digests; the model's own name or folder if None.
        batch_size: rows in one forward pass.
        max_length: tokens of prompt and response; responses are cut on the right, as in training.
        max_prompt_length: of the prompt, cut on the left, likewise.
        template: what the chat template was told in training besides the messages.

    Raises:
        TokenRatioError: no reference, or a model that the log-probabilities would be wrong for.
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

        from tokenratio.models.loading import check_model
        from tokenratio.models.token_requests import language_model

        if ref_model is None and not isinstance(model, PeftModel):
            raise TokenRatioError(
                "the implicit reward needs a reference: give ref_model, or a policy with an adapter"
            )
        if not beta > 0:
            raise TokenRatioError(f"beta must be positive, not {beta}")
        if batch_size < 1:
            raise TokenRatioError(f"batch_size must be at least 1, not {batch_size}")
        for each in (model, ref_model):
            if each is not None:
                check_model(each)
        self._model, self._ref_model, self._tokenizer = model, ref_model, tokenizer
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
        """β times the log-ratio of each response, in nats; in words, why a response has none.

        Token ids are taken as they are where they spell the text; else the text is tokenised as for
        training, with its end.
        """
        rewards: list[float | str] = []
        rows: dict[int, EncodedResponse] = {}
        for index, (prompt, response) in enumerate(responses):
            try:
                rows[index] = self._encode(prompt, response)
                rewards.append("not scored")
            except RowDefectError as error:
                rewards.append(str(error))
        indices = list(rows)
        lengths = [len(prompt) + len(answer) for prompt, answer in rows.values()]
        for batch in batches_by_length(lengths, self._batch_size):
            picked = [indices[index] for index in batch]
            if self._positions is not None and lengths[batch[0]] > self._positions:
                for index in [i for i in batch if lengths[i] > self._positions]:
                    rewards[indices[index]] = (
                        f"{lengths[index]} tokens, the model has {self._positions} positions"
                    )
                picked = [indices[i] for i in batch if lengths[i] <= self._positions]
            if picked:
                for index, value in zip(picked, self._log_ratios(rows, picked), strict=True):
                    rewards[index] = self._beta * value
        return rewards

    def _encode(self, prompt: Prompt, response: Response) -> "EncodedResponse":
        if response.token_ids and self._spells(response.token_ids, response.text):
            (prompt_ids,) = encode_prompts(
                self._tokenizer,
                [prompt],
                template=self._template,
                max_prompt_length=self._limits.max_prompt_length,
            )
            longest = self._limits.max_length
            room = None if longest is None else max(0, longest - len(prompt_ids))
            if room == 0:
                raise RowDefectError(
                    DefectKind.PROMPT_FILLS_MAX_LENGTH,
                    f"the prompt has {len(prompt_ids)} tokens, max_length is {longest}",
                )
            return prompt_ids, response.token_ids[:room]
        example = answered(prompt, response.text)
        rendered = render(example, self._tokenizer, self._template, self._turn_end)
        (ids,) = tokenise(self._tokenizer, [rendered], self._special)
        encoded = assemble(ids, ("the response",), self._special, self._limits)
        return tuple(encoded.prompt_ids.tolist()), tuple(encoded.response_ids[0].tolist())

    def _spells(self, ids: tuple[int, ...], text: str) -> bool:
        """Whether the ids are this tokenizer's, as far as that can be told."""
        if max(ids) >= len(self._tokenizer):
            return False
        return self._tokenizer.decode(ids, skip_special_tokens=True) == text

    @torch.no_grad()
    def _log_ratios(self, rows: "dict[int, EncodedResponse]", picked: list[int]) -> list[float]:
        prompts, answers = zip(*(rows[index] for index in picked), strict=True)
        with eval_mode(self._model):
            policy = self._log_probs(self._model, prompts, answers)
            if self._ref_model is None:
                with self._model.disable_adapter():
                    reference = self._log_probs(self._model, prompts, answers)
        if self._ref_model is not None:
            with eval_mode(self._ref_model):
                reference = self._log_probs(self._ref_model, prompts, answers)
        log_ratio = policy.cpu().double() - reference.cpu().double()
        return [part.sum().item() for part in log_ratio.split([len(ids) for ids in answers])]

    def _log_probs(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Tensor:
        from tokenratio.models.token_requests import TokenRequest

        device = next(model.parameters()).device
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        states = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = torch.tensor([*prompt, *answer])
            attention_mask[row, :end] = 1
            states[row, len(prompt) - 1 : end - 1] = True
        labels = torch.tensor([token for answer in answers for token in answer])
        request = TokenRequest(states.to(device), labels.to(device))
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        return model(**inputs, token_request=request)["log_probs"]
