"""Reading a verdict off a judge's answer, without ever guessing."""

import json
import re
import unicodedata
from collections.abc import Sequence

from tokenratio.evaluation.judges.protocol import Verdict

# Brackets may be escaped as in Markdown, and the word between them set in bold.
_MARK = re.compile(r"\\?\[\\?\[([^\[\]\\]*)\\?\]\\?\]")

# How models that think aloud mark it where the server leaves it in the answer.
_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think"
_TAG = re.compile(
    rf"<(?P<close>/?)(?P<name>{_NAMES})>"
    r"|◁(?P<close_kimi>/?)think▷"
    r"|\[(?P<close_mistral>/?)THINK\]"
    r"|<\|(?P<edge>begin|end)_of_thought\|>"
    r"|(?P<final><\|channel\|>final<\|message\|>)",
    re.IGNORECASE,
)
# An object without others in it, at the end of the answer, perhaps in a code block.
_OBJECT = re.compile(r"(\{[^{}]*\})\s*(?:```)?\s*\Z")
_CONTROL_TOKENS = re.compile(r"(?:\s*(?:<\|[^|<>\s]*\|>|</s>))+\s*\Z")

# What may stand around a verdict on its line. Not: a quotation mark of Markdown (>), which makes it
# somebody else's word, strikethrough, or a question mark.
_MARKUP = re.compile(
    r"</?(?:answer|verdict|final_?answer|final_?verdict|b|strong|em|i|p|br|code)\s*/?>"
    r"|\\(?:boxed|text|textbf|mathbf)(?![a-z])",
    re.IGNORECASE,
)
_BEFORE = " \t*_`#\"'“”„«»‘’(){}$.,:;=→–—-。、✅✔🏆👉\ufe0f\u200b\ufeff"
_AFTER = _BEFORE.replace(":", "").replace("=", "").replace("→", "") + "!"
_QUOTES = ('"“”„', "'‘’", "«»")
_WORD = re.compile(r"[^\W\d_]+")
_LABELS = {"verdict", "answer", "judgment", "judgement", "decision", "choice", "conclusion"}
_LABELS |= {"winner", "result", "evaluation", "assessment", "preference", "response", "reply"}
_LABELS |= {"assistant", "output", "rating", "pick", "vote", "summary", "choose", "prefer", "go"}
_LABELS |= {
    "判断",
    "判决",
    "裁决",
    "结论",
    "答案",
    "最终判断",
    "最终判决",
    "最终裁决",
    "最终结论",
    "最终答案",
}
_BESIDE_LABELS = {"my", "the", "our", "this", "and", "in", "final", "overall", "i", "with", "for"}
_BESIDE_LABELS |= {"better", "preferred", "best", "is", "would", "be", "as"}
_NUMBERING = re.compile(r"\s*\d{1,2}[.)]\s+")
_CONNECTIVES = {"so", "thus", "therefore", "hence"}


def parse_verdict(
    answer: str, finish_reason: str, verdicts: Sequence[tuple[str, float]]
) -> Verdict:
    """The verdict on the answer's last line, if there is no other in it.

    Reasoning that the model closed (`<think>...</think>`) is taken off first. The verdict has its
    line to itself, but may wear emphasis, quotation marks, a full stop, or a short label such as
    "Final verdict:", and may have been named before. In a JSON object at the answer's end it is a
    member's whole value.

    Anything else is no verdict, and none is made of it: an answer that was cut off, in its
    reasoning or after it, has no mark on the last line, has different marks, or one that was not
    offered.

    Args:
        finish_reason: "length" for an answer that was cut off.
        verdicts: the marks that were offered, and the probability each stands for.

    >>> offered = [("[[A]]", 1.0), ("[[B]]", 0.0)]
    >>> parse_verdict("A is clearer.\\n[[A]]", "eos", offered).probability
    1.0
    >>> parse_verdict("<think>[[A]]?</think>\\n**Verdict: [[B]]**", "eos", offered).probability
    0.0
    """
    if finish_reason == "length":
        return Verdict(None, "the answer was cut off", raw=answer)
    text = _after_reasoning(unicodedata.normalize("NFKC", answer))
    if text is None:
        return Verdict(None, "the answer ends within its reasoning", raw=answer)
    marks = {_inner(mark[1]) for mark in _MARK.finditer(text)}
    known = {_inner(mark.strip("[]")): probability for mark, probability in verdicts}
    reason = None
    if not marks:
        reason = "no verdict in the answer"
    elif len(marks) > 1:
        reason = "more than one verdict in the answer"
    elif not _is_alone(_last_line(text)):
        reason = "the verdict is not alone on the last line"
    elif not marks <= known.keys():
        reason = "a verdict that was not offered"
    return Verdict(None if reason else known[marks.pop()], reason, raw=answer)


def _inner(mark: str) -> str:
    return mark.strip(" \t\n*_`").casefold()


def _after_reasoning(text: str) -> str | None:
    """The answer proper; None where the reasoning was never closed.

    A closing tag alone ends reasoning that the chat template opened. A tag opened in the middle of
    a line and never closed is only mentioned there.
    """
    while (opened := _TAG.search(text)) is not None:
        if _closes(opened):
            text = text[opened.end() :]
            continue
        closed = next(
            (
                tag
                for tag in _TAG.finditer(text, opened.end())
                if _closes(tag) and _kind(tag) == _kind(opened)
            ),
            None,
        )
        if closed is not None:
            text = text[: opened.start()] + "\n" + text[closed.end() :]
        elif not text[: opened.start()].rpartition("\n")[2].strip():
            return None
        else:
            text = text[: opened.start()] + " " + text[opened.end() :]
    return text


def _closes(tag: re.Match[str]) -> bool:
    edges = (tag["close"], tag["close_kimi"], tag["close_mistral"])
    return "/" in edges or (tag["edge"] or "").lower() == "end" or bool(tag["final"])


def _kind(tag: re.Match[str]) -> str:
    return tag["name"].lower() if tag["name"] else tag[0].lower().replace("/", "")[:2]


def _last_line(text: str) -> str:
    """The last line with more than markup on it, such as the end of a code block.

    Of a JSON object, the member with the verdict: `verdict: [[A]]`.
    """
    text = _CONTROL_TOKENS.sub("", text)
    found = _OBJECT.search(text)
    try:
        members = json.loads(found[1]).items() if found else ()
    except ValueError:
        members = ()
    with_mark = [f"{k}: {v}" for k, v in members if isinstance(v, str) and _MARK.search(v)]
    if len(with_mark) == 1:
        text = with_mark[0]
    lines = _MARKUP.sub("", text).splitlines()
    return next((line for line in reversed(lines) if line.strip(_BEFORE)), "")


def _is_alone(line: str) -> bool:
    """Whether the line is a verdict with nothing around it but a label and its dress."""
    mark = _MARK.search(line)
    if mark is None:
        return False
    before, after = line[: mark.start()], line[mark.end() :]
    # A quotation mark that belongs to a line above makes all of it a quotation.
    if any(sum(map((before + after).count, quotes)) % 2 for quotes in _QUOTES):
        return False
    before = _NUMBERING.sub("", before, count=1) if _NUMBERING.match(before) else before
    if _WORD.sub("", before).strip(_BEFORE) or after.strip(_AFTER):
        return False
    # "Response A is better: [[A]]" names the verdict twice.
    words = {word.casefold() for word in _WORD.findall(before)}
    usual = _LABELS | _BESIDE_LABELS | _CONNECTIVES
    return words <= _CONNECTIVES or bool(words & _LABELS and words - {_inner(mark[1])} <= usual)
