"""How far training on several processes is from training on one: a table (`make processes`).

Every loss family, full and with LoRA, under DDP, FSDP2 and, where DeepSpeed is installed, ZeRO-2
and ZeRO-3: twenty steps in float32 on gloo, with the global batch of one process. Then runs resumed
on another number of processes. Exits with 1 if a difference is above the limit.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).parent
LIMIT = 1e-6
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
FAMILIES = ["tbpo_a", "tbpo_q", "dpo", "ipo", "simpo", "bpo_a", "tdpo1", "tdpo2", "arc_bpo", "sft"]
# Where 0.1 would magnify rounding.
RATES = {"ipo": 1e-3, "simpo": 1e-2, "bpo_a": 3e-2}
KINDS = {"full": {}, "LoRA": {"peft": LORA}}
OTHERS = {
    "tbpo_a, tied": {"loss": "tbpo_a", "model": "llama_tied"},
    "tbpo_a, soft-cap": {"loss": "tbpo_a", "model": "gemma2"},
    "tbpo_a, head bias": {"loss": "tbpo_a", "model": "phi"},
    "tbpo_a, whole head": {"loss": "tbpo_a", "peft": {**LORA, "modules_to_save": ["lm_head"]}},
    "tdpo2, whole head": {"loss": "tdpo2", "peft": {**LORA, "modules_to_save": ["lm_head"]}},
    "tbpo_a, cached": {"loss": "tbpo_a", "cache_reference": True},
    "dpo, cached": {"loss": "dpo", "cache_reference": True},
    "tbpo_a, checkpointed": {"loss": "tbpo_a", "gradient_checkpointing": True},
    "tbpo_a, prompt shared": {"loss": "tbpo_a", "share_prompt": "always"},
}
CASES = {
    **{
        f"{loss}, {kind}": {"loss": loss, "learning_rate": RATES.get(loss, 0.1), **how}
        for loss in FAMILIES
        for kind, how in KINDS.items()
    },
    **OTHERS,
}

# Compared with DDP: accelerate fills the last batch of several processes, so one process differs.
UNEVEN = {
    "tbpo_a, uneven": {"loss": "tbpo_a", "rows": 37},
    "sft, uneven": {"loss": "sft", "rows": 7},
}
# Stopped at step 7 of two processes, and resumed on these numbers of them.
RESUMED = {
    "ddp": ({"wrapper": "ddp"}, (1, 2, 4)),
    "fsdp2": ({"wrapper": "fsdp2"}, (1, 2, 4)),
    "fsdp2, sharded": ({"wrapper": "fsdp2", "state_dict_type": "SHARDED_STATE_DICT"}, (1, 2, 4)),
    "zero2": ({"wrapper": "zero2"}, (2,)),
    "zero3": ({"wrapper": "zero3"}, (2,)),
}


def launch(folder: Path, processes: int, runs: dict[str, dict[str, object]]) -> float:
    """Run cases in one launch, each in the subfolder of its name; returns the seconds it took."""
    script, start = HERE / "training" / "distributed_run.py", time.monotonic()
    names = [f"{name}={json.dumps(settings)}" for name, settings in runs.items()]
    launcher = ("--nproc_per_node", str(processes), "--master_port", "0", "--standalone")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *launcher,
            str(script),
            str(folder),
            *names,
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        print(result.stderr[-6000:], file=sys.stderr)
    return time.monotonic() - start


def difference(one: Path, other: Path) -> float:
    """The largest difference between the weights that two runs ended with."""
    largest = 0.0
    files = {path.name for path in one.glob("*.safetensors")}
    if not files or files != {path.name for path in other.glob("*.safetensors")}:
        return float("nan")
    for name in files - {"state_baseline_optimizer.safetensors"}:
        left, right = load_file(one / name), load_file(other / name)
        if left.keys() != right.keys():
            return float("nan")
        largest = max(largest, *((left[key] - right[key]).abs().max().item() for key in left))
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*CASES, *UNEVEN]
    parser.add_argument("--cases", nargs="*", default=names, help="names of cases")
    parser.add_argument("--resumed", nargs="*", default=list(RESUMED), help="names of resumed runs")
    parser.add_argument("--wrappers", nargs="*", help="of ddp, fsdp2, zero2, zero3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.mkdtemp()))
    options = parser.parse_args()
    known = ("ddp", "fsdp2", "zero2", "zero3")
    wrappers = options.wrappers or [name for name in known if can_run(name)]
    shared = {"max_steps": 20, "reference_cache_dir": str(options.folder / "cache")}
    cases = {name: {**shared, **{**CASES, **UNEVEN}[name]} for name in options.cases}
    one = options.folder / "one"
    seconds = launch(one, 1, {name: {**case, "keeps_start": True} for name, case in cases.items()})
    print(f"one process: {len(cases)} runs in {seconds:.0f} s", flush=True)
    worst, rows = 0.0, {}
    for name in cases:
        rows[name] = [f"{difference(one / name / 'start', one / name):.1e}"]
    for wrapper in wrappers:
        folder = options.folder / wrapper
        runs = {name: {**settings, "wrapper": wrapper} for name, settings in cases.items()}
        seconds = launch(folder, options.processes, runs)
        print(f"{wrapper}: {len(runs)} runs in {seconds:.0f} s", flush=True)
        for name in cases:
            like = options.folder / wrappers[0] if name in UNEVEN else one
            found = difference(like / name, folder / name)
            worst = max(worst, found) if found == found else float("inf")
            rows[name].append("failed" if found != found else f"{found:.1e}")
    print(f"\n| run | trained by | {' | '.join(wrappers)} |")
    print(f"|---|---|{'---|' * len(wrappers)}")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(found)} |")
    worst = max(worst, resume(options.folder, [name for name in options.resumed if can_run(name)]))
    return int(worst > LIMIT)


def can_run(wrapper: str) -> bool:
    return "zero" not in wrapper or importlib.util.find_spec("deepspeed") is not None


def resume(root: Path, names: list[str]) -> float:
    """Print how far resumed runs end from one process that was not interrupted."""
    # An optimizer with a state, whose division by small gradients does not magnify rounding.
    adam = {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 0.05}
    same = {"loss": "tbpo_a", "max_steps": 20, **adam}
    start, worst = root / "interrupted", 0.0
    launch(root / "one", 1, {"undisturbed": same})
    saved = {"save_strategy": "steps"}  # at step 7
    launch(start, 2, {name: {**same, **saved, **RESUMED[name][0]} for name in names})
    rows: dict[str, list[str]] = {name: [] for name in names}
    for processes in (1, 2, 4):
        folder = root / f"resumed-{processes}"
        runs = {
            name: {**same, **RESUMED[name][0], "goes_on": str(start / name)}
            for name in names
            if processes in RESUMED[name][1]
        }
        launch(folder, processes, runs)
        for name in names:
            if name not in runs:
                rows[name].append("—")
                continue
            found = difference(root / "one" / "undisturbed", folder / name)
            worst = max(worst, found) if found == found else float("inf")
            rows[name].append("failed" if found != found else f"{found:.1e}")
    print("\n| stopped on 2 processes | resumed on 1 | on 2 | on 4 |\n|---|---|---|---|")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(found)} |")
    return worst


if __name__ == "__main__":
    sys.exit(main())
