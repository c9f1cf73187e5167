"""The order of the rooms, the size of files, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "tokenratio"
VOCABULARY = ["errors", "names", "foreign_names", "settings", "run_folder", "types"]
ROOMS = [*VOCABULARY, "data", "statistics", "ratios", "bregman", "losses"]
ROOMS += ["models", "training", "evaluation", "report", "cli"]
PURE = {"statistics", "bregman", "ratios", "losses", "types", "theory"}
# Neighbours: neither knows the other.
NEIGHBOURS = {("training", "evaluation"), ("evaluation", "training")}
# Sees only these; nothing sees it.
ROOMS_OF_THEORY = {*VOCABULARY, "statistics", "bregman", "ratios", "losses", "theory"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_rooms_import_only_from_those_before_them():
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).with_suffix("").parts[0]
        for module in imports_of(path):
            package, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            if package == "tokenratio" and target and room not in ("__init__", "__main__"):
                allowed = ROOMS_OF_THEORY if room == "theory" else ROOMS[: ROOMS.index(room) + 1]
                assert target in allowed, f"{path}: {room} imports {target}"
                assert (room, target) not in NEIGHBOURS, f"{path}: {room} imports {target}"
            if room in PURE:
                assert package not in {"transformers", "datasets", "peft", "accelerate"}, path


def test_files_stay_small():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 400, path


def test_importing_the_package_is_quick_and_loads_no_framework():
    code = (
        "import sys, time; start = time.perf_counter(); import tokenratio; "
        "seconds = time.perf_counter() - start; "
        "assert not {'torch', 'transformers'} & sys.modules.keys(); print(seconds)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 0.5


def test_commands_are_imported_without_a_framework():
    """Help and usage errors must not wait for torch: commands import it when they run."""
    code = (
        "import sys; from importlib import import_module; "
        "from tokenratio.cli.main import COMMANDS; "
        "loaded = {name: import_module(module) and {'torch', 'transformers', 'datasets'} "
        "& sys.modules.keys() for name, (module, _) in COMMANDS.items()}; "
        "assert not any(loaded.values()), loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
