"""Files of runs and evaluations, written by what writes them in earnest."""

import json
import math

import numpy as np

from tokenratio.evaluation.response_files import write_responses
from tokenratio.evaluation.results import PolicyMeasures, measure_of
from tokenratio.models.response import Response
from tokenratio.run_folder import EVAL_FILE, METRICS_FILE, write_run_file

CONFIG = {"loss": "tbpo_a", "beta": 0.1, "learning_rate": 1e-4, "max_grad_norm": 10.0}
CONFIG |= {"sft_weight": 0.0, "max_steps": -1, "num_train_epochs": 1.0, "output_dir": "run"}


def make_run(folder, *, steps=60, config=(), held_out=True, seed=0, lines=None, **metrics):
    """A calm run whose margins grow; a metric is a function of the share of the run."""
    rng = np.random.default_rng(seed)
    of = {
        "loss": lambda t: 0.7 - 0.3 * t,
        "grad_norm": lambda t: 1.0 + t,
        "rewards/margins": lambda t: 0.5 * t + 0.02,
        "rewards/accuracies": lambda t: 0.5 + 0.4 * t,
        "log_ratio/chosen": lambda t: 0.02 * t,
        "kl_ref_policy": lambda t: 0.05 * t,
        **{name.replace("__", "/"): function for name, function in metrics.items()},
    }
    account = {
        "digest": "d1" * 32,
        "sources": [{"name": "pairs.jsonl"}],
        "rows_read": 100,
        "rows_kept": 97,
        "refused": {
            "empty response": {"rows": 3, "examples": [{"origin": "pairs.jsonl:7", "detail": "x"}]}
        },
        "unit": "tokens",
        "lengths": {"prompt": 970, "chosen": 1940, "rejected": 1649},
        "shortest": {"prompt": 3, "chosen": 2, "rejected": 1},
        "longest": {"prompt": 31, "chosen": 64, "rejected": 63},
        "truncated": {"chosen": {"rows": 2, "tokens": 9}},
    }
    write_run_file(
        folder,
        config={**CONFIG, **dict(config)},
        processes=1,
        device="cpu (no GPU found)",
        model="org/start",
        reference={"kind": "copy", "name": "org/start", "base": "org/start", "sha256": "ab" * 32},
        adapters=None,
        data={"train": account},
    )
    logged = []
    for step in range(1, steps + 1):
        share = step / steps
        line = {"step": step, "epoch": share}
        line |= {name: f(share) + 0.001 * rng.normal() for name, f in of.items() if f is not None}
        logged.append(line)
        if held_out and step % max(1, steps // 3) == 0:
            logged.append({"step": step, "epoch": share, "eval_loss": 0.6, "eval_runtime": 1.0})
            logged[-1]["eval_rewards/accuracies"] = 0.75
    text = "".join(json.dumps(line) + "\n" for line in (logged if lines is None else lines))
    (folder / METRICS_FILE).write_text(text)
    if held_out:
        figures = {"accuracy": 0.8, "interval": [0.7, 0.9], "num_pairs": 50, "num_ties": 0}
        (folder / EVAL_FILE).write_text(json.dumps({"eval_loss": 0.6, "held_out": figures}))
    return folder


def make_evaluation(folder, policies, *, num=24, prompts=None, answers=None, seed=0):
    """An evaluation of the reference and of `{name: (run folder, gain in reward)}`."""
    rng = np.random.default_rng(seed)
    prompts = prompts or [f"Say something about topic {i}." for i in range(num)]
    ids = [f"prompts:{i}" for i in range(len(prompts))]
    ease = rng.normal(size=len(ids))
    for name, (run, gain) in {"reference": ("start", 0.0), **policies}.items():
        rewards = [(id, 0, float(e + gain)) for id, e in zip(ids, ease, strict=True)]
        lengths = [(id, 0, 20.0 + 20 * gain + e) for id, e in zip(ids, ease, strict=True)]
        measures = [
            measure_of("gold_reward", rewards, better="higher"),
            measure_of("length/tokens", lengths, unit="tokens"),
            measure_of("diversity/entropy", [(id, 0, 1 - gain / 4) for id in ids], better="higher"),
        ]
        if name != "reference":
            kls = [(id, 0, gain * (2 + 0.1 * e)) for id, e in zip(ids, ease, strict=True)]
            wins = [(id, 0, float(r > 0)) for id, _, r in rewards]
            measures.append(measure_of("kl_policy_ref", kls, unit="nats per response"))
            measures.append(measure_of("win_rate/gold", wins, unit="share", better="higher"))
        settings = {"path": str(run), "against": "reference", "prompts": "prompts.jsonl"}
        contents = {f"prompt {id}": "x" for id in ids}
        PolicyMeasures(name, "tbpo_a", settings, tuple(measures), (), contents).save(folder / name)
        said = answers or (lambda name, id: f"{name} answers {id}.")
        samples = {id: [Response(said(name, id), "eos", (1, 2))] for id in ids}
        write_responses(
            list(zip(ids, prompts, strict=True)),
            lambda _, samples=samples: samples.items(),
            folder / name / "generations.jsonl",
            {"model": name},
            report=str,
        )
    return folder


def wave(share):
    """Something that goes up and down."""
    return math.sin(6 * share)
