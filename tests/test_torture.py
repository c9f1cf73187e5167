"""A few kills of `make torture`, which does more than a hundred."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).with_name("torture.py")


@pytest.mark.slow
def test_killed_commands_end_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, str(TORTURE), "--kills", "7"]
    command += ["tbpo_q, LoRA, by", "generate, e", "judge, e"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 kills: " in result.stdout
    ends = re.search(r"(\d+) runs came to their end, 0 faults", result.stdout)
    assert int(ends.group(1)) >= 3
    assert not list(tmp_path.iterdir())
