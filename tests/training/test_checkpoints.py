"""Checkpoints are complete or not there; damage is named, and the one before is used."""

import hashlib
import inspect
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer import Trainer

from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import UNFINISHED_FOLDER
from tokenratio.training.checkpoints import (
    MANIFEST_FILE,
    checkpoints_of,
    defect,
    last_checkpoint,
    publish,
    remove_surplus,
    resolve_checkpoint,
    what_is_kept,
)
from tokenratio.training.saving import SavingTrainer
from training.short_runs import assert_identical, state_of, trainer_in

DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    ),
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two of its steps. Read only: copy before changing it."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        trainer_in(folder, "tbpo_a", cut=2).train()
    return folder


@pytest.fixture
def run(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def damage(path, how):
    path.write_bytes(DAMAGE[how](path.read_bytes()))


def names(folder):
    return [path.name for path in checkpoints_of(folder)]


def test_a_checkpoint_has_another_name_until_it_is_complete(tmp_path, monkeypatch):
    seen = []

    def save_rng_state(self, output_dir):
        seen.append((os.path.relpath(output_dir, tmp_path), names(tmp_path)))
        saves(self, output_dir)

    saves = Trainer._save_rng_state
    monkeypatch.setattr(Trainer, "_save_rng_state", save_rng_state)
    trainer_in(tmp_path, "tbpo_a", max_steps=2).train()
    assert seen == [
        (f"{UNFINISHED_FOLDER}/checkpoint-1", []),
        (f"{UNFINISHED_FOLDER}/checkpoint-2", ["checkpoint-1"]),
    ]
    assert not (tmp_path / UNFINISHED_FOLDER).exists()


def test_the_manifest_is_that_of_every_file(begun):
    folder = begun / "checkpoint-2"
    recorded = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]
    assert recorded == {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    assert {*FILES, "trainer_state.json", "run.json"} < recorded.keys()


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    def fails(self, output_dir):
        if output_dir.endswith("-2"):
            raise RuntimeError("no more")

    monkeypatch.setattr(Trainer, "_save_scaler", fails)
    with pytest.raises(RuntimeError, match="no more"):
        trainer_in(tmp_path, "tbpo_a").train()
    assert names(tmp_path) == ["checkpoint-1"]
    assert not (tmp_path / UNFINISHED_FOLDER).exists()
    assert defect(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "trainer_state.json", "run.json", MANIFEST_FILE])
def test_damage_is_named_and_the_one_before_is_used(run, name, how, caplog):
    newest = run / "checkpoint-2"
    damage(newest / name, how)
    if (name, how) == (MANIFEST_FILE, "flipped"):  # then any file may be the one that differs
        name = ""
    assert resolve_checkpoint(True, run) == run / "checkpoint-1"
    (said,) = caplog.messages
    assert f"{newest} is skipped: {name}" in said
    with pytest.raises(TokenRatioError, match=f"not a complete checkpoint: {name}"):
        resolve_checkpoint(newest, run)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_without_a_manifest(run, name, how):
    """As far as the files have checksums of their own: safetensors has none."""
    newest = run / "checkpoint-2"
    (newest / MANIFEST_FILE).unlink()
    assert defect(newest) is None
    damage(newest / name, how)
    # Half of the small scheduler.pt is padding.
    if how != "flipped" or name in ("optimizer.pt", "rng_state.pth"):
        assert defect(newest).startswith(f"{name} is ")
        assert last_checkpoint(run, quiet=True) == run / "checkpoint-1"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run, name):
    (run / "checkpoint-2" / name).unlink()
    assert "cannot be resumed exactly" in defect(run / "checkpoint-2")
    assert last_checkpoint(run, quiet=True) == run / "checkpoint-1"


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}', '{"files": {"model": 1}}'])
def test_a_manifest_of_another_shape_is_refused(run, text):
    (run / "checkpoint-2" / MANIFEST_FILE).write_text(text)
    assert defect(run / "checkpoint-2") is not None


def test_without_digests_only_sizes_are_compared(run):
    newest = run / "checkpoint-2"
    damage(newest / "optimizer.pt", "flipped")
    assert defect(newest, digests=False) is None
    damage(newest / "optimizer.pt", "cut")
    assert "optimizer.pt has" in defect(newest, digests=False)


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_ends_the_same(run, tmp_path):
    trainer_in(tmp_path / "whole", "tbpo_a").train()
    damage(run / "checkpoint-2" / "optimizer.pt", "flipped")
    trainer_in(run, "tbpo_a").train(resume_from_checkpoint=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(run))
    assert defect(run / "checkpoint-2") is None  # written again


def test_what_a_killed_run_left_is_said_once_and_removed(run, caplog):
    left = run / UNFINISHED_FOLDER / "checkpoint-3"
    shutil.copytree(run / "checkpoint-2", left)
    (left / MANIFEST_FILE).unlink()
    earlier = run / "unfinished-checkpoint"  # its name in earlier versions
    earlier.mkdir()
    assert last_checkpoint(run) == run / "checkpoint-2"
    caplog.set_level(logging.WARNING)
    trainer_in(run, "tbpo_a").train(resume_from_checkpoint=True)
    assert sum("holds checkpoint-3" in message for message in caplog.messages) == 1
    assert not left.parent.exists()
    assert not earlier.exists()


def test_uploads_leave_out_what_is_unfinished():
    """transformers ignores this pattern."""
    assert '"_*"' in inspect.getsource(Trainer._push_from_checkpoint)
    assert UNFINISHED_FOLDER.startswith("_")


def test_a_checkpoint_survives_a_kill_while_it_is_replaced(run, monkeypatch, caplog):
    """Between the renames of the old one and of the new one, which is complete."""
    shutil.rmtree(run / "checkpoint-1")
    written, checkpoint = run / UNFINISHED_FOLDER / "checkpoint-2", run / "checkpoint-2"
    shutil.copytree(checkpoint, written)
    rename = os.rename

    def killed(old, new):
        rename(old, new)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(written, checkpoint)
    assert names(run) == []
    trainer = trainer_in(run, "tbpo_a", max_steps=2, resume_with_changes=True)
    trainer.add_callback(Refuses())
    assert trainer.train(resume_from_checkpoint=True).global_step == 2
    assert f"{checkpoint} was complete, and has its name now" in caplog.text
    assert defect(checkpoint) is None
    assert not written.parent.exists()


@pytest.mark.parametrize("text", ["", '{"global_step": 2, "log_hi', "[]"])
def test_a_damaged_state_is_not_an_unfinished_checkpoint(text, run):
    """Its weights may be whole: no new run starts over it, with a manifest or without."""
    for name in names(run):
        (run / name / MANIFEST_FILE).unlink()
        (run / name / "trainer_state.json").write_text(text)
    with pytest.raises(TokenRatioError, match=r"checkpoint-2: trainer_state\.json is missing or"):
        trainer_in(run, "tbpo_a").train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-1", "checkpoint-2"]


def test_the_start_of_another_run_is_not_written_over(run):
    for name in names(run):
        shutil.rmtree(run / name)
    with pytest.raises(TokenRatioError, match=r"holds the start of another run \(tbpo_a\)"):
        trainer_in(run, "dpo").train(resume_from_checkpoint=True)
    trainer_in(run, "tbpo_a", max_steps=1).train(resume_from_checkpoint=True)


def test_checkpoints_that_cannot_be_resumed_are_said(run):
    assert "The newest checkpoint is" in what_is_kept(run)
    for name in names(run):
        (run / name / "optimizer.pt").unlink()
    kept = what_is_kept(run)
    assert f"{run / 'checkpoint-2'} cannot be resumed: it was saved without its optimizer" in kept
    assert what_is_kept(run / "none") == "No checkpoint has been written yet"


def test_a_checkpoint_that_cannot_be_replaced_is_kept(run, monkeypatch):
    """The second rename fails; what is beside the new one is then removed."""
    checkpoint, rename = run / "checkpoint-2", os.rename
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    written = shutil.copytree(checkpoint, run / UNFINISHED_FOLDER / "checkpoint-2")

    def fails(source, target):
        if source == written:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        publish(written, checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in written.parent.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        (None, [1, 2, 3, 4, 5]),
        (0, [1, 2, 3, 4, 5]),
        (9, [1, 2, 3, 4, 5]),
        (4, [1, 2, 3, 5]),
        (3, [1, 3, 5]),
        (2, [1, 5]),
        (1, [1, 5]),
    ],
)
def test_retention_removes_damaged_then_old_ones(run, limit, left):
    for step in (3, 4, 5):
        shutil.copytree(run / "checkpoint-2", run / f"checkpoint-{step}")
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    remove_surplus(run, limit, [run / "checkpoint-5", run / "checkpoint-1"])
    assert names(run) == [f"checkpoint-{step}" for step in left]
    assert not (run / UNFINISHED_FOLDER).exists()


def test_retention_keeps_the_one_just_written(run):
    """Where a later one is there, damaged or of a run that went on from an earlier step."""
    for step in (7, 8):
        shutil.copytree(run / "checkpoint-2", run / f"checkpoint-{step}")
    damage(run / "checkpoint-8" / "optimizer.pt", "empty")
    with pytest.raises(KeyboardInterrupt):
        trainer_in(run, "tbpo_a", cut=3, save_total_limit=1).train(run / "checkpoint-2")
    assert names(run) == ["checkpoint-3"]


@pytest.mark.slow
def test_the_best_checkpoint_is_recorded_by_its_own_name(tmp_path):
    settings = {"load_best_model_at_end": True, "save_steps": 3, "save_total_limit": 1}
    trainer = trainer_in(tmp_path, "tbpo_a", metric_for_best_model="eval_loss", **settings)
    trainer.train()
    best = str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert trainer.state.best_model_checkpoint == best
    state = json.loads((tmp_path / names(tmp_path)[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


BEST = {"load_best_model_at_end": True, "eval_steps": 1, "metric_for_best_model": "eval_loss"}


def settled_on(monkeypatch, step):
    """Makes a step's checkpoint the best."""
    monkeypatch.setattr(
        SavingTrainer,
        "_determine_best_metric",
        lambda self, metrics, trial: self.state.global_step == step and _is_best(self, step),
    )


def _is_best(trainer, step):
    trainer.state.best_metric, trainer.state.best_global_step = 0.0, step
    return True


def test_a_finished_run_keeps_its_last_checkpoint_beside_the_best(tmp_path, monkeypatch):
    settled_on(monkeypatch, 1)
    trainer = trainer_in(tmp_path, "tbpo_a", save_total_limit=1, max_steps=3, **BEST)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert trainer.args.save_total_limit == 1
    again = trainer_in(tmp_path, "tbpo_a", save_total_limit=1, max_steps=3, **BEST)
    again.add_callback(Refuses())
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


class Refuses(TrainerCallback):
    """Lets no step begin."""

    def on_step_begin(self, args, state, control, **_):
        raise AssertionError("trains further")


@pytest.mark.parametrize("how", ["moved", "copied", "elsewhere"])
def test_the_best_checkpoint_is_that_of_the_resumed_folder(how, tmp_path, monkeypatch):
    """Its path is recorded as the run had it: relative, or of where the folder was."""
    settled_on(monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    settings = {"save_total_limit": 2, "max_steps": 4, **BEST}
    with pytest.raises(KeyboardInterrupt):
        trainer_in("run", "tbpo_a", cut=3, **settings).train()
    folder = tmp_path / "there"
    (shutil.copytree if how == "copied" else shutil.move)("run", folder)
    if how == "elsewhere":
        (tmp_path / "other").mkdir()
        monkeypatch.chdir("other")
        folder = "../there"
    trainer = trainer_in(folder, "tbpo_a", **settings)
    trainer.train(resume_from_checkpoint=True)
    assert names(folder) == ["checkpoint-1", "checkpoint-4"]
    best = Path(folder, "checkpoint-1")
    assert trainer.state.best_model_checkpoint == str(best)
    ends = load_file(best / "model.safetensors")
    assert_identical(ends, {name: trainer.model.state_dict()[name] for name in ends})


def test_a_checkpoint_is_pushed_under_its_own_name(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((folder, defect(tmp_path / "checkpoint-1"))),
    )
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    trainer = trainer_in(tmp_path, "tbpo_a", max_steps=1)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-1"), None)]


class CutAfterEpoch(TrainerCallback):
    """Ends the process between an epoch's last step and its evaluation."""

    def on_epoch_end(self, args, state, control, **_):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_the_evaluation_at_an_epochs_end_is_not_lost(tmp_path):
    """A run resumed after an epoch's last step begins the next one."""
    settings = {"eval_strategy": "epoch", "max_steps": 6}
    trainer_in(tmp_path / "whole", "tbpo_a", **settings).train()
    trainer = trainer_in(tmp_path / "cut", "tbpo_a", **settings)
    trainer.add_callback(CutAfterEpoch())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer_in(tmp_path / "cut", "tbpo_a", **settings).train(resume_from_checkpoint=True)
    assert_identical(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


class CutAtEnd(TrainerCallback):
    """Ends the process between a run's last step and its evaluation."""

    def on_epoch_end(self, args, state, control, **_):
        if state.global_step == state.max_steps:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_the_evaluation_at_the_end_within_an_epoch_is_not_lost(tmp_path, strategy):
    """A run resumed from its last step's checkpoint is finished, and not evaluated any more."""
    settings = {"eval_strategy": "epoch", "num_train_epochs": 1.5, "max_steps": -1}
    settings |= {"save_strategy": strategy}
    trainer_in(tmp_path / "whole", "dpo", **settings).train()
    trainer = trainer_in(tmp_path / "cut", "dpo", **settings)
    trainer.add_callback(CutAtEnd())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer_in(tmp_path / "cut", "dpo", **settings).train(resume_from_checkpoint=True)
    whole = state_of(tmp_path / "whole")
    assert sum("eval_loss" in line for line in whole["metrics"]) == 2
    assert_identical(whole, state_of(tmp_path / "cut"))


@pytest.mark.slow
def test_a_part_of_an_epoch_is_trained_to_its_end(tmp_path):
    """The first of two steps takes four of seven batches, but 0.55 epochs are two steps."""
    settings = {"num_train_epochs": 0.55, "max_steps": -1, "gradient_accumulation_steps": 4}
    whole = trainer_in(tmp_path / "whole", "tbpo_a", **settings)
    assert whole.train().global_step == 2
    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path / "cut", "tbpo_a", cut=1, **settings).train()
    resumed = trainer_in(tmp_path / "cut", "tbpo_a", **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 2
    assert_identical(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
