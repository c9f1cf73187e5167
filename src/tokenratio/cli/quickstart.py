"""`tokenratio quickstart`: SFT, preference pairs, alignment and evaluation on the review world."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.names import require_at_least
from tokenratio.settings import check_known, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


USAGE = """usage: tokenratio quickstart [--flag value ...]

Trains a small policy on the review world by SFT, draws preference pairs from it, aligns it with
TBPO-A, and evaluates both on held-out prompts and pairs. About half a minute on two cores.
"""
_LONGEST_RESPONSE = 64
_STEPS_PER_LINE = 20
_SHOWN = (
    *("gold_reward", "win_rate/gold", "lc_win_rate/gold", "insults", "kl_policy_ref"),
    *("diversity/entropy", "diversity/self_bleu", "length/tokens", "pairs/accuracy"),
    "credit/log_ratio+kl/spearman",
)
# Only a folder that holds this file may be replaced.
_MARK = "quickstart.json"


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
        from tokenratio.losses import LOSSES

        require_at_least(
            1, num_sft=self.num_sft, num_pairs=self.num_pairs, num_prompts=self.num_prompts
        )
        # Models that score tokens would have to be trained first, which needs a recipe.
        known = [name for name, method in LOSSES.items() if not method.needs_contrast]
        check_known([self.loss], known, "loss", listed="`tokenratio methods` describes them")
        if not 0 <= self.flip_rate <= 1:
            raise TokenRatioError(f"flip_rate must lie in [0, 1], not {self.flip_rate}")


def quickstart(options: QuickstartOptions) -> None:
    """Run all steps and print the table of both policies."""
    from transformers import LlamaForCausalLM, set_seed

    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.data.worlds import WORLDS
    from tokenratio.evaluation import evaluate
    from tokenratio.evaluation.options import EvaluateOptions
    from tokenratio.evaluation.results import table
    from tokenratio.models.device import default_device, describe_training
    from tokenratio.models.generation import policy_sampler
    from tokenratio.run_folder import replace_text

    quiet_libraries()
    world = WORLDS["reviews"]
    seed = options.seed
    folder = Path(options.output_dir)
    _clear(folder)
    replace_text(folder / _MARK, json.dumps(asdict(options), indent=2) + "\n")
    tokenizer = world.build_tokenizer()
    set_seed(seed)
    policy = LlamaForCausalLM(world.policy_config())
    policy.config.name_or_path = "review world policy"
    size = sum(p.numel() for p in policy.parameters())
    print(f"device: {describe_training(default_device(), policy.dtype, None)}")
    print(f"1. SFT: a policy of {size:,} parameters trains on {options.num_sft:,} reviews")
    _train(
        policy,
        tokenizer,
        world.sft_corpus(options.num_sft, seed=seed),
        output_dir=str(folder / "sft"),
        loss="sft",
        optim="adamw_torch",
        learning_rate=3e-3,
        per_device_train_batch_size=64,
        max_grad_norm=1.0,
        seed=seed,
    )
    print(f"2. pairs: {options.num_pairs:,} drawn from that policy, labelled by the gold reward")
    sampler = policy_sampler(
        policy, tokenizer, max_new_tokens=_LONGEST_RESPONSE, batch_size=256, seed=seed
    )
    pairs = world.preference_pairs(
        options.num_pairs, seed=seed, flip_rate=options.flip_rate, sampler=sampler
    )
    pairs_file = folder / "pairs.jsonl"
    replace_text(pairs_file, "".join(json.dumps(row) + "\n" for row in pairs))
    print(f"3. {options.loss}: the same policy trains on the pairs")
    _train(
        policy,
        tokenizer,
        str(pairs_file),
        output_dir=str(folder / options.loss),
        loss=options.loss,
        learning_rate=1e-4,
        per_device_train_batch_size=32,
        seed=seed,
    )
    print("4. evaluation on held-out prompts and pairs")
    held_out = f"seed={seed}&split=test"
    policies = evaluate(
        [f"{options.loss}={folder / options.loss}"],
        EvaluateOptions(
            output_dir=str(folder / "evaluation"),
            reference=str(folder / "sft"),
            prompts=f"world:reviews?prompts={options.num_prompts}&{held_out}",
            pairs=f"world:reviews?pairs={options.num_prompts}&{held_out}",
            num_samples=4,
            max_new_tokens=_LONGEST_RESPONSE,
            batch_size=64,
            # With models this small the figures would differ between machines, for no time saved.
            dtype="float32",
            seed=seed,
        ),
        report=lambda line: print(line) if "ALARM" in line else None,
        progress=is_terminal(),
    )
    text = table(
        [
            replace(policy, measures=tuple(filter(None, map(policy.named, _SHOWN))))
            for policy in policies
        ]
    )
    replace_text(folder / "table.md", text + "\n")
    print(text)
    print(f"\nall files are in {folder}; all measures in {folder / 'evaluation' / 'table.md'}")


def _train(
    policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", data: Any, **settings: Any
) -> None:
    """Train and save; the two steps differ by these settings."""
    from tokenratio.cli.progress import use_terminal
    from tokenratio.cli.terminal import is_terminal
    from tokenratio.training.config import TokenRatioConfig
    from tokenratio.training.trainer import TokenRatioTrainer

    args = TokenRatioConfig(
        gradient_accumulation_steps=1,
        max_length=128,
        save_strategy="no",
        disable_tqdm=not is_terminal(),
        **settings,
    )
    trainer = TokenRatioTrainer(policy, args=args, train_dataset=data, processing_class=tokenizer)
    use_terminal(trainer, every=_STEPS_PER_LINE)
    trainer.train()
    trainer.save_model()


COMMAND = Command(USAGE, quickstart, options=QuickstartOptions)


def _clear(folder: Path) -> None:
    """Remove an earlier quickstart; refuse a folder that holds anything else."""
    from tokenratio.losses import LOSSES

    if not folder.exists():
        return
    ours = {_MARK, "sft", "pairs.jsonl", "evaluation", "table.md", *LOSSES}
    for path in folder.iterdir():
        if path.name not in ours or not (folder / _MARK).is_file():
            raise TokenRatioError(
                f"{folder} holds {path.name}, which quickstart did not write: choose another "
                "--output_dir"
            )
    shutil.rmtree(folder)
