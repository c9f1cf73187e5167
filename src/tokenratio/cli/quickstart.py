"""`tokenratio quickstart`: SFT, preference pairs, alignment and evaluation on the review world."""

from dataclasses import dataclass
from pathlib import Path

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

USAGE = """usage: tokenratio quickstart [--flag value ...]

Trains a small policy on the review world by SFT, draws preference pairs from it, aligns it with
TBPO-A, and evaluates both on held-out prompts and pairs. About half a minute on two cores.
"""
_LONGEST_RESPONSE = 64
_SHOWN = (
    *("gold_reward", "win_rate/gold", "lc_win_rate/gold", "insults", "kl_policy_ref"),
    *("diversity/entropy", "diversity/self_bleu", "length/tokens", "pairs/accuracy"),
    "credit/log_ratio+kl/spearman",
)


@dataclass(frozen=True)
class QuickstartOptions:
    """Settings of `quickstart`; with the defaults it takes about half a minute on two cores."""

    output_dir: str = option("runs/quickstart", "Output folder; an existing one is replaced.")
    seed: int = option(0, "Seed of the whole run.")
    loss: str = option("tbpo_a", "Method to align the policy with.")
    num_sft: int = option(12000, "Number of reviews for SFT.")
    num_pairs: int = option(3000, "Number of preference pairs.")
    num_prompts: int = option(200, "Number of held-out prompts and pairs for evaluation.")
    flip_rate: float = option(0.0, "Share of pairs whose labels are swapped.")

    def __post_init__(self) -> None:
        require_at_least(
            1, num_sft=self.num_sft, num_pairs=self.num_pairs, num_prompts=self.num_prompts
        )
        check_loss(self.loss)
        check_seed(self.seed)
        if not 0 <= self.flip_rate <= 1:
            raise TokenRatioError(f"flip_rate must lie in [0, 1], not {self.flip_rate}")


def quickstart(options: QuickstartOptions) -> None:
    """Run all steps and print the table of both policies."""
    with alone_in(Path(options.output_dir)):
        _quickstart(options)


def _quickstart(options: QuickstartOptions) -> None:
    from transformers import LlamaForCausalLM, set_seed

    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.data.worlds import WORLDS
    from tokenratio.evaluation.options import EvaluateOptions
    from tokenratio.models.device import default_device, describe_training
    from tokenratio.models.generation import policy_sampler

    quiet_libraries()
    world = WORLDS["reviews"]
    seed = options.seed
    folder = Path(options.output_dir)
    claim(folder, "quickstart", options, written=["sft"])
    tokenizer = world.build_tokenizer()
    set_seed(seed)
    policy = LlamaForCausalLM(world.policy_config())
    policy.config.name_or_path = "review world policy"
    size = sum(p.numel() for p in policy.parameters())
    print(f"device: {describe_training(default_device(), policy.dtype, None)}")
    print(f"1. SFT: a policy of {size:,} parameters trains on {options.num_sft:,} reviews")
    train_step(
        policy,
        tokenizer,
        world.sft_corpus(options.num_sft, seed=seed),
        output_dir=str(folder / "sft"),
        loss="sft",
        optim="adamw_torch",
        learning_rate=3e-3,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
        max_length=128,
        seed=seed,
    )
    print(f"2. pairs: {options.num_pairs:,} drawn from that policy, labelled by the gold reward")
    sampler = policy_sampler(
        policy, tokenizer, max_new_tokens=_LONGEST_RESPONSE, batch_size=256, seed=seed
    )
    pairs = world.preference_pairs(
        options.num_pairs, seed=seed, flip_rate=options.flip_rate, sampler=sampler
    )
    pairs_file = write_pairs(folder, pairs)
    print(f"3. {options.loss}: the same policy trains on the pairs")
    train_step(
        policy,
        tokenizer,
        pairs_file,
        output_dir=str(folder / options.loss),
        loss=options.loss,
        learning_rate=1e-4,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        max_length=128,
        seed=seed,
    )
    print("4. evaluation on held-out prompts and pairs")
    held_out = f"seed={seed}&split=test"
    evaluation = EvaluateOptions(
        output_dir=str(folder / EVALUATION),
        reference=str(folder / "sft"),
        prompts=f"world:reviews?prompts={options.num_prompts}&{held_out}",
        pairs=f"world:reviews?pairs={options.num_prompts}&{held_out}",
        num_samples=4,
        max_new_tokens=_LONGEST_RESPONSE,
        batch_size=64,
        # With models this small the figures would differ between machines, for no time saved.
        dtype="float32",
        seed=seed,
    )
    evaluate_step(folder, options.loss, evaluation, shown=_SHOWN)
    report_step(folder, options.loss)
    credit_step(folder, options.loss, reference=evaluation.reference, data=evaluation.pairs)
    print(f"\nall files are in {folder}; all measures in {folder / EVALUATION / TABLE_FILE}")


COMMAND = Command(USAGE, quickstart, options=QuickstartOptions)
