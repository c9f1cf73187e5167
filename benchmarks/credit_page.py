"""The token-credit viewer in Chromium: the size of a page, its first paint, a step, another pair.

`python benchmarks/credit_page.py [pairs] [tokens]`, by default 200 pairs of 512 tokens; needs a
Chromium on PATH (`make browser`). A policy with random weights: its figures are as hard to compress
as any.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from transformers import LlamaForCausalLM

from tokenratio import InspectOptions, inspect_pairs, write_credit_page
from tokenratio.data.worlds import WORLDS

_TURNS = 50
# Time from a key to the second frame after it, when what it changed is on the screen.
_TIMED = """async ([key, times]) => {
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const took = [];
  for (let turn = 0; turn < times; turn += 1) {
    const before = document.getElementById('detail').firstChild;
    const began = performance.now();
    document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
    while (document.getElementById('detail').firstChild === before) await frame();
    await frame();
    took.push(performance.now() - began);
  }
  return took.sort((one, other) => one - other);
}"""
_PAINTED = """() => [
  performance.getEntriesByType('paint').at(-1).startTime, performance.now()
]"""


def main(num_pairs: int, length: int) -> None:
    """Make a page, open it, go through it, and print what each took."""
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        path = Path(name) / "credit.html"
        inspection = _inspection(Path(name), num_pairs, length)
        began = time.perf_counter()
        notes = write_credit_page(inspection, path)
        print(f"written in {time.perf_counter() - began:.1f} s: {path.stat().st_size / 1e6:.1f} MB")
        print(*notes, sep="\n")
        # Chromium has no sandbox for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector("#lanes .cell.active")
        painted, drawn = page.evaluate(_PAINTED)
        print(f"first paint after {painted:.0f} ms, first pair after at most {drawn:.0f} ms")
        for what, key in (("step", "ArrowRight"), ("pair", "j")):
            took = page.evaluate(_TIMED, [key, min(_TURNS, num_pairs - 1)])
            print(f"a {what}: median {took[len(took) // 2]:.0f} ms, longest {took[-1]:.0f} ms")
        browser.close()


def _inspection(folder: Path, num_pairs: int, length: int):
    """Pairs of random words of the review world under two policies with random weights."""
    world, rng = WORLDS["reviews"], random.Random(0)
    tokenizer = world.build_tokenizer()
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        config = world.policy_config(max_position_embeddings=length + 16, initializer_range=0.3)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    responses = [" ".join(rng.choices(words, k=length - 1)) for _ in range(2 * num_pairs)]
    rows = [
        {"prompt": " ".join(rng.choices(words, k=8)), "chosen": chosen, "rejected": rejected}
        for chosen, rejected in zip(responses[::2], responses[1::2], strict=True)
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = InspectOptions(
        reference=str(folder / "reference"), data=str(data), num_pairs=num_pairs
    )
    return inspect_pairs([folder / "policy"], options)


if __name__ == "__main__":
    main(*(int(each) for each in sys.argv[1:3] or ("200", "512")))
