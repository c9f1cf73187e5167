"""An error that nobody expected is one line that says what is kept and what to do."""

import errno
import json
import os
import signal

import pytest
import yaml
from transformers import TrainerCallback

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli import stages
from tokenratio.cli.failures import describe_failure
from tokenratio.cli.main import main
from tokenratio.training.trainer import TokenRatioTrainer


class Failing(TrainerCallback):
    def __init__(self, error, step):
        self.error, self.step = error, step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step and isinstance(self.error, signal.Signals):
            os.kill(os.getpid(), self.error)
        elif state.global_step == self.step:
            raise self.error


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Train from a recipe and fail at a step; what is printed on standard error."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    capsys.readouterr()
    data = "".join(json.dumps(row) + "\n" for row in word_pairs(12))
    (tmp_path / "pairs.jsonl").write_text(data)
    document = {
        "model": str(tmp_path / "base"),
        "train_dataset": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_length": 32,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))

    def fail(error, step):
        class FailingTrainer(TokenRatioTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.add_callback(Failing(error, step))

        monkeypatch.setattr(stages, "TokenRatioTrainer", FailingTrainer)
        code = main(["train", str(tmp_path / "recipe.yaml"), "--overwrite"])
        return code, capsys.readouterr().err

    return fail


def test_an_unexpected_error_is_one_line(run, tmp_path):
    code, printed = run(KeyError("eval_accuracy"), 3)
    assert code == 1
    assert printed.count("\n") == 1
    assert "train stopped on an unexpected error: 'eval_accuracy'" in printed
    assert f"newest checkpoint is {tmp_path / 'run' / 'checkpoint-2'}" in printed
    assert "--resume_from_checkpoint true" in printed
    assert "TOKENRATIO_DEBUG=1" in printed
    assert "test_failures.py" in printed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ],
    ids=str,
)
def test_out_of_memory_says_what_to_lower(error, run):
    for step in (0, 1):  # the first step needs as much as any
        code, printed = run(error, step)
        assert code == 1
        assert "out of memory: lower per_device_train_batch_size" in printed
    assert "No checkpoint has been written yet" in printed


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=str,
)
def test_a_full_disk_is_named(error, run):
    code, printed = run(error, 3)
    assert code == 1
    assert "the disk is full: free space" in printed
    assert "checkpoint-2" in printed


def test_an_interrupted_run_says_what_is_kept(run):
    code, printed = run(KeyboardInterrupt(), 3)
    assert code == 130
    assert "interrupted. The newest checkpoint is" in printed


def test_a_signal_ends_a_run_with_its_code(run, caplog):
    kept = "The newest checkpoint is"
    code, printed = run(signal.SIGINT, 2)
    assert code == 130
    assert f"interrupted. {kept}" in printed
    assert "checkpoint-3: --resume_from_checkpoint true resumes it" in printed
    code, printed = run(signal.SIGTERM, 2)
    assert code == 143
    assert printed == ""
    assert f"stopped by SIGTERM after step 3. {kept}" in caplog.text


def test_a_file_that_cannot_be_written_is_named():
    error = OSError(errno.EROFS, "Read-only file system", "o/run.json")
    assert describe_failure(error, "train") == "train stopped: o/run.json: Read-only file system"


def test_before_the_first_step_a_setting_is_at_fault(run):
    code, printed = run(ValueError("no such kernel"), 0)
    assert code == 2
    assert "the run cannot be started" in printed
    assert "no such kernel" in printed


def test_the_traceback_is_there_for_the_asking(run, monkeypatch):
    monkeypatch.setenv("TOKENRATIO_DEBUG", "1")
    with pytest.raises(KeyError):
        run(KeyError("x"), 3)


def test_an_error_without_a_message():
    assert "stopped on an unexpected error: no message" in describe_failure(RuntimeError(), "judge")
