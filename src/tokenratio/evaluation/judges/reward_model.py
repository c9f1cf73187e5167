"""A reward model: a sequence classifier with one output, from the hub or a folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from tokenratio.data.chat import Conversation, Prompt, answered, render, render_turns
from tokenratio.data.defects import RowDefectError
from tokenratio.data.encoding import Limits, assemble, special_tokens, tokenise
from tokenratio.data.template import TemplateSettings, turn_end
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.bradley_terry import bradley_terry, weights_digest
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict
from tokenratio.models.response import Response
from tokenratio.models.token_requests import eval_mode
from tokenratio.models.token_rows import run_by_length
from tokenratio.names import require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RewardModelJudge:
    """σ(r_a − r_b), the Bradley–Terry model that reward models are trained with.

    Prompt and response are rendered by the chat template if the tokenizer has one (a text prompt is
    then one user turn), are a pair of sequences if the tokenizer is an encoder's, with [CLS] and
    [SEP], and are otherwise joined to one text that ends with EOS, as in TRL's RewardTrainer. A
    model of `train-reward` gets the tokens that it was trained on.

    Args:
        model: `AutoModelForSequenceClassification` with one label.
        name: for digests; default: the model's own name or folder.
        batch_size: rows in one forward pass.
        max_length: in tokens; a longer row gets no reward, and its comparison no verdict. Default:
            the model's positions.
        as_chat: False ignores the chat template.
        template: arguments of the chat template; a prompt's own values take precedence.
        as_trained: whether `train-reward` made the model.
    Raises:
        TokenRatioError: the model does not have one label.
    """

    order_matters = False

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        name: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        as_chat: bool = True,
        template: TemplateSettings | None = None,
        as_trained: bool = False,
    ) -> None:
        self._name = str(name or model.config.name_or_path)
        if model.config.num_labels != 1:
            raise TokenRatioError(
                f"{self._name} has {model.config.num_labels} outputs; a reward model has one"
            )
        require_at_least(1, batch_size=batch_size)
        self._model, self._tokenizer = model, tokenizer
        self._as_chat = as_chat and tokenizer.chat_template is not None
        self._template, self._as_trained = template or TemplateSettings(), as_trained
        is_encoder = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
        self._as_pair = is_encoder and not self._as_chat
        self._pad_id = model.config.get_text_config().pad_token_id
        # A model without a padding token takes the last token of a row as its end.
        self._batch_size = 1 if self._pad_id is None else batch_size
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._max_length = max_length or positions

    @classmethod
    def load(
        cls,
        name: str | Path,
        init_kwargs: dict[str, Any] | None = None,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        **options: Any,
    ) -> "RewardModelJudge":
        """Load one by name, in float32 unless `init_kwargs` has another dtype.

        Args:
            init_kwargs: for `from_pretrained`.
            tokenizer: default: the one saved with the model.
            options: of the judge.
        Raises:
            TokenRatioError: it cannot be loaded, or lacks weights, such as those of its head.
        """
        from transformers import AutoModelForSequenceClassification

        from tokenratio.models.gguf import is_gguf
        from tokenratio.models.loading import load_tokenizer
        from tokenratio.models.pretrained_arguments import loading_arguments
        from tokenratio.models.provenance import resolved_name
        from tokenratio.models.weights import load_whole

        if is_gguf(name):
            raise TokenRatioError(
                f"{name} holds a language model without a reward head: train one with `tokenratio "
                "train-reward`"
            )
        folder = resolved_name(name)
        tokenizer = tokenizer or load_tokenizer(name, init_kwargs)
        model = load_whole(
            AutoModelForSequenceClassification,
            folder,
            loading_arguments(init_kwargs, "init_kwargs"),
            f"{str(name)!r} as a reward model",
        )
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        return cls(model, tokenizer, name=str(name), **options)

    def identity(self) -> dict[str, Any]:
        return {
            "judge": "reward-model",
            "model": self._name,
            "weights": weights_digest(self._model),
            "input": "chat" if self._as_chat else "pair" if self._as_pair else "text",
            "max_length": self._max_length,
            **(self._template.record(self._tokenizer) if self._as_chat else {}),
        }

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterator[Verdict]:
        return bradley_terry(comparisons, self.rewards, at_once=8 * self._batch_size)

    def rewards(self, responses: Sequence[tuple[Prompt, Response]]) -> list[float | str]:
        """The model's output for each response, or why there is none."""
        encoded: list[dict[str, list[int]]] = []
        rewards: list[float | str] = []
        for prompt, response in responses:
            try:
                encoded.append(self._encode(prompt, response.text))
            except RowDefectError as error:
                encoded.append({"input_ids": []})
                rewards.append(str(error))
            else:
                length = len(encoded[-1]["input_ids"])
                rewards.append(f"{length} tokens, more than max_length {self._max_length}")
        lengths = [len(row["input_ids"]) for row in encoded]
        fit = [i for i, n in enumerate(lengths) if n and n <= (self._max_length or n)]
        device = next(self._model.parameters()).device

        def run(batch: list[int]) -> list[float]:
            inputs = self._pad([encoded[fit[index]] for index in batch])
            logits = self._model(**{k: v.to(device) for k, v in inputs.items()}).logits
            scores: list[float] = logits[:, 0].double().tolist()
            return scores

        with torch.no_grad(), eval_mode(self._model):
            fitting = [lengths[index] for index in fit]
            found = run_by_length(fitting, run, batch_size=self._batch_size, longest_first=True)
        for index, reward in zip(fit, found, strict=True):
            rewards[index] = reward
        return rewards

    def _encode(self, prompt: Prompt, text: str) -> dict[str, list[int]]:
        tokenizer = self._tokenizer
        if self._as_chat:
            if isinstance(prompt, str):
                prompt = Conversation([{"role": "user", "content": prompt}])
            if self._as_trained:
                return self._encode_as_trained(prompt, text)
            turns = [*prompt.messages, {"role": "assistant", "content": text}]
            whole = render_turns(prompt, turns, tokenizer, self._template)
            encoded = tokenizer(whole, add_special_tokens=False, verbose=False)
        elif not isinstance(prompt, str):
            raise TokenRatioError(
                f"a prompt is a conversation, but {self._name} has no chat template"
            )
        elif self._as_pair:
            encoded = tokenizer(prompt, text, verbose=False)
        else:
            whole, eos = prompt + text, tokenizer.eos_token or ""
            encoded = tokenizer(whole if whole.endswith(eos) else whole + eos, verbose=False)
        return {name: list(encoded[name]) for name in encoded}

    def _encode_as_trained(self, prompt: Conversation, text: str) -> dict[str, list[int]]:
        tokenizer, special = self._tokenizer, special_tokens(self._tokenizer)
        end = turn_end(tokenizer, self._template)
        rendered = render(answered(prompt, text), tokenizer, self._template, end)
        (ids,) = tokenise(tokenizer, [rendered], special)
        row = assemble(ids, ("the response",), special, Limits())
        input_ids = [*row.prompt_ids.tolist(), *row.response_ids[0].tolist()]
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}

    def _pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self._pad_id or 0}
        return {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill.get(name, 0))
            for name in rows[0]
        }
