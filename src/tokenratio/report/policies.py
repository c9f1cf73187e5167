"""Evaluated policies as tables, tests of their differences, and answers side by side."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from tokenratio.data.chat import Prompt
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.comparison import compare
from tokenratio.evaluation.paired_comparison import PolicyComparison, holm
from tokenratio.evaluation.response_files import AnsweredPrompt, read_responses
from tokenratio.evaluation.results import Measure, PolicyMeasures
from tokenratio.report.artefacts import Artefacts, EvaluatedPolicy
from tokenratio.report.content import Answer, Section, Table
from tokenratio.report.maps import diversity_figure, ends_of, frontier_figure, interval

NUM_ANSWERS = 12
_NUM_RESAMPLES = 10_000
_LONGEST_TEXT = 4000
# Shown first; the others are folded.
_MAIN = (
    *("gold_reward", "win_rate/", "lc_win_rate/", "kl_policy_ref", "perplexity_ref", "length/"),
    *("cut", "diversity/", "pairs/accuracy", "pairs/margin", "suite/mean", "insults"),
)
# Up to so many runs every two of them are compared.
_FEW = 3
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


def evaluation_sections(artefacts: Artefacts) -> tuple[list[Section], list[str]]:
    """Measures, comparisons, maps and answers; and notes on what could not be compared."""
    measured = [policy.measures for policy in artefacts.policies]
    if not measured:
        return [], []
    names = list(dict.fromkeys(m.name for policy in measured for m in policy.measures))
    names = [name for name in names if not name.startswith("stability/")]
    main = [name for name in names if name.startswith(_MAIN)]
    others = [name for name in names if name not in main]
    caption = "Mean ± standard error over prompts, and the 95 % interval. ↑ higher is better."
    sections = [Section("measures", "Evaluation", tables=[_measures(measured, main, caption)])]
    found, notes = _comparisons(artefacts)
    if found:
        sections.append(_comparison_section(found, artefacts))
    frontier = frontier_figure(measured)
    diversity = diversity_figure(measured) if len(artefacts.aligned) > 1 else None
    figures = [each for each in (frontier and frontier[0], diversity) if each is not None]
    if figures:
        tables = [] if frontier is None else [frontier[1]]
        sections.append(Section("maps", "Reward, distance, diversity", (), figures, tables))
    if others:
        table = _measures(measured, others, caption)
        title = "More measures"
        sections.append(Section("more-measures", title, tables=[table], is_folded=True))
    answers, missing = _answers(artefacts.policies)
    sections.append(answers)
    return [section for section in sections if section], [*notes, *missing]


def _measures(policies: Sequence[PolicyMeasures], names: Sequence[str], caption: str) -> Table:
    def cell(measure: Measure | None) -> str:
        if measure is None:
            return "–"
        scale = 100 if measure.unit == "share" else 1
        low, high = (scale * end for end in ends_of(measure))
        ends = interval(low, high)
        return measure.text if ends == "–" else f"{measure.text}\n[{ends}]"

    rows = []
    for name in names:
        found = [policy.named(name) for policy in policies]
        first = next(measure for measure in found if measure is not None)
        unit = f", {first.unit}" if first.unit not in ("", "share") else ""
        rows.append((f"{name}{unit}{_ARROWS[first.better]}", *map(cell, found)))
    return Table(("measure", *(policy.policy for policy in policies)), rows, caption)


def _comparisons(artefacts: Artefacts) -> tuple[list[PolicyComparison], list[str]]:
    """Each policy with the reference, and with one another; of many only the first with the others.

    Two policies are compared by what both have: the reference has no win rate.
    """
    runs, reference = artefacts.aligned, artefacts.reference
    pairs = [
        (a.measures, b.measures)
        for a, b in combinations([*runs, *([] if reference is None else [reference])], 2)
        if b is reference or a is runs[0] or len(runs) <= _FEW
    ]
    most = len(pairs) * max((len(policy.measures) for pair in pairs for policy in pair), default=0)
    # So many that Holm's correction leaves the smallest p-value below 5 %.
    num_resamples = max(_NUM_RESAMPLES, 40 * most)
    found: list[PolicyComparison] = []
    notes: list[str] = []
    for a, b in pairs:
        try:
            found += compare([a, b], num_resamples=num_resamples, report=notes.append)
        except TokenRatioError as error:
            notes.append(f"{a.policy} and {b.policy} are not compared: {error}")
    # By measure, as they came.
    places = {each.measure: place for place, each in reversed(list(enumerate(found)))}
    return holm(sorted(found, key=lambda each: places[each.measure])), list(dict.fromkeys(notes))


def _comparison_section(found: Sequence[PolicyComparison], artefacts: Artefacts) -> Section:
    rows = [
        (
            f"{each.measure}{_ARROWS[each.better]}",
            f"{each.name_a} − {each.name_b}",
            *_difference(each),
            "< 0.001" if each.adjusted_p < 0.001 else f"{each.adjusted_p:.2g}",
            f"{each.num_prompts:,}",
            _outcome(each),
        )
        for each in found
    ]
    header = ("measure", "difference of", "difference", "95 % interval", "p", "prompts", "better")
    first = f"each policy with the reference, and {artefacts.aligned[0].name} with every other"
    pairs = first if len(artefacts.aligned) > _FEW else "every two policies"
    caption = (
        f"Compared are {pairs}, by the measures that both have prompt by prompt (lc_win_rate is "
        "none of them). Shares in points. Each interval is of one comparison; p, by sign flips, is "
        f"corrected for all {len(found)} (Holm). A dash: no difference was seen."
    )
    return Section("comparison", "Paired comparison", tables=[Table(header, rows, caption)])


def _difference(comparison: PolicyComparison) -> tuple[str, str]:
    scale = 100 if comparison.unit == "share" else 1
    low, high = (scale * end for end in comparison.interval)
    return f"{scale * comparison.difference:+.3g}", interval(low, high)


def _outcome(comparison: PolicyComparison) -> str:
    if not comparison.significant:
        return "–"
    return comparison.name_a if comparison.a_is_better else comparison.name_b


def _answers(policies: Sequence[EvaluatedPolicy]) -> tuple[Section, list[str]]:
    """The first sample of each policy to the first prompts that all have answered."""
    answered: dict[str, dict[str, AnsweredPrompt]] = {}
    notes = []
    for policy in policies:
        if not policy.responses_file.is_file():
            notes.append(f"{policy.name}: {policy.responses_file.name} is missing: no answers")
            continue
        try:
            responses = read_responses(policy.responses_file)
        except TokenRatioError as error:
            notes.append(f"{policy.name}: its answers are not shown: {error}")
            continue
        answered[policy.name] = {each.id: each for each in responses}
    first = next(iter(answered.values()), {})
    shared = [id for id in first if all(id in others for others in answered.values())]
    by_name = {policy.name: policy.measures for policy in policies}
    answers = [
        Answer(
            id,
            _cut("\n\n".join(_turns(first[id].prompt))),
            [
                (name, _cut(of[id].samples[0].text), _figures(by_name[name], of[id]))
                for name, of in answered.items()
            ],
        )
        for id in shared[:NUM_ANSWERS]
    ]
    text = [
        f"The first sample of each to the first {len(answers)} of {len(shared)} prompts, in the "
        "order of the file."
    ]
    return Section("answers", "Answers side by side", text, answers=answers), notes


def _turns(prompt: Prompt) -> Iterator[str]:
    if isinstance(prompt, str):
        yield prompt
        return
    several = len(prompt.messages) > 1
    for message in prompt.messages:
        content = message.get("content")
        text = content if isinstance(content, str) else str(content)
        yield f"{message.get('role')}: {text}" if several else text


def _figures(policy: PolicyMeasures, answered: AnsweredPrompt) -> str:
    """What was measured of the first response, and whether it was cut."""
    found = ["cut"] if answered.samples[0].finish_reason == "length" else []
    for measure in policy.measures:
        if measure.name == "gold_reward" or measure.name.startswith("win_rate/"):
            value = next(
                (v for prompt, n, v in measure.values if (prompt, n) == (answered.id, 0)), None
            )
            if value is not None and measure.name == "gold_reward":
                found.append(f"gold reward {value:.3g}")
            elif value is not None:
                word = {1.0: "wins", 0.5: "ties", 0.0: "loses"}.get(value, f"{value:.2f}")
                found.append(f"{word} by {measure.name.removeprefix('win_rate/')}")
    return ", ".join(found)


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]} … {len(text) - _LONGEST_TEXT:,} more characters"
