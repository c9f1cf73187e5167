"""General ability, on the tasks of EleutherAI's lm-evaluation-harness (the extra `lm-eval`)."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tokenratio.errors import TokenRatioError, first_line
from tokenratio.masking import mask_secrets
from tokenratio.models.adapters import load_adapter
from tokenratio.models.device import default_device
from tokenratio.models.loading import load_model, load_tokenizer
from tokenratio.models.pretrained_arguments import loading_arguments
from tokenratio.models.provenance import absolute
from tokenratio.names import require_at_least
from tokenratio.records import as_shape, read_record
from tokenratio.run_folder import package_version, replace_text, versions
from tokenratio.yaml_text import read_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LIBRARY_FILES = ("json", "csv", "parquet", "text")
_BOOTSTRAP_DRAWS = 1000  # for metrics without a standard error in closed form
_HUB = ". They come from the Hugging Face hub: check the connection, or fill the cache"


@dataclass(frozen=True)
class SuiteTask:
    """One row of a suite.

    Attributes:
        task: a task or group of the harness.
        shots: solved examples before each question.
        metric, filter: names in the harness; a filter extracts the model's answer.
    """

    task: str
    shots: int
    metric: str
    filter: str = "none"


SUITES: dict[str, tuple[SuiteTask, ...]] = {
    # Open LLM Leaderboard, version 1 (docs/method.md §8). The harness weights MMLU's 57 subjects by
    # their questions; the leaderboard took their plain mean.
    "open-llm-v1": (
        SuiteTask("arc_challenge", 25, "acc_norm"),
        SuiteTask("hellaswag", 10, "acc_norm"),
        SuiteTask("mmlu", 5, "acc"),
        SuiteTask("truthfulqa_mc2", 0, "acc"),
        SuiteTask("winogrande", 5, "acc"),
        SuiteTask("gsm8k", 5, "exact_match", "strict-match"),
    )
}


@dataclass(frozen=True)
class TaskScore:
    """A model's score on one task.

    Attributes:
        value: in the metric's unit; a share of questions in all `SUITES`.
        stderr: standard error over questions, from the harness; None if it has none.
        n: questions asked.
    """

    task: str
    shots: int
    metric: str
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class SuiteScores:
    """A model's scores on a suite.

    Attributes:
        suite: its name, or the task file.
        scores: one for each task.
        mean: over tasks, with equal weights.
        stderr: of the mean, the tasks' questions being independent; None if a task has none.
        settings: what the scores depend on, including a digest of the weights, and versions.
    """

    suite: str
    scores: tuple[TaskScore, ...]
    mean: float
    stderr: float | None
    settings: Mapping[str, Any]


def run_suite(
    model: str | Path,
    suite: str | Path = "open-llm-v1",
    *,
    policy: "PreTrainedModel | None" = None,
    output: str | Path | None = None,
    peft: str | Path | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> SuiteScores:
    """Evaluate a model on a suite.

    All data are loaded before the first question is asked. The harness cuts prompts that exceed the
    model's positions on the left, and warns.

    Args:
        model: a hub name, folder or GGUF file, also of an adapter. A model's own code is never run.
        policy: the model itself, if it is loaded already.
        suite: a name of `SUITES`, or a YAML task file of the harness with `data_files` relative to
            it, whose first metric and filter are used. It must not contain `!function` or ask for
            code to be run. Its Jinja templates are not sandboxed: use only files you trust.
        output: JSON file, written after every task; an interrupted run with the same settings
            resumes from it.
        peft: an adapter for the model.
        init_kwargs: for `from_pretrained`, such as `dtype`.
        device: default: the accelerator if there is one.
        limit: use only the first N questions of each task, for a quick try.
    Raises:
        TokenRatioError: the extra is missing, the suite is unknown, or a file, the data or the
            model cannot be loaded.
    """
    check_installed()
    require_at_least(1, batch_size=batch_size, limit=limit)
    loading_arguments(init_kwargs, "init_kwargs")  # refuses what would run code
    tasks = _load_tasks(suite)
    lm, weights = _load_lm(model, policy, peft, dict(init_kwargs or {}), device, batch_size)
    settings = {
        "suite": str(suite),
        "tasks": [asdict(spec) for spec, _ in tasks],
        "model": str(model),
        "peft": None if peft is None else str(peft),
        "weights": weights,
        "init_kwargs": mask_secrets({k: str(v) for k, v in (init_kwargs or {}).items()}),
        "limit": limit,
        "questions": _questions_digest(task for _, task in tasks),
        "versions": {**versions(), "lm_eval": package_version("lm_eval")},
    }
    scores = _known(output, settings)
    for spec, task in tasks[len(scores) :]:
        scores.append(_score(lm, spec, task, limit))
        if output is not None:
            result = asdict(_summary(str(suite), scores, settings))
            replace_text(Path(output), json.dumps(result, indent=2, allow_nan=False) + "\n")
    return _summary(str(suite), scores, settings)


def check_installed() -> None:
    """Raise a `TokenRatioError` if the harness is missing or broken."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise TokenRatioError(
            "the suite needs lm-evaluation-harness: pip install 'tokenratio[lm-eval]' "
            f"({first_line(error)})"
        ) from None


def _load_tasks(suite: str | Path) -> list[tuple[SuiteTask, Any]]:
    """Each row of a suite with the harness's task or group, its data loaded."""
    if isinstance(suite, str) and suite in SUITES:
        manager = _task_manager(include_defaults=True)
        return [(spec, _load_task(manager, spec.task, spec.task, _HUB)) for spec in SUITES[suite]]
    path = Path(suite)
    if path.suffix not in (".yaml", ".yml"):
        raise TokenRatioError(
            f"unknown suite {str(suite)!r}; known: {', '.join(SUITES)}, or a YAML task file"
        )
    spec, config = _read_task_file(path)
    hint = "" if config.get("dataset_path") in _LIBRARY_FILES else _HUB
    manager = _task_manager(include_defaults=False)
    return [(spec, _load_task(manager, config, str(path), hint))]


def _task_manager(*, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _load_task(manager: Any, spec: str | dict[str, Any], origin: str, hint: str) -> Any:
    try:
        loaded = manager.load([spec])
        name = spec if isinstance(spec, str) else spec["task"]
        return loaded.get("groups", {}).get(name) or loaded["tasks"][name]
    except Exception as error:  # of datasets, huggingface_hub, httpx, Jinja or the harness itself
        raise TokenRatioError(
            f"the questions of {origin} cannot be loaded: {type(error).__name__}: "
            f"{first_line(error)}{hint}"
        ) from error


class _Named(TypedDict):
    name: str


class _TaskFile(TypedDict, total=False):
    """Keys of a task file that are read here; the harness checks the others."""

    dataset_path: str
    dataset_kwargs: dict[str, Any] | None
    num_fewshot: int | None
    filter_list: list[_Named] | None


def _read_task_file(path: Path) -> tuple[SuiteTask, dict[str, Any]]:
    """A task of the harness from one YAML file, read without running any code."""
    try:
        config = read_yaml(path)
    except TokenRatioError as error:
        why = "it contains !function, which runs code" if "!function" in str(error) else error
        raise TokenRatioError(f"{path} cannot be used as a task: {why}") from None
    if not isinstance(config.get("task"), str):
        raise TokenRatioError(f"{path} must hold one task: a mapping with task: NAME")
    as_shape(_TaskFile, config, str(path))
    for key in ("unsafe_code", "class", "include", "custom_dataset"):
        if config.get(key):
            raise TokenRatioError(f"{path}: {key} is not supported: a task file must not run code")
    metrics = config.get("metric_list")
    if not isinstance(metrics, list) or not all(
        isinstance(each, dict) and isinstance(each.get("metric"), str) for each in metrics or [None]
    ):
        raise TokenRatioError(f"{path} needs metric_list: [{{metric: NAME}}, ...]")
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import METRIC_REGISTRY

    for each in metrics:
        # The harness downloads other metrics from the hub, as code.
        if each["metric"] not in METRIC_REGISTRY or each.get("hf_evaluate"):
            raise TokenRatioError(f"{path}: {each['metric']!r} is not one of the harness's metrics")
    filters = config.get("filter_list") or [{"name": "none"}]
    shots = config.get("num_fewshot") or 0
    config["dataset_kwargs"] = _dataset_arguments(path, config)
    return SuiteTask(config["task"], shots, metrics[0]["metric"], filters[0]["name"]), config


def _dataset_arguments(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load_dataset`, with `data_files` relative to the task file."""
    arguments = dict(config.get("dataset_kwargs") or {})
    if config.get("dataset_path") not in _LIBRARY_FILES:
        return arguments

    def resolved(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: resolved(each) for split, each in files.items()}
        if isinstance(files, str) and "://" not in files:
            found = path.parent / files
            if not found.is_file():
                raise TokenRatioError(f"{path}: there is no data file {found}")
            return str(found.resolve())
        return [resolved(each) for each in files] if isinstance(files, list) else files

    if not arguments.get("data_files"):
        raise TokenRatioError(f"{path} needs dataset_kwargs: {{data_files: {{test: FILE}}}}")
    return arguments | {"data_files": resolved(arguments["data_files"])}


def _load_lm(
    model: str | Path,
    policy: "PreTrainedModel | None",
    peft: str | Path | None,
    init_kwargs: dict[str, Any],
    device: str | None,
    batch_size: int,
) -> tuple[Any, str]:
    """The model wrapped for the harness, and a digest of its weights."""
    from lm_eval.models.huggingface import HFLM

    from tokenratio.evaluation.judges.bradley_terry import weights_digest

    tokenizer = load_tokenizer(model, init_kwargs)
    if policy is None:
        policy = load_model(model, init_kwargs)
        if peft is not None:
            policy = load_adapter(policy, absolute(peft), {})
        policy.to(device or default_device())  # type: ignore[arg-type]  # transformers wraps it
    lm = HFLM(
        pretrained=policy,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        trust_remote_code=False,
    )
    return lm, weights_digest(policy)


def _score(lm: Any, spec: SuiteTask, task: Any, limit: int | None) -> TaskScore:
    from lm_eval import simple_evaluate

    try:
        results = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=spec.shots,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            log_samples=False,
            task_manager=_task_manager(include_defaults=False),
            confirm_run_unsafe_code=False,
        )
    except Exception as error:  # a task that does not fit its data, or the device's memory
        raise TokenRatioError(
            f"{spec.task} cannot be run: {type(error).__name__}: {first_line(error)}"
        ) from error
    leaves = _leaves(spec.task, results.get("group_subtasks", {}))
    shots = {results["n-shot"][leaf] for leaf in leaves}
    if shots != {spec.shots}:
        raise TokenRatioError(f"{spec.task} was run with {shots} shots, not {spec.shots}")
    found = results["results"][spec.task]
    value = found.get(f"{spec.metric},{spec.filter}")
    if value is None:
        raise TokenRatioError(
            f"{spec.task} has no {spec.metric} with filter {spec.filter}; it has {', '.join(found)}"
        )
    stderr = found.get(f"{spec.metric}_stderr,{spec.filter}")
    return TaskScore(
        task=spec.task,
        shots=spec.shots,
        metric=spec.metric,
        value=float(value),
        # "N/A" if the harness has none; NaN for one question
        stderr=float(stderr) if isinstance(stderr, float) and math.isfinite(stderr) else None,
        n=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
    )


def _leaves(task: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    below = children.get(task) or []
    return [leaf for child in below for leaf in _leaves(child, children)] if below else [task]


def _summary(suite: str, scores: Sequence[TaskScore], settings: Mapping[str, Any]) -> SuiteScores:
    num = len(scores)
    errors = [score.stderr for score in scores if score.stderr is not None]
    stderr = math.sqrt(math.fsum(e**2 for e in errors)) / num if len(errors) == num else None
    mean = math.fsum(score.value for score in scores) / num
    return SuiteScores(suite, tuple(scores), mean, stderr, settings)


class _Document(TypedDict):
    settings: dict[str, Any]
    scores: list[TaskScore]


def _known(output: str | Path | None, settings: Mapping[str, Any]) -> list[TaskScore]:
    """The scores in the output of an interrupted run with the same settings."""
    if output is None or not Path(output).exists():
        return []
    document = read_record(_Document, output, "this is not a file of a suite's scores")
    scores = document["scores"]
    if document["settings"] != settings:
        raise TokenRatioError(
            f"{output} contains scores of another model, suite or setting: choose another file"
        )
    return scores


def _questions_digest(tasks: Iterable[Any]) -> str:
    """16 hex digits of the SHA-256 of the questions and of the tasks' settings."""
    digest = hashlib.sha256()
    for task in tasks:
        for leaf in task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]:
            config = leaf.dump_config()
            for document in (config, *leaf.eval_docs):
                digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
