"""SIGTERM and SIGINT: a checkpoint after the step, then the end; a second one ends at once."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tokenratio.run_folder import UNFINISHED_FOLDER
from tokenratio.training.checkpoints import checkpoints_of, defect
from tokenratio.training.stop_signals import StopSignals
from training.short_runs import STEPS, assert_identical, state_of, trainer_in


class Sends(TrainerCallback):
    """Sends this process signals in the middle of a step."""

    def __init__(self, step, *numbers, event="on_pre_optimizer_step"):
        self.step, self.numbers = step, numbers
        setattr(self, event, self.send)

    def send(self, args, state, control, **_):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


ENDS = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer_in(folder, "tbpo_a", save_steps=4).train()
    return state_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["steps", "no"])
@pytest.mark.parametrize("number", ENDS)
def test_a_signal_saves_a_checkpoint_and_ends_the_run(number, strategy, tmp_path, whole, caplog):
    """After step 3, where nothing was to be saved."""
    before = [signal.getsignal(each) for each in ENDS]
    trainer = trainer_in(tmp_path, "tbpo_a", save_steps=4, save_strategy=strategy)
    trainer.add_callback(Sends(2, number))
    with pytest.raises(ENDS[number]) as end:
        trainer.train()
    assert [signal.getsignal(each) for each in ENDS] == before
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-3"]
    assert defect(tmp_path / "checkpoint-3") is None
    said = (
        f"stopped by {number.name} after step 3. The newest checkpoint is {tmp_path}/checkpoint-3"
    )
    if number == signal.SIGTERM:
        assert end.value.code == 143
        assert said in caplog.text
    else:
        assert said in str(end.value)
    assert f"{number.name}: a checkpoint is saved after this step" in caplog.text
    trainer_in(tmp_path, "tbpo_a", save_steps=4).train(resume_from_checkpoint=True)
    assert_identical(whole, state_of(tmp_path))


@pytest.mark.parametrize("step", [2, STEPS - 1])
def test_a_step_is_not_saved_twice(step, tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path, "tbpo_a")
    saved, save = [], trainer._save_checkpoint
    monkeypatch.setattr(
        trainer,
        "_save_checkpoint",
        lambda *args: (saved.append(trainer.state.global_step), save(*args)),
    )
    trainer.add_callback(Sends(step, signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.train()
    assert saved == list(range(1, step + 2))


def test_a_signal_at_the_very_end_still_ends_the_run(tmp_path):
    """The caller must not go on as if nothing had been asked."""
    trainer = trainer_in(tmp_path, "tbpo_a", max_steps=1)
    trainer.add_callback(Sends(1, signal.SIGTERM, event="on_train_end"))
    with pytest.raises(SystemExit):
        trainer.train()
    assert defect(tmp_path / "checkpoint-1") is None


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    trainer = trainer_in(tmp_path, "tbpo_a")
    trainer.add_callback(Sends(2, signal.SIGTERM, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / UNFINISHED_FOLDER).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_is_kept(tmp_path):
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        trainer = trainer_in(tmp_path, "tbpo_a", max_steps=2)
        trainer.add_callback(Sends(1, signal.SIGTERM))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_children_end_on_sigterm():
    """As a pool's workers are ended by the pool; SIGINT is left to the parent."""
    context = multiprocessing.get_context("fork")
    with StopSignals() as signals:
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        os.kill(child.pid, signal.SIGINT)
        child.join(0.2)
        assert child.is_alive()
        child.terminate()
        child.join(10)
        code = child.exitcode
        child.kill()
    assert code == -signal.SIGTERM
    assert signals.received == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_pool_within_training_ends():
    code = "import multiprocessing as m; from tokenratio.training.stop_signals import StopSignals\n"
    code += "with StopSignals(), m.get_context('fork').Pool(2) as p: print(p.map(abs, [-1, -2]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1, 2]\n", done.stderr


@pytest.mark.slow
def test_an_epochs_evaluation_comes_before_the_end(tmp_path):
    """A run resumed after the epoch's last step would not evaluate it."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer_in(tmp_path / "whole", "tbpo_a", **settings).train()
    trainer = trainer_in(tmp_path / "cut", "tbpo_a", **settings)
    trainer.add_callback(Sends(3, signal.SIGTERM))  # in the last of four steps
    with pytest.raises(SystemExit):
        trainer.train()
    assert [path.name for path in checkpoints_of(tmp_path / "cut")] == ["checkpoint-4"]
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    trainer_in(tmp_path / "cut", "tbpo_a", **settings).train(resume_from_checkpoint=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


ON_TWO = """
import os, signal, sys
from training.short_runs import trainer_in
from training.test_stop_signals import Sends
trainer = trainer_in(sys.argv[1], "tbpo_a", save_strategy="no")
if trainer.args.process_index == 1:
    trainer.add_callback(Sends(2, signal.SIGTERM))
try:
    trainer.train()
except SystemExit as stop:  # past gloo's threads, as the command line does it
    sys.stderr.flush()
    os._exit(stop.code)
"""


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_with_a_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ON_TWO, str(tmp_path)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [143, 143], first + second
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-3"]
    assert defect(tmp_path / "checkpoint-3") is None
    assert "stopped by SIGTERM after step 3. The newest checkpoint is" in first
    assert "SIGTERM" not in second
