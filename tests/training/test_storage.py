"""A folder that can no longer be written to: one line that says why and what is kept."""

import errno
import os
import shutil
import subprocess
from contextlib import nullcontext

import pytest
import torch
from transformers import TrainerCallback

from tokenratio.errors import StorageError
from tokenratio.run_folder import UNFINISHED_FOLDER
from tokenratio.training import storage
from tokenratio.training.checkpoints import defect, last_checkpoint
from training.short_runs import trainer_in


class Does(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.what()


def stopped(folder, what, **settings):
    """The message of a run to whose folder something happens after two steps."""
    trainer = trainer_in(folder, "tbpo_a", **settings)
    trainer.add_callback(Does(2, what))
    with pytest.raises(StorageError) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def mounted(tmp_path):
    """Mounts small file systems, where that is allowed."""
    points = []

    def mount(size):
        point = tmp_path / f"disk-{len(points)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_is_said_and_the_checkpoint_before_kept(mounted):
    """torch's own words are `unexpected pos 64 vs 0`."""
    disk = mounted("400k")

    def fill():
        free = os.statvfs(disk)
        with (disk / "other").open("wb") as file:
            file.write(bytes(free.f_bavail * free.f_frsize - 40_000))

    said = stopped(disk / "run", fill)
    assert said.startswith("the disk is full: free space")
    assert f"The newest checkpoint is {disk}/run/checkpoint-2: --resume_from" in said
    assert not (disk / "run" / UNFINISHED_FOLDER).exists()
    assert defect(disk / "run" / "checkpoint-2") is None
    (disk / "other").unlink()
    trainer_in(disk / "run", "tbpo_a", save_total_limit=1).train(resume_from_checkpoint=True)


def test_a_folder_that_became_read_only_is_said(mounted, monkeypatch):
    # mount refuses where a file is open, as the run's lock is; a disk that fails does not ask.
    monkeypatch.setattr("tokenratio.training.resume.output_held", lambda args: nullcontext())
    disk = mounted("8m")
    remount = ["mount", "-o", "remount,ro", str(disk)]
    said = stopped(disk / "run", lambda: subprocess.run(remount, check=True))
    assert f"{disk}/run cannot be written to: Read-only file system" in said
    assert "checkpoint-2: --resume_from_checkpoint true resumes it" in said


@pytest.mark.parametrize("error", ["[enforce fail at inline_container.cc:664] . unexpected pos 1"])
def test_torchs_words_for_a_full_disk_are_known(error, tmp_path, monkeypatch):
    """Where no file system can be mounted."""

    def fails(*_, **__):
        raise RuntimeError(error)

    refusal = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(storage, "_refusal", lambda _: refusal)
    said = stopped(tmp_path, lambda: monkeypatch.setattr(torch, "save", fails))
    assert said.startswith("the disk is full")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("logging_steps", [1, 500])  # metrics or a checkpoint are written first
def test_a_folder_that_was_deleted_or_moved_is_said(logging_steps, tmp_path):
    for what in (shutil.rmtree, lambda folder: shutil.move(folder, tmp_path / "elsewhere")):
        folder = tmp_path / "run"
        said = stopped(folder, lambda what=what, at=folder: what(at), logging_steps=logging_steps)
        assert f"the run's folder {folder} was deleted or moved" in said
        assert "--resume_from_checkpoint true" in said
        assert not folder.exists()  # nothing is written there as if nothing had happened
    assert defect(tmp_path / "elsewhere" / "checkpoint-2") is None


def test_another_error_is_not_the_disks(tmp_path):
    def fails():
        raise RuntimeError("something else")

    trainer = trainer_in(tmp_path, "tbpo_a")
    trainer.add_callback(Does(2, fails))
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()
