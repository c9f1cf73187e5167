"""Kill commands at random moments, run the same command again, and compare what they end with.

`python tests/torture.py [--kills N] [--seed N] [part of a case's name ...]` runs each case once
undisturbed, then again and again with SIGKILLs: at any time, while a checkpoint is written, while
the end of a run is saved, after some answers. Every run that comes to its end must have ended as
the undisturbed one did: weights bit for bit, metrics, answers and judgements byte for byte, no
endpoint asked again for an answer that is on the disk. Exit code 1 if one did not, or if a
traceback was printed.

Commands are forks of this process, which imports the libraries once; they run what `tokenratio`
runs. Those on two processes are started by torchrun, which is killed together with them.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import yaml
from transformers.utils.logging import disable_progress_bar

from evaluation.loopback import KEY, Loopback
from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.main import main as tokenratio
from tokenratio.evaluation.response_files import write_responses
from tokenratio.models.response import Response
from tokenratio.run_folder import UNFINISHED_FOLDER

# What the commands load lazily.
IMPORTED_ONCE = ("transformers.trainer", "transformers.models.llama.modeling_llama", "peft")
IMPORTED_ONCE += ("datasets", "tokenratio.cli.train", "tokenratio.cli.train_reward")
IMPORTED_ONCE += ("tokenratio.evaluation.suite", "tokenratio.training.reward_trainer")
# Times, and the folder, which differs here.
NOT_COMPARED = re.compile("runtime|per_second|seconds|output_dir")
MOMENTS = ("any time", "checkpoint", "end", "after some answers")
# After this many kills a run is left alone until it ends.
MOST_KILLS = 12
NUM_PROMPTS, CONCURRENCY = 40, 2
# Where a recipe keeps its stages.
STAGES = Path("runs")

LORA = {"peft": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}}
# 26 pairs in steps of 2 × 2: an epoch has seven steps, the last of one batch.
RECIPE: dict[str, Any] = {
    "model": "model",
    "train_dataset": "train.jsonl",
    "eval_dataset": "eval.jsonl",
    "max_length": 32,
    "learning_rate": 1.0e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "logging_steps": 3,
    "baseline_hidden_size": 16,
    "use_cpu": True,
}
TRAINED: dict[str, dict[str, Any]] = {
    "tbpo_a": {"loss": "tbpo_a"},
    "tbpo_q": {"loss": "tbpo_q"},
    "tbpo_a, LoRA": {"loss": "tbpo_a", **LORA},
    "tbpo_q, LoRA": {"loss": "tbpo_q", **LORA},
    "tbpo_a, by steps": {"loss": "tbpo_a", "max_steps": 11},
    "tbpo_q, LoRA, by steps": {"loss": "tbpo_q", "max_steps": 10, "save_steps": 3, **LORA},
    "tbpo_a, cached reference": {"loss": "tbpo_a", "cache_reference": True},
    "dpo": {"loss": "dpo"},
    "dpo, LoRA": {"loss": "dpo", **LORA},
    "ipo": {"loss": "ipo"},
    "simpo": {"loss": "simpo"},
    "bpo": {"loss": "bpo"},
    "tdpo2": {"loss": "tdpo2"},
    "sft": {"loss": "sft"},
    "one checkpoint kept": {"loss": "tbpo_a", "save_steps": 1, "save_total_limit": 1},
    "the best kept": {
        "loss": "tbpo_q",
        "load_best_model_at_end": True,
        "save_steps": 3,
        "save_total_limit": 2,
    },
    "by epochs": {
        "loss": "dpo",
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "num_train_epochs": 4,
    },
    "by epochs, to the middle of one": {
        "loss": "dpo",
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "num_train_epochs": 1.5,
    },
    "SFT stage before": {
        "loss": "tbpo_a",
        "sft": {"num_train_epochs": 2, "save_steps": 2, "learning_rate": 1.0e-2},
    },
    "token scores before": {
        "loss": "tis_dpo",
        "score_tokens": {},
        "reference_cache_dir": str(STAGES / "cache"),
    },
}


@dataclass
class Case:
    """A command, and what is compared when it ends.

    Args:
        argv: the command line; `OUT` stands for its folder.
        moments: when it may be killed.
        asks: how many answers of the endpoint an undisturbed run pays for.
        processes: how many torchrun starts.
    """

    name: str
    argv: list[str]
    moments: tuple[str, ...] = MOMENTS[:1]
    asks: int = 0
    processes: int = 1


def cases() -> list[Case]:
    """All cases, with the files that they read written into the working directory."""
    for name, num, seed in (("train", 26, 0), ("eval", 12, 1), ("prompts", NUM_PROMPTS, 2)):
        rows = word_pairs(num, seed=seed)
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    resume = ["--resume_from_checkpoint", "true"]
    for index, (name, settings) in enumerate(TRAINED.items()):
        recipe = f"recipe-{index}.yaml"
        Path(recipe).write_text(yaml.safe_dump({**RECIPE, **settings}))
        argv = ["train", recipe, "--output_dir", "OUT", *resume]
        found.append(Case(name, argv, MOMENTS[:3]))
    Path("two.yaml").write_text(
        yaml.safe_dump({**RECIPE, "loss": "tbpo_q", "gradient_accumulation_steps": 1})
    )
    argv = ["train", "two.yaml", "--output_dir", "OUT", *resume]
    found.append(Case("tbpo_q, two processes", argv, MOMENTS[:3], processes=2))
    reward = {name: value for name, value in RECIPE.items() if name != "baseline_hidden_size"}
    Path("reward.yaml").write_text(yaml.safe_dump(reward))
    argv = ["train-reward", "reward.yaml", "--output_dir", "OUT", *resume]
    found.append(Case("reward model", argv, MOMENTS[:3]))
    sampling = ["--num_samples", "2", "--max_new_tokens", "12"]
    argv = ["generate", "model", "--prompts", "prompts.jsonl", "--batch_size", "2", *sampling]
    argv += ["--output", "OUT/generations.jsonl"]
    found.append(Case("generate", argv))
    found.append(Case("generate, two processes", argv, MOMENTS[3:], processes=2))
    argv = ["evaluate", "model", "--prompts", "prompts.jsonl", "--batch_size", "2", *sampling]
    found.append(Case("evaluate", [*argv, "--output_dir", "OUT"]))
    return found


def endpoint_cases(url: str) -> list[Case]:
    """`generate` and `judge` with an endpoint that counts its answers."""
    argv = ["generate", "some", "--prompts", "prompts.jsonl", "--endpoint", url]
    argv += ["--concurrency", str(CONCURRENCY), "--output", "OUT/generations.jsonl"]
    found = [Case("generate, endpoint", argv, asks=NUM_PROMPTS)]
    for name in ("ours", "theirs"):
        prompts = [(f"p:{number}", f"prompt {number}") for number in range(NUM_PROMPTS)]
        answers = [(id, [Response(f"{name} to {prompt}")]) for id, prompt in prompts]
        write_responses(prompts, lambda _, given=answers: iter(given), f"{name}.jsonl", {})
    argv = ["judge", "ours.jsonl", "--against", "theirs.jsonl", "--judge", "llm"]
    argv += ["--base_url", url, "--model", "some", "--concurrency", str(CONCURRENCY)]
    argv += ["--cache", "OUT/verdicts.sqlite", "--output", "OUT/judgements.jsonl"]
    return [*found, Case("judge, endpoint", argv, asks=2 * NUM_PROMPTS)]


def start(case: Case, folder: Path, log: Path) -> int:
    """The process id of a fork that runs a command, or of torchrun, which runs several."""
    argv = [word.replace("OUT", str(folder)) for word in case.argv]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    launch += [str(case.processes), "-m", "tokenratio", *argv]

    def run() -> int:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        return tokenratio(argv) if case.processes == 1 else os.execv(sys.executable, launch)

    return fork(run)


def fork(work: Callable[[], int | None]) -> int:
    """The process id of a fork that does some work and exits with what it returns."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float | None = None, until: Any = None) -> int | None:
    """The exit code of a process; None if time is up or `until()` first."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or (until is not None and until()):
            return None
        time.sleep(0.001)


def kill_at(
    child: int, folder: Path, moment: str, times: tuple[float, float], rng: random.Random
) -> bool:
    """Kill a process at a moment, unless it ends before; whether it was killed.

    Args:
        times: when an undisturbed run begins to write, and when it ends, in seconds.
    Raises:
        RuntimeError: it ended in an error.
    """
    if moment == "any time":
        code = wait(child, rng.uniform(*times))
    elif moment == "after some answers":
        num = rng.randint(answered(folder), NUM_PROMPTS)
        code = wait(child, 20 * times[1], lambda: answered(folder) > num)
    else:
        name = UNFINISHED_FOLDER if moment == "checkpoint" else "*model.safetensors"
        before, skipped = stamps(folder, name), rng.randrange(3) * (moment == "checkpoint")
        is_there = False

        def comes() -> bool:
            nonlocal is_there, skipped
            was_there, is_there = is_there, bool(stamps(folder, name) - before)
            skipped -= is_there and not was_there
            return is_there and skipped < 0

        code = wait(child, 20 * times[1], comes)
        if code is None:
            time.sleep(rng.uniform(0, 0.02))
    if code is None:
        os.kill(child, signal.SIGSTOP)  # a launcher may be starting processes
        workers = psutil.Process(child).children(recursive=True)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        psutil.wait_procs(workers)
        return True
    if code != 0:
        raise RuntimeError(f"exit code {code}")
    return False


def answered(folder: Path) -> int:
    """How many prompts have been answered, by all processes."""
    return sum(map(count_lines, folder.glob("generations.jsonl*")))


def stamps(folder: Path, name: str) -> set[tuple[int, int]]:
    """What tells a new file or folder of that name from an old one."""
    found = set()
    for path in folder.glob(name):
        with suppress(FileNotFoundError):
            found.add((path.stat().st_ino, path.stat().st_mtime_ns))
    return found


def result(folder: Path) -> dict[str, Any]:
    """What a command ended with: digests of weights and answers, metrics without times."""
    found: dict[str, Any] = {}
    for path in sorted([*folder.rglob("*"), *STAGES.rglob("*")]):
        name = path.as_posix().removeprefix(f"{folder}/")
        if not path.is_file() or "checkpoint-" in name:
            continue
        if path.suffix == ".safetensors":
            found[name] = digests(path)
        elif path.name in ("generations.jsonl", "judgements.jsonl"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("metrics.jsonl", "eval.json", "measures.json"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [compared(json.loads(line)) for line in lines]
    assert found, f"{folder} holds nothing to compare"
    return found


def digests(path: Path) -> dict[str, str]:
    """The digest of each tensor; the order of a file's metadata is another in each process."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:begin])
    tensors.pop("__metadata__", None)
    return {
        f"{name} {tensor['dtype']} {tensor['shape']}": hashlib.sha256(
            content[begin + tensor["data_offsets"][0] : begin + tensor["data_offsets"][1]]
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def compared(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: compared(v) for k, v in value.items() if not NOT_COMPARED.search(k)}
    return value


@dataclass
class Torture:
    """The cases in a working directory, and what became of them."""

    rng: random.Random
    kills: Counter = field(default_factory=Counter)
    met: int = 0  # checkpoints half written or half removed after a kill
    ends: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        print(text, flush=True)
        self.faults.append(text)

    def run(self, case: Case, budget: int, answers: Path) -> int:
        """Kill a case until the budget is used up and a run has ended; how often it was killed."""
        whole, killed = Path("whole"), Path("killed")
        clear(whole, killed, STAGES)
        log = Path(f"{case.name.replace(' ', '_')}.log")
        begin = time.monotonic()
        child = start(case, whole, log)
        code = wait(child, 600, whole.exists)
        begun = time.monotonic() - begin
        code = wait(child) if code is None else code
        seconds = time.monotonic() - begin
        if code != 0:
            self.fault(f"{case.name}: exit code {code} undisturbed, see {log.absolute()}")
            return 0
        expected, num, in_run = result(whole), 0, 0
        clear(STAGES)
        asked = count_lines(answers)
        while True:
            child = start(case, killed, log)
            moment = self.rng.choice(case.moments)
            try:
                if num < budget and in_run < MOST_KILLS:
                    times = (0.0 if case.processes == 1 else begun), seconds
                    was_killed = kill_at(child, killed, moment, times, self.rng)
                else:
                    was_killed = wait(child) != 0
                    if was_killed:
                        raise RuntimeError("a run that was left alone ended in an error")
            except RuntimeError as error:
                self.fault(f"{case.name}, after {in_run} kills: {error}")
                shutil.copytree(killed, f"{killed}-{len(self.faults)}")
                clear(killed, STAGES)
                in_run = 0
                if num >= budget or len(self.faults) > 20:
                    break
                continue
            if was_killed:
                self.kills[moment] += 1
                num, in_run = num + 1, in_run + 1
                self.met += (killed / UNFINISHED_FOLDER).is_dir()
                continue
            self.ends += 1
            found = result(killed)
            if found != expected:
                names = [n for n in {**found, **expected} if found.get(n) != expected.get(n)]
                self.fault(f"{case.name}, after {in_run} kills: {', '.join(names)} differ")
                shutil.copytree(killed, f"{killed}-{len(self.faults)}")
            if case.asks:
                more = count_lines(answers) - asked - case.asks
                if more > in_run * CONCURRENCY:
                    self.fault(f"{case.name}: {more} answers paid twice, {in_run} kills")
                asked = count_lines(answers)
            in_run = 0
            if num >= budget:
                break
            clear(killed, STAGES)
        if "Traceback" in log.read_text():
            self.fault(f"{case.name}: a traceback, see {log.absolute()}")
        print(f"{case.name:26} {num:4} kills, a run of {seconds:.1f} s", flush=True)
        return num


def clear(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def save_model() -> None:
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")


def serve(answers: Path, address: Path) -> None:
    """Be an endpoint, and write a line for each answer."""

    def reply(question: str, number: int) -> str:
        with answers.open("a") as file:
            file.write(json.dumps(question) + "\n")
        digest = hashlib.sha256(question.encode()).hexdigest()
        return f"answer to {digest}\n[[{'AB'[int(digest, 16) % 2]}]]"

    with Loopback(reply, delay=0.01) as server:
        address.with_suffix(".new").write_text(server.url)
        address.with_suffix(".new").rename(address)
        while os.getppid() != 1:
            time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    disable_progress_bar()
    os.environ["OPENAI_API_KEY"] = KEY
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None)
        os.environ.pop(name.lower(), None)
    for name in IMPORTED_ONCE:
        import_module(name)
    work = Path(tempfile.mkdtemp(prefix="tokenratio-torture-"))
    os.environ["HOME"] = str(work)
    os.chdir(work)
    answers, address = work / "answers", work / "address"
    # What computes is in forks only: torch's threads do not survive one.
    wait(fork(save_model))
    server = fork(lambda: serve(answers, address))
    try:
        while not address.exists():
            time.sleep(0.01)
        chosen = [
            case
            for case in (*cases(), *endpoint_cases(address.read_text()))
            if not options.names or any(name in case.name for name in options.names)
        ]
        torture, left = Torture(random.Random(options.seed)), options.kills
        for index, case in enumerate(chosen):
            left -= torture.run(case, -(-left // (len(chosen) - index)), answers)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    print(
        f"{torture.kills.total()} kills: " + ", ".join(f"{torture.kills[m]} {m}" for m in MOMENTS)
    )
    print(f"{torture.met} left a checkpoint half written or half removed")
    print(f"{torture.ends} runs came to their end, {len(torture.faults)} faults")
    if not torture.faults:
        os.chdir("/")
        shutil.rmtree(work)
    return bool(torture.faults)


if __name__ == "__main__":
    sys.exit(main())
