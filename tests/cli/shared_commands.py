"""Runs commands of tokenratio with other processes; test_several_processes.py launches it.

Argument: the command lines as JSON.
"""

import json
import os
import sys
from importlib import import_module

import torch

from tokenratio.cli.main import COMMANDS
from tokenratio.models.processes import joined


def main(commands: list[list[str]]) -> None:
    torch.set_num_threads(1)
    with joined():
        for name, *arguments in commands:
            import_module(COMMANDS[name][0]).COMMAND.run(arguments)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # threads that gloo leaves behind can abort an interpreter that shuts down
