"""`generate`, `evaluate` and `score-tokens` on two gloo processes do what one process does."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cli import shared_commands
from evaluation.loopback import KEY, Loopback, wait_until
from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.main import main
from tokenratio.training.token_contrast import TokenContrast

pytestmark = pytest.mark.slow

NUM_PROMPTS = 23
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SAMPLING = ["--dtype", "float32", "--max_new_tokens", "8"]
GENERATE = ["generate", "model", "--prompts", "prompts.jsonl", *SAMPLING]
# Twelve rows, four prompts, are the least that a process does.
UNEVEN = [*GENERATE, "--num_samples", "3", "--batch_size", "4"]
SLOW = ["generate", "model", "--prompts", "many.jsonl", *SAMPLING, "--batch_size", "2"]


def commands(out, address):
    judges = {
        "implicit": {"policy": "policy", "reference": "model"},
        "llm": {"base_url": address, "model": "judge"},
    }
    evaluate = ["evaluate", "policy", "--reference", "model", "--num_samples", "2", *SAMPLING]
    evaluate += ["--prompts", "prompts.jsonl", "--num_prompts", "7", "--pairs", "pairs.jsonl"]
    score = ["score-tokens", "pairs.jsonl", "--positive_model", "policy", "--batch_size", "4"]
    return [
        [*UNEVEN, "--output", f"{out}/uneven.jsonl"],
        [*UNEVEN, "--output", f"{out}/resumed.jsonl"],
        [*GENERATE, "--num_prompts", "1", "--output", f"{out}/empty.jsonl"],
        [*GENERATE, "--num_prompts", "1", "--output", f"{out}/not UTF-8 \udcff.jsonl"],
        [*evaluate, "--judges", json.dumps(judges), "--output_dir", f"{out}/evaluation"],
        [*score, "--negative_model", "model", "--output", f"{out}/scores", "--cache_dir", out],
    ]


def environment():
    here = str(Path(shared_commands.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data; the working directory."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPENAI_API_KEY", KEY)
        for seed, name in enumerate(("model", "policy")):
            tiny_model(seed=seed).save_pretrained(name)
            tiny_tokenizer().save_pretrained(name)
        for name, num in (("prompts", NUM_PROMPTS), ("pairs", 9), ("many", 600)):
            rows = [json.dumps(row) + "\n" for row in word_pairs(num, seed=num)]
            Path(f"{name}.jsonl").write_text("".join(rows))
        yield folder


@pytest.fixture(scope="module")
def launched(folder):
    """What two processes printed, and how many answers a judge was paid for by one and by two."""

    def verdict(question, _):
        return "[[A]]" if len(question) % 2 else "[[B]]"

    with Loopback(verdict) as server:
        for argv in commands("one", server.url):
            assert main(argv) == 0
        paid = server.answered.total()
        interrupt_three_processes("one", "two")
        argument = json.dumps(commands("two", server.url))
        result = subprocess.run(
            [*LAUNCH, shared_commands.__file__, argument],
            env=environment(),
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-8000:]
        return result.stdout, paid, server.answered.total() - paid


def interrupt_three_processes(whole, interrupted):
    """Leave what three processes leave that are killed in the middle of `resumed.jsonl`."""
    lines = Path(whole, "resumed.jsonl").read_bytes().splitlines(keepends=True)
    Path(interrupted).mkdir()
    path = Path(interrupted, "resumed.jsonl")
    path.write_bytes(b"".join(lines[:3]))
    path.with_name(f"{path.name}.process-1.part").write_bytes(b"".join(lines[5:9]) + lines[9][:40])
    path.with_name(f"{path.name}.process-2.part").write_bytes(b"")
    shutil.copy(Path(whole, "resumed.settings.json"), interrupted)


def measured(folder):
    """The measures of each policy by name, without paths."""
    found = {}
    for path in sorted(Path(folder, "evaluation").glob("*/measures.json")):
        document = json.loads(path.read_text())
        found[path.parent.name] = {each["name"]: each for each in document["measures"]}
    return found


@pytest.mark.parametrize("name", ["uneven", "resumed", "empty"])
def test_each_prompt_is_answered_once_and_as_by_one_process(launched, name):
    one, two = (Path(each, f"{name}.jsonl").read_text() for each in ("one", "two"))
    assert two == one
    assert len(one.splitlines()) == (1 if name == "empty" else NUM_PROMPTS)


def test_nothing_is_left_beside_the_results(launched):
    one, two = (sorted(path.name for path in Path(each).iterdir()) for each in ("one", "two"))
    cached = re.compile("[0-9a-f]{64}")  # of the reference, the same for both
    assert [name for name in two if not cached.fullmatch(name)] == [
        name for name in one if not cached.fullmatch(name)
    ]


def test_only_the_first_process_prints(launched):
    printed, _, _ = launched
    assert printed.count(f"{3 * NUM_PROMPTS} responses to {NUM_PROMPTS} prompts in ") == 2
    assert printed.count("resumed.jsonl: the last line was cut off") == 1
    assert printed.count(f"7 of {NUM_PROMPTS} prompts are already answered") == 1


def test_two_processes_measure_what_one_does(launched):
    one, two = measured("one"), measured("two")
    assert one.keys() == two.keys() == {"reference", "policy"}
    for name, measures in one.items():
        assert measures == two[name]
    assert {"kl_policy_ref", "pairs/accuracy", "diversity/entropy"} <= one["policy"].keys()
    for path in Path("one", "evaluation").rglob("*.jsonl"):
        assert path.read_text() == Path("two", *path.parts[1:]).read_text()


def test_a_paid_judge_is_asked_by_one_process(launched):
    _, paid, paid_by_two = launched
    assert paid == paid_by_two > 14


def test_two_processes_score_tokens_as_one_does(launched):
    one, two = (TokenContrast.open(f"{each}/scores") for each in ("one", "two"))
    assert one.ingredients == two.ingredients
    assert len(one.values) == 9
    for key, sides in one.values.items():
        assert all((a == b).all() for a, b in zip(sides, two.values[key], strict=True))


def lines_of(name):
    """The whole lines in a file and its parts."""
    return sum(path.read_bytes().count(b"\n") for path in Path().glob(f"{name}*"))


def start(argv, name):
    """The launcher of two processes, and the two by rank, once both have written some lines."""
    launcher = subprocess.Popen(
        [*LAUNCH, "-m", "tokenratio", *argv],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    before = [lines_of(name), lines_of(f"{name}.process-1.part")]

    def have_begun():
        assert launcher.poll() is None, launcher.stderr.read()
        now = [lines_of(name), lines_of(f"{name}.process-1.part")]
        return now[1] >= 3 and now[0] - before[0] >= 6

    wait_until(have_begun)
    workers = psutil.Process(launcher.pid).children()
    return launcher, {worker.environ()["RANK"]: worker for worker in workers}


def test_what_killed_processes_answered_is_kept(folder, capsys):
    """One of two is killed; then both, with their launcher; then one process goes on."""
    assert main([*SLOW, "--output", "undisturbed.jsonl"]) == 0
    name = "killed.jsonl"
    launcher, workers = start([*SLOW, "--output", name], name)
    since = time.monotonic()
    workers["1"].kill()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - since < 30
    assert launcher.returncode != 0
    assert not workers["0"].is_running()
    assert re.search(r"rank +: 1 ", errors)
    assert "SIGKILL" in errors
    kept = lines_of(name)
    launcher, workers = start([*SLOW, "--output", name], name)
    for process in (launcher, *workers.values()):
        process.kill()
    launcher.communicate()
    wait_until(lambda: not any(worker.is_running() for worker in workers.values()))
    assert lines_of(name) > kept
    capsys.readouterr()
    kept = lines_of(name)
    assert main([*SLOW, "--output", name]) == 0
    assert f"{kept} of 600 prompts are already answered" in capsys.readouterr().out
    assert Path(name).read_text() == Path("undisturbed.jsonl").read_text()
    assert sorted(path.name for path in Path().glob("killed*")) == [name, "killed.settings.json"]


def test_a_mistake_is_said_once(folder):
    argv = ["-m", "tokenratio", "generate", "model", "--prompts", "missing.jsonl"]
    result = subprocess.run(
        [*LAUNCH, *argv], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert len(re.findall("tokenratio: .*missing.jsonl", result.stderr)) == 1
