"""`python -m tokenratio` is the command line."""

from tokenratio.cli.main import run_as_process

if __name__ == "__main__":
    run_as_process()
