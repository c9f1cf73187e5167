"""`tokenratio demo`: a chat model aligned on the sentiment world, with its answers to read."""

import gc
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.cli.walkthrough import (
    EVALUATION,
    TABLE_FILE,
    alone_in,
    check_loss,
    check_seed,
    claim,
    credit_step,
    evaluate_step,
    report_step,
    train_step,
    write_pairs,
)
from tokenratio.errors import TokenRatioError
from tokenratio.names import require_at_least
from tokenratio.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

USAGE = """usage: tokenratio demo [--flag value ...]

Aligns a real chat model with TBPO-A and LoRA on the sentiment world: draws pairs of answers from
it, labels them by VADER's sentiment, trains, and evaluates both policies on held-out topics. The
answers before and after are in before_after.md.
"""
_LONGEST_RESPONSE = 64
_ROWS_AT_ONCE = 64
_NUM_SHOWN_ANSWERS = 10
_ANSWERS_FILE = "before_after.md"
_SHOWN = (
    *("gold_reward", "win_rate/gold", "lc_win_rate/gold", "kl_policy_ref", "perplexity_ref"),
    *("diversity/entropy", "diversity/self_bleu", "diversity/distinct_2", "length/tokens", "cut"),
    *("pairs/accuracy", "word_credit/log_ratio/spearman", "word_credit/log_ratio+kl/spearman"),
)


@dataclass(frozen=True)
class DemoOptions:
    """Settings of `demo`; the defaults are for two cores."""

    output_dir: str = option("runs/demo", "Output folder; an existing one is replaced.")
    model: str = option("package:smollm2", "Chat model to align: a name, folder or package.")
    loss: str = option("tbpo_a", "Method to align it with.")
    seed: int = option(0, "Seed of the whole run.")
    num_pairs: int = option(448, "Number of preference pairs.")
    num_epochs: int = option(1, "Number of times the pairs are trained on.")
    learning_rate: float = option(1e-4, "Learning rate of the adapter.")
    num_prompts: int = option(64, "Number of held-out prompts and pairs for evaluation.")

    def __post_init__(self) -> None:
        require_at_least(
            1, num_pairs=self.num_pairs, num_epochs=self.num_epochs, num_prompts=self.num_prompts
        )
        if not 0 < self.learning_rate < math.inf:
            raise TokenRatioError(f"learning_rate must be positive, not {self.learning_rate}")
        check_loss(self.loss)
        check_seed(self.seed)


def demo(options: DemoOptions) -> None:
    """Run all steps; print the table of both policies and their answers."""
    with alone_in(Path(options.output_dir)):
        _demo(options)


def _demo(options: DemoOptions) -> None:
    from peft import LoraConfig
    from transformers import set_seed

    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.data.worlds import WORLDS
    from tokenratio.evaluation.options import EvaluateOptions
    from tokenratio.models.device import default_device, describe_training, sampling_dtype
    from tokenratio.models.generation import policy_sampler
    from tokenratio.models.loading import load_model, load_tokenizer
    from tokenratio.run_folder import replace_text

    quiet_libraries()
    world, seed, folder = WORLDS["sentiment"], options.seed, Path(options.output_dir)
    world.require()
    dtype = sampling_dtype("auto")
    is_bfloat16 = dtype == "bfloat16"
    device = default_device()
    policy = load_model(options.model, {"dtype": dtype}).to(device)
    tokenizer = load_tokenizer(options.model)
    claim(folder, "demo", options, written=[_ANSWERS_FILE], model=options.model)
    set_seed(seed)
    size = sum(p.numel() for p in policy.parameters())
    print(f"{options.model}: {size / 1e6:,.0f} million parameters")
    products = policy.dtype if is_bfloat16 else None
    print(f"device: {describe_training(device, policy.dtype, products)}")
    test_prompts = world.prompts(_NUM_SHOWN_ANSWERS, seed=seed, split="test")
    with _timed(f"1. pairs: {options.num_pairs} of the model's own answers, labelled by VADER"):
        before = _likeliest_answers(policy, tokenizer, test_prompts)
        sampler = policy_sampler(
            policy,
            tokenizer,
            max_new_tokens=_LONGEST_RESPONSE,
            batch_size=_ROWS_AT_ONCE,
            seed=seed,
            progress=is_terminal(),
        )
        pairs = world.preference_pairs(options.num_pairs, seed=seed, sampler=sampler)
        pairs_file = write_pairs(folder, pairs)
        print(_describe(pairs))
    with _timed(f"2. {options.loss}: a LoRA adapter trains on the pairs"):
        train_step(
            policy,
            tokenizer,
            pairs_file,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            output_dir=str(folder / options.loss),
            loss=options.loss,
            learning_rate=options.learning_rate,
            num_train_epochs=options.num_epochs,
            per_device_train_batch_size=4,  # two for an update: half the memory
            gradient_accumulation_steps=2,
            max_length=256,
            bf16=is_bfloat16,
            seed=seed,
        )
        aligned = load_model(str(folder / options.loss), {"dtype": dtype}).to(device)
        after = _likeliest_answers(aligned, tokenizer, test_prompts)
        del aligned, policy, sampler
        gc.collect()  # a trainer refers to itself, and to the model and its gradients
        text = _side_by_side(test_prompts, before, after, options.loss)
        replace_text(folder / _ANSWERS_FILE, text)
    with _timed("3. evaluation on held-out topics"):
        held_out = f"seed={seed}&split=test"
        evaluation = EvaluateOptions(
            output_dir=str(folder / EVALUATION),
            reference=options.model,
            prompts=f"world:sentiment?prompts={options.num_prompts}&{held_out}",
            pairs=f"world:sentiment?pairs={options.num_prompts}&{held_out}",
            num_samples=2,
            max_new_tokens=_LONGEST_RESPONSE,
            batch_size=32,
            dtype=dtype,
            seed=seed,
        )
        evaluate_step(folder, options.loss, evaluation, shown=_SHOWN)
    print(f"\n{text}")
    report_step(folder, options.loss)
    credit_step(
        folder,
        options.loss,
        reference=options.model,
        data=pairs_file,
        world="world:sentiment",
        dtype=dtype,
    )
    print(f"all files are in {folder}; all measures in {folder / EVALUATION / TABLE_FILE}")


@contextmanager
def _timed(title: str) -> Iterator[None]:
    """Print what is done, how long it took, and the most memory so far."""
    import resource

    print(title, flush=True)
    began = time.monotonic()
    yield
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes, or KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    took = time.monotonic() - began
    print(f"   took {took:.0f} s; peak memory so far {peak:.1f} GiB", flush=True)


def _likeliest_answers(
    policy: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Any],
) -> list[str]:
    """The greedy answer to each prompt, which no luck of the draw flatters."""
    from tokenratio.models.generation import sample_responses

    answers = sample_responses(
        policy, tokenizer, prompts, temperature=0, max_new_tokens=_LONGEST_RESPONSE, seed=0
    )
    return [answer.text for (answer,) in answers]


def _describe(pairs: Sequence[Mapping[str, Any]]) -> str:
    """The pairs in a line."""
    num, margins = len(pairs), [row["chosen_reward"] - row["rejected_reward"] for row in pairs]
    mean = sum(row["chosen_reward"] + row["rejected_reward"] for row in pairs) / (2 * num)
    better, ties = sum(m > 0 for m in margins) / num, sum(m == 0 for m in margins) / num
    return (
        f"   mean reward {mean:.2f} of 4; the answer with the higher reward is chosen in "
        f"{better:.0%}, equal rewards in {ties:.0%}"
    )


def _side_by_side(
    prompts: Sequence[Any], before: Sequence[str], after: Sequence[str], loss: str
) -> str:
    """Prompts and likeliest answers before and after, as Markdown."""
    lines = ["Greedy answers to the first held-out prompts, before and after training:", ""]
    for (message,), *answers in zip(prompts, before, after, strict=True):
        lines.append(f"- **{message['content']}**")
        for name, answer in zip(("before", loss), answers, strict=True):
            lines.append(f"  - {name}: {' '.join(answer.split())}")
    return "\n".join(lines) + "\n"


COMMAND = Command(USAGE, demo, options=DemoOptions)
