"""Turns pairs of text into conversations, for a model with a chat template.

    python examples/chat_pairs.py SOURCE OUTPUT.jsonl [ROWS]

SOURCE is a file, a folder or a hub name with its split, such as Anthropic/hh-rlhf@train, in any
layout that training reads. A prompt becomes the user's turn, a transcript ("Human: ...
Assistant: ...") one turn for each of its own; conversations stay as they are. ROWS takes that many
rows at random, the same in every call.
"""

import json
import random
import re
import sys
from pathlib import Path

from tokenratio.data import PreferenceExample, read_rows
from tokenratio.data.defects import RowDefectError
from tokenratio.data.formats import DataParser
from tokenratio.errors import TokenRatioError

Messages = list[dict[str, str]]
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def user_turns(prompt: str) -> Messages:
    """The prompt as messages, the last one the user's."""
    before, *rest = _TURN.split(prompt)
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if before.strip() or not turns or turns[-1][0] != "Assistant" or turns[-1][1].strip():
        return [{"role": "user", "content": prompt.strip()}]  # no transcript
    return [{"role": _SPEAKERS[who], "content": text.strip()} for who, text in turns[:-1]]


def conversation(pair: PreferenceExample) -> dict[str, Messages]:
    """A row of TRL's conversational preference format."""
    row = {}
    for name, text in pair.texts.items():
        if not isinstance(text, str):
            row[name] = text
        elif name == "prompt":
            row[name] = user_turns(text)
        else:
            row[name] = [{"role": "assistant", "content": text.strip()}]
    return row


def main(source: str, output: str, num: int | None = None) -> int:
    """Write the conversations; returns how many."""
    rows = list(read_rows(source))
    parser = DataParser([rows], PreferenceExample)
    pairs, num_refused = [], 0
    for row in rows:
        try:
            pairs.append(conversation(parser.parse(row)))
        except RowDefectError:
            num_refused += 1
    if num is not None and num < len(pairs):
        pairs = random.Random(0).sample(pairs, num)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    Path(output).write_text("".join(lines), encoding="utf-8")
    print(f"{output}: {len(pairs)} of {len(rows)} rows; {num_refused} of them cannot be used")
    return len(pairs)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or not all(word.isdecimal() for word in sys.argv[3:]):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:3], *map(int, sys.argv[3:]))
    except TokenRatioError as error:
        sys.exit(f"chat_pairs: {error}")
