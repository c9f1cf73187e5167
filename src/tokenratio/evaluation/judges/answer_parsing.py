"""Parsing the verdict in a judge's answer, without guessing."""

import json
import re
import unicodedata
from collections.abc import Sequence

from tokenratio.evaluation.judges.protocol import Verdict

# Brackets may be escaped as in Markdown, and the word between them set in bold.
_MARK = re.compile(r"\\?\[\\?\[([^\[\]\\]*)\\?\]\\?\]")

# The marks of reasoning that a server leaves in the answer.
_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think"
_TAG = re.compile(
    rf"<(?P<close>/?)(?P<name>{_NAMES})>"
    r"|◁(?P<close_kimi>/?)think▷"
    r"|\[(?P<close_mistral>/?)THINK\]"
    r"|<\|(?P<edge>begin|end)_of_thought\|>"
    r"|(?P<final><\|channel\|>final<\|message\|>)",
    re.IGNORECASE,
)
# Longer ones, and ones with more tags, are not answers; reading them could take for ever.
_LONGEST, _MOST_TAGS = 1_000_000, 200
_TAIL = 10_000  # characters in which an answer's closing tokens stand

# What may surround a verdict on its line. Not: Markdown's quotation mark (>), strikethrough, or a
# question mark.
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
_LABELS |= {"判断", "判决", "裁决", "结论", "答案"}
_LABELS |= {"最终判断", "最终判决", "最终裁决", "最终结论", "最终答案"}
_BESIDE_LABELS = {"my", "the", "our", "this", "and", "in", "final", "overall", "i", "with", "for"}
_BESIDE_LABELS |= {"better", "preferred", "best", "is", "would", "be", "as"}
_NUMBERING = re.compile(r"\s*\d{1,2}[.)]\s+")
_CONNECTIVES = {"so", "thus", "therefore", "hence"}


def parse_verdict(
    answer: str, finish_reason: str, verdicts: Sequence[tuple[str, float]]
) -> Verdict:
    """The verdict on the answer's last line, if the answer has no other.

    Closed reasoning (`<think>...</think>`) is removed first. The verdict must be alone on its line,
    except for emphasis, quotation marks, a full stop, or a short label such as "Final verdict:". In
    a JSON object at the end of the answer it must be the whole value of a member.

    There is no verdict in an answer that was cut off, in its reasoning or after it, that has no
    mark on the last line or different marks, or that has a mark that was not offered.

    Args:
        finish_reason: "length" for an answer that was cut off.
        verdicts: the marks that were offered, and the probability of each.

    >>> offered = [("[[A]]", 1.0), ("[[B]]", 0.0)]
    >>> parse_verdict("A is clearer.\\n[[A]]", "eos", offered).probability
    1.0
    >>> parse_verdict("<think>[[A]]?</think>\\n**Verdict: [[B]]**", "eos", offered).probability
    0.0
    """
    if finish_reason == "length":
        return Verdict(None, "the answer was cut off", raw=answer)
    if len(answer) > _LONGEST or len(_TAG.findall(answer)) > _MOST_TAGS:
        return Verdict(None, "the answer is too long to be read", raw=answer)
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
    """The answer without its reasoning; None if the reasoning was never closed.

    A closing tag alone ends reasoning that the chat template opened. A tag in the middle of a line
    that is never closed is only a mention.
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
    """The last line that is more than markup; of a JSON object, the member with the verdict."""
    text = _without_control_tokens(text)
    found = _object_at_end(text)
    try:
        members = json.loads(found).items() if found else ()
    except (ValueError, RecursionError):
        members = ()
    with_mark = [f"{k}: {v}" for k, v in members if isinstance(v, str) and _MARK.search(v)]
    if len(with_mark) == 1:
        text = with_mark[0]
    lines = _MARKUP.sub("", text).splitlines()
    return next((line for line in reversed(lines) if line.strip(_BEFORE)), "")


def _without_control_tokens(text: str) -> str:
    """The text without `</s>`, `<|im_end|>` and the like at its end."""
    # Not a regular expression: one that looks for the end takes quadratic time on white space.
    text = text.rstrip()
    head, text = text[:-_TAIL], text[-_TAIL:]
    while True:
        text = text.rstrip()
        begin = len(text) - 4 if text.endswith("</s>") else text.rfind("<|")
        token = text[begin:] if begin >= 0 else ""
        inside = token[2:-2]
        is_token = token.endswith("|>") and not any(c in "|<>" or c.isspace() for c in inside)
        if token != "</s>" and not (is_token and len(token) >= 4):
            return head + text
        text = text[:begin]


def _object_at_end(text: str) -> str | None:
    """An object without nested ones at the end of the answer, perhaps in a code block."""
    text = text.rstrip().removesuffix("```").rstrip()
    found = text[text.rfind("{") :]
    return found if found.startswith("{") and found.find("}") == len(found) - 1 else None


def _is_alone(line: str) -> bool:
    """Whether the line is a verdict with nothing but a label and markup around it."""
    mark = _MARK.search(line)
    if mark is None:
        return False
    before, after = line[: mark.start()], line[mark.end() :]
    # An unpaired quotation mark belongs to another line: all of this one is a quotation.
    if any(sum(map((before + after).count, quotes)) % 2 for quotes in _QUOTES):
        return False
    before = _NUMBERING.sub("", before, count=1) if _NUMBERING.match(before) else before
    if _WORD.sub("", before).strip(_BEFORE) or after.strip(_AFTER):
        return False
    # "Response A is better: [[A]]" names the verdict twice.
    words = {word.casefold() for word in _WORD.findall(before)}
    usual = _LABELS | _BESIDE_LABELS | _CONNECTIVES
    return words <= _CONNECTIVES or bool(words & _LABELS and words - {_inner(mark[1])} <= usual)
