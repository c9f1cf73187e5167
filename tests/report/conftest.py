"""A browser for the tests of pages: the Chromium that is installed, driven by Playwright."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# As the user has them, before HOME is another folder; `make browser` fetches both.
CHROMIUM = os.environ.get("TOKENRATIO_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CACHE = Path(os.environ.get("TOKENRATIO_BROWSER", "~/.cache/tokenratio/browser")).expanduser()
AXE = CACHE / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of a module: Playwright's event loop must not outlive the tests that need it."""
    reason = "playwright is not installed: it comes with the extra `dev`"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: `make browser` installs it, or set TOKENRATIO_CHROMIUM")
    with playwright.sync_playwright() as driver:
        # Chromium has no sandbox for root.
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file as a reader does; an error in the console, or a request of its own, fails.

    The function takes the path and, by name, `fragment` (of the address, with its #), `width`,
    `height` and `dark`, and returns Playwright's page.
    """
    contexts, faults = [], []

    def open_(
        path: Path, *, fragment: str = "", width: int = 1280, height: int = 900, dark: bool = False
    ) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        address = path.absolute().as_uri()

        def check_request(request: Any) -> None:
            if request.url.partition("#")[0] != address:
                faults.append(f"a request for {request.url[:200]}")

        def check_message(message: Any) -> None:
            if message.type in ("error", "warning"):
                faults.append(f"console: {message.text}")

        page.on("request", check_request)
        page.on("console", check_message)
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.goto(address + fragment)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults, faults


@pytest.fixture
def check_accessible() -> Callable[[Any], None]:
    """Runs axe-core on an open page; a serious or critical violation fails."""
    if not AXE.is_file():
        pytest.skip(f"no axe-core at {AXE}: `make browser` fetches it with npm")
    source = AXE.read_text(encoding="utf-8")

    def check(page: Any) -> None:
        page.evaluate(source)
        found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        serious = [
            f"{each['id']}: {each['help']}: {node['target']} {node['failureSummary']}"
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"][:3]
        ]
        assert not serious, "\n".join(serious)

    return check
