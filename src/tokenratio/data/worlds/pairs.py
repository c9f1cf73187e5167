"""Preference pairs with known rewards: sampled responses, Bradley–Terry labels, label noise."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tokenratio.data.worlds.review_lexicon import words_of
from tokenratio.errors import TokenRatioError

# A text, or the messages of a conversation.
WorldPrompt: TypeAlias = str | list[dict[str, str]]
# (prompts, num_samples) → the sampled responses to each prompt, as texts. It is called again for
# prompts with unusable responses, so every call must draw new ones. Prompts are a `WorldPrompt`
# each; Any, because a world with texts alone need not take conversations.
Sampler: TypeAlias = Callable[[list[Any], int], list[list[str]]]

MAX_DRAWS = 20


def preference_pairs(
    prompts: Sequence[WorldPrompt],
    sampler: Sampler,
    reward_fn: Callable[[str], float],
    *,
    seed: int,
    temperature: float = 1.0,
    flip_rate: float = 0.0,
) -> list[dict[str, Any]]:
    """One labelled pair per prompt.

    The first of two responses is chosen with probability sigmoid((r_1 − r_2) / temperature), the
    Bradley–Terry model on their rewards; each label is then flipped with probability `flip_rate`.
    Labels and flips have their own random streams, so that the responses are the same at every
    temperature and flip rate. Responses with the same words, or blank ones, are drawn again.

    Returns:
        Rows with `prompt`, `chosen`, `rejected` (texts, or messages if the prompt is a
        conversation), `chosen_reward`, `rejected_reward`, `flipped` (the
        label was reversed by noise) and `redrawn` (how many draws this pair took beyond the first).
    """
    if not temperature > 0 or not math.isfinite(temperature):
        raise TokenRatioError(f"temperature must be positive and finite, not {temperature}")
    if not 0 <= flip_rate <= 1:
        raise TokenRatioError(f"flip_rate must lie between 0 and 1, not {flip_rate}")
    label_rng, flip_rng = (random.Random(f"{stream} {seed}") for stream in ("labels", "flips"))
    rows = []
    for prompt, (first, second, redrawn) in zip(prompts, _draw(prompts, sampler), strict=True):
        margin = (reward_fn(first) - reward_fn(second)) / temperature
        first_wins = label_rng.random() < _sigmoid(margin)
        flipped = flip_rng.random() < flip_rate
        chosen, rejected = (first, second) if first_wins != flipped else (second, first)
        rows.append(
            {
                "prompt": prompt,
                "chosen": _answer(prompt, chosen),
                "rejected": _answer(prompt, rejected),
                "chosen_reward": reward_fn(chosen),
                "rejected_reward": reward_fn(rejected),
                "flipped": flipped,
                "redrawn": redrawn,
            }
        )
    return rows


def _answer(prompt: WorldPrompt, text: str) -> WorldPrompt:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _draw(prompts: Sequence[WorldPrompt], sampler: Sampler) -> list[tuple[str, str, int]]:
    """Two different, non-blank responses to each prompt, and how often they were drawn again."""
    pairs: dict[int, tuple[str, str, int]] = {}
    for redrawn in range(MAX_DRAWS):
        missing = [index for index in range(len(prompts)) if index not in pairs]
        if not missing:
            break
        drawn = sampler([prompts[index] for index in missing], 2)
        for index, (first, second) in zip(missing, drawn, strict=True):
            if words_of(first) and words_of(second) and words_of(first) != words_of(second):
                pairs[index] = (first, second, redrawn)
    if len(pairs) < len(prompts):
        index = next(index for index in range(len(prompts)) if index not in pairs)
        raise TokenRatioError(
            f"{len(prompts) - len(pairs)} of {len(prompts)} prompts did not get two different "
            f"responses in {MAX_DRAWS} draws, first {prompts[index]!r}: sample at a higher "
            "temperature"
        )
    return [pairs[index] for index in range(len(prompts))]


def _sigmoid(x: float) -> float:
    # exp of a positive number can overflow, exp of a negative one cannot
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
