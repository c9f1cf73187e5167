"""`make cases`: a line for each script, its verdict from exit code and last line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "cases.sh"
RIGHT = "01-good", "echo more; echo RIGHT: as it should be"
FAULT = "02-bad", "echo FAULT: wrong value; exit 1"
NEEDS = "03-needs", "echo 'needs: apt-get install faketime'; exit 2"
CRASH = "04-crash", "echo RIGHT: but it ends badly; exit 3"
OTHER = "attack", "echo FAULT; exit 1"


def run(folder):
    return subprocess.run(
        ["bash", str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PY": sys.executable},
    )


@pytest.mark.parametrize(
    ("scripts", "code", "verdicts", "summary"),
    [
        ((RIGHT, NEEDS, OTHER), 0, ["RIGHT", "needs"], "1 right, 0 at fault, 1 not run"),
        ((RIGHT, FAULT), 1, ["RIGHT", "FAULT"], "1 right, 1 at fault, 0 not run"),
        ((CRASH,), 1, ["FAULT"], "0 right, 1 at fault, 0 not run"),
    ],
)
def test_verdicts(scripts, code, verdicts, summary, tmp_path):
    for name, text in scripts:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.sh").write_text(text + "\n")
    result = run(tmp_path)
    *lines, last = result.stdout.splitlines()
    assert result.returncode == code
    assert [line.split()[0] for line in lines] == verdicts
    assert last.startswith(summary)


def test_without_the_folder_it_says_so(tmp_path):
    result = run(tmp_path / "none")
    assert result.returncode == 0
    assert "skipped, there is no folder" in result.stdout
