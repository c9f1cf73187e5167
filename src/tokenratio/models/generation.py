"""Responses sampled from a policy, reproducibly; the model and tokenizer are left unchanged."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tokenratio.data.chat import (
    Conversation,
    Prompt,
    prompt_of,
    prompt_value,
    render_prompt,
)
from tokenratio.data.defects import RowDefectError
from tokenratio.data.display import quoted
from tokenratio.data.encoding import begin, cut_left, special_tokens
from tokenratio.data.messages import Message
from tokenratio.data.template import TemplateSettings, default_system_prompt, turn_end
from tokenratio.errors import TokenRatioError
from tokenratio.models.decoding import generate_rows
from tokenratio.models.heartbeat import advance
from tokenratio.models.processes import current
from tokenratio.models.response import Response
from tokenratio.models.sampling import RowSampler, stream_seed
from tokenratio.models.token_rows import batches_by_length
from tokenratio.names import require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A prompt, or bare messages.
AnyPrompt = Prompt | Sequence[Message]


def sample_responses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[AnyPrompt],
    **settings: Any,
) -> list[list[Response]]:
    """`num_samples` responses to each prompt, in the order of the prompts.

    The processes of `processes.current` share the prompts; each returns all responses.

    Args:
        settings: as of `iterate_samples`.
    """
    samples = dict(iterate_samples(model, tokenizer, prompts, **settings))
    for part in current().gather(samples):
        samples |= part
    return [samples[index] for index in range(len(prompts))]


def iterate_samples(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[AnyPrompt],
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int,
    max_prompt_length: int | None = None,
    template: TemplateSettings | None = None,
    batch_size: int = 64,
    seed: int,
    keys: Sequence[str] | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, list[Response]]]:
    """Sample responses to each prompt, and yield them prompt by prompt, the shortest first.

    The distribution is the model's own, with `temperature` and `top_p`; top-k, penalties and other
    settings of its `generation_config` do not apply. Its EOS ids do, besides the tokenizer's and
    the chat template's end of turn.

    A response depends only on the model, the prompt, `seed`, the prompt's key and the sample's
    number: not on the other prompts, their order, or the batch size, except for rounding. Different
    padding changes the last bits of the logits, and a close draw may then give another token: rare
    in float32, not in half precision.

    Each of the processes of `processes.current` yields its share of the prompts, in the batches of
    one process.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_p: keep the smallest set of tokens with this probability; 1 keeps all.
        max_new_tokens: longest response in tokens, EOS included.
        max_prompt_length, template: see `encode_prompts`.
        batch_size: rows generated at once.
        seed: the same call gives the same samples; the global random state is left as it was.
        keys: a different id for each prompt; by default the prompt's content and, for prompts that
            occur more than once, a count.
        progress: draw a bar, in responses.
    Yields:
        The prompt's index and its samples with token ids; the finish reason is "eos", or "length"
        for a response cut at `max_new_tokens`.
    """
    require_at_least(
        1, num_samples=num_samples, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    if not 0 <= temperature < math.inf:
        raise TokenRatioError(f"temperature must be 0 or positive, not {temperature}")
    if not 0 < top_p <= 1:
        raise TokenRatioError(f"top_p must be above 0 and at most 1, not {top_p}")
    if keys is not None and len(set(keys)) < len(prompts):
        raise TokenRatioError(f"{len(set(keys))} different keys for {len(prompts)} prompts")
    template = template or TemplateSettings()
    encoded = encode_prompts(
        tokenizer, prompts, template=template, max_prompt_length=max_prompt_length
    )
    keys = _content_keys(prompts) if keys is None else keys
    ends = eos_ids(model, tokenizer, template)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [(index, number) for index in range(len(prompts)) for number in range(num_samples)]
    lengths = [len(encoded[index]) for index, _ in rows]
    samples: dict[int, list[Response]] = {index: [] for index in range(len(prompts))}
    # A process does whole batches, and all samples of a prompt.
    whole = math.lcm(batch_size, num_samples)
    shares = current().share(list(batches_by_length(lengths, whole)))
    batches = [
        share[at : at + batch_size] for share in shares for at in range(0, len(share), batch_size)
    ]
    num_tokens, started = 0, time.perf_counter()
    with tqdm(total=sum(map(len, batches)), unit="response", disable=not progress) as bar:
        for picked in batches:
            batch = [rows[row] for row in picked]
            sampler = None
            if temperature > 0:
                seeds = [stream_seed(seed, keys[index], number) for index, number in batch]
                sampler = RowSampler(seeds, temperature=temperature, top_p=top_p)
            asked = list(dict.fromkeys(index for index, _ in batch))
            generated = generate_rows(
                model,
                [encoded[index] for index in asked],
                [asked.index(index) for index, _ in batch],
                ends=ends,
                pad_id=pad_id,
                max_new_tokens=max_new_tokens,
                sampler=sampler,
            )
            for (index, _), ids in zip(batch, generated, strict=True):
                samples[index].append(_response(tokenizer, ids, ends))
                num_tokens += len(samples[index][-1].token_ids or ())
            advance()
            bar.update(len(batch))
            bar.set_postfix({"tokens/s": f"{num_tokens / (time.perf_counter() - started):.0f}"})
            for index in asked:
                if len(samples[index]) == num_samples:
                    yield index, samples.pop(index)


def _content_keys(prompts: Sequence[AnyPrompt]) -> list[str]:
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        content = json.dumps(prompt_value(prompt_of(prompt)), sort_keys=True, default=str)
        keys.append(f"{seen[content]} {content}")
        seen[content] += 1
    return keys


def policy_sampler(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, seed: int, **settings: Any
) -> Callable[[list[Any], int], list[list[str]]]:
    """A policy as the source of a world's pairs (`tokenratio.data.worlds.pairs.Sampler`).

    Args:
        seed: of the first call; later calls use seed + 1, seed + 2, and so on.
        settings: others of `iterate_samples`, except `num_samples`.
    """
    seeds = count(seed)

    def sampler(prompts: list[Any], num_samples: int) -> list[list[str]]:
        drawn = sample_responses(
            model, tokenizer, prompts, num_samples=num_samples, seed=next(seeds), **settings
        )
        return [[sample.text for sample in row] for row in drawn]

    return sampler


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[AnyPrompt],
    *,
    template: TemplateSettings | None = None,
    max_prompt_length: int | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of prompts as the policy met them in training (`data.encoding.assemble`).

    A text gets the tokenizer's prefix once; a conversation is rendered by the chat template, with
    its generation prompt.

    Args:
        template: arguments of the chat template; a prompt's own values take precedence.
        max_prompt_length: tokens of the longest; longer ones are cut on the left, as in training.
    Raises:
        TokenRatioError: there is no chat template, or it fails on a prompt.
    """
    special, template = special_tokens(tokenizer), template or TemplateSettings()
    parsed = [prompt_of(given) for given in prompts]
    chats = [each.messages for each in parsed if isinstance(each, Conversation)]
    if any(turns and turns[0]["role"] == "system" for turns in chats):
        default_system_prompt(tokenizer, template)  # refuses a template that writes theirs twice
    encoded = []
    for prompt in parsed:
        try:
            text = render_prompt(prompt, tokenizer, template)
        except RowDefectError as error:
            raise TokenRatioError(f"prompt {_start_of(prompt)}: {error}") from None
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        kept, _ = cut_left(begin(ids, special), special.prefix, max_prompt_length)
        encoded.append(tuple(kept))
    return encoded


def _start_of(prompt: Prompt) -> str:
    text: Any = prompt
    if isinstance(prompt, Conversation):
        text = prompt.messages[-1].get("content") if prompt.messages else ""
    return quoted(str(text), 40)


def eos_ids(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    template: TemplateSettings | None = None,
) -> list[int]:
    """The tokens that end a response: EOS, the model's own, and the chat template's end of turn."""
    # A chat model may end its turn with a token that is not its EOS, as training does.
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    end = turn_end(tokenizer, template or TemplateSettings())
    return sorted({tokenizer.eos_token_id, *own, end and end.token_id} - {None})


def _response(
    tokenizer: "PreTrainedTokenizerBase", generated: list[int], eos_ids: list[int]
) -> Response:
    """Cut what was generated after its first EOS: the rest is padding."""
    end = next((index for index, token in enumerate(generated) if token in eos_ids), None)
    return Response(
        text=str(tokenizer.decode(generated[:end], skip_special_tokens=True)),
        finish_reason="length" if end is None else "eos",
        token_ids=tuple(generated if end is None else generated[: end + 1]),
    )
