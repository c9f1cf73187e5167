"""The order of imports, the size of files, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "tokenratio"
VOCABULARY = ["masking", "errors", "names", "text_files", "markdown", "yaml_text", "records"]
VOCABULARY += ["foreign_names", "settings", "run_folder", "locks", "types"]
ORDER = [*VOCABULARY, "data", "statistics", "ratios", "bregman", "losses"]
ORDER += ["models", "training", "evaluation", "report", "cli"]
# The mathematics: torch, jaxtyping's annotations and the standard library, nothing else.
PURE = {"statistics", "bregman", "ratios", "losses", "types", "theory"}
ALLOWED_IN_PURE = {"torch", "jaxtyping", "tokenratio", *sys.stdlib_module_names}
# Neither of two neighbours knows the other.
NEIGHBOURS = {("training", "evaluation"), ("evaluation", "training")}
# theory imports only these, and nothing imports it.
ALLOWED_IN_THEORY = {*VOCABULARY, "statistics", "bregman", "ratios", "losses", "theory"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_run_one_way():
    for path in SOURCE.rglob("*.py"):
        importer = path.relative_to(SOURCE).with_suffix("").parts[0]
        for module in imports_of(path):
            distribution, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            if importer in PURE:
                assert distribution in ALLOWED_IN_PURE, f"{path} imports {module}"
            if distribution != "tokenratio" or not target or importer in ("__init__", "__main__"):
                continue
            earlier = ORDER[: ORDER.index(importer) + 1] if importer in ORDER else ()
            allowed = ALLOWED_IN_THEORY if importer == "theory" else earlier
            assert target in allowed, f"{path}: {importer} imports {target}"
            assert (importer, target) not in NEIGHBOURS, f"{path}: {importer} imports {target}"


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
