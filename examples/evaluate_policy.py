"""Evaluate a policy of the review world, the result of `tokenratio quickstart`, from Python."""

import sys

from tokenratio import EvaluateOptions, evaluate


def main(run: str = "runs/quickstart/tbpo_a", output: str = "evaluation", num: int = 100) -> float:
    """Print what was measured; returns how often the policy beats its reference."""
    prompts = f"world:reviews?prompts={num}&seed=7&split=test"
    options = EvaluateOptions(output_dir=output, prompts=prompts, num_samples=2, max_new_tokens=64)
    policy = evaluate([run], options)[-1]  # the reference comes first
    for measure in policy.measures:
        print(f"{measure.name}: {measure.text}")
    win_rate = policy.named("win_rate/gold")
    return win_rate.mean if win_rate is not None else float("nan")


if __name__ == "__main__":
    main(*sys.argv[1:3])
