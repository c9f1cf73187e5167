"""Reading a verdict off a judge's answer, without ever guessing."""

import re
from collections.abc import Sequence

from tokenratio.evaluation.judges.protocol import Verdict

_MARK = re.compile(r"\[\[[^\[\]]*\]\]")


def parse_verdict(
    answer: str, finish_reason: str, verdicts: Sequence[tuple[str, float]]
) -> Verdict:
    """The verdict that is the answer's last line, if that is the only one in it.

    Anything else is no verdict, and none is made of it: an answer that was cut off, has no mark on
    a line of its own at the end, has several marks, or one that was not offered.

    Args:
        finish_reason: "length" for an answer that was cut off.
        verdicts: the marks that were offered, and the probability each stands for.

    >>> parse_verdict("A is clearer.\\n[[A]]", "eos", [("[[A]]", 1.0), ("[[B]]", 0.0)]).probability
    1.0
    """
    reason = None
    marks = _MARK.findall(answer)
    last = answer.rstrip().rpartition("\n")[2].strip()
    known = dict(verdicts)
    if finish_reason == "length":
        reason = "the answer was cut off"
    elif not marks:
        reason = "no verdict in the answer"
    elif len(marks) > 1:
        reason = "more than one verdict in the answer"
    elif last != marks[0]:
        reason = "the verdict is not alone on the last line"
    elif last not in known:
        reason = "a verdict that was not offered"
    return Verdict(None if reason else known[last], reason, raw=answer)
