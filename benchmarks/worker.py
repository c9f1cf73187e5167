"""A measurement in a process of its own: the program calls itself with `--worker`.

The task goes to the process's standard input, the reading comes back in a marked line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from measure import MALLOC_SETTINGS

_MARK = "reading: "


def measured(program: str, task: Mapping[str, Any], *, threads: int, name: str) -> dict[str, Any]:
    """What a program's worker reads for a task; `name` is what the error calls it."""
    environment = os.environ | MALLOC_SETTINGS | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(
        [sys.executable, program, "--worker"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    readings = [line for line in process.stdout.splitlines() if line.startswith(_MARK)]
    if process.returncode or not readings:
        raise SystemExit(f"{name} failed:\n{process.stderr[-4000:]}")
    return json.loads(readings[-1].removeprefix(_MARK))


def task() -> dict[str, Any]:
    """The task of this worker."""
    return json.loads(sys.stdin.read())


def answer(reading: Mapping[str, Any]) -> None:
    """Hand back this worker's reading."""
    print(_MARK + json.dumps(reading))
