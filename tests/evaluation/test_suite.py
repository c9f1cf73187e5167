"""The harness on a task file of our own: its scores against a loop by hand, and how it fails."""

import builtins
import importlib.util
import json
import math

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from tiny import WORDS, tiny_model, tiny_tokenizer
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.suite import SUITES, check_installed, run_suite
from tokenratio.models.loading import load_model, load_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness (the extra lm-eval) is not installed",
)
QUESTIONS = [
    {"question": f"{WORDS[i % 12]} {WORDS[(5 * i + 3) % 12]}", "answer": i * i % 7 % 4}
    for i in range(42)
]
CHOICES = ["elm fig", "gum hay", "ivy jam", "kin log"]
TASK = {
    "task": "word_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "data/solved.jsonl", "test": "data/asked.jsonl"}},
    "training_split": "train",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": CHOICES,
    "num_fewshot": 2,
    "fewshot_config": {"sampler": "first_n"},
    "fewshot_delimiter": " <eos> ",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    """The task next to its data; what the libraries cache stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "data").mkdir()
    for name, rows in (("solved", QUESTIONS[:2]), ("asked", QUESTIONS[2:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    return write(tmp_path, TASK)


def write(folder, config):
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path, model):
    """LoRA with weights large enough to change answers."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(load_model(model), config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.mul_(5)
    policy.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def accuracy_by_hand(policy, tokenizer):
    """The likeliest choice after the question, log-probabilities of its tokens summed."""
    shots = "".join(f"{row['question']} {CHOICES[row['answer']]} <eos> " for row in QUESTIONS[:2])
    right = []
    for row in QUESTIONS[2:]:
        scores = []
        for choice in CHOICES:
            prompt = tokenizer(shots + row["question"])["input_ids"]
            answer = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + answer])).logits[0]
            log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(log_probs[range(len(answer)), answer].sum().item())
        right.append(max(range(4), key=scores.__getitem__) == row["answer"])
    return sum(right) / len(right)


@pytest.mark.slow
@needs_harness
def test_scores_on_a_local_task(task_file, model, tmp_path):
    output = tmp_path / "out" / "suite.json"
    result = run_suite(model, task_file, output=output, device="cpu")
    (score,) = result.scores
    expected = accuracy_by_hand(load_model(model), load_tokenizer(model))
    assert (score.task, score.shots, score.metric, score.n) == ("word_choice", 2, "acc", 40)
    assert score.value == pytest.approx(expected)
    assert score.stderr == pytest.approx(math.sqrt(expected * (1 - expected) / 39))
    assert (result.mean, result.stderr) == (score.value, score.stderr)
    document = json.loads(output.read_text())
    assert document["scores"][0]["value"] == score.value
    assert document["settings"]["versions"]["lm_eval"]
    assert run_suite(model, task_file, device="cpu", limit=3).scores[0].n == 3


@pytest.mark.slow
@needs_harness
def test_adapters_count(task_file, model, adapter):
    base = run_suite(model, task_file, device="cpu")
    on_top = run_suite(model, task_file, peft=adapter, device="cpu")
    alone = run_suite(adapter, task_file, device="cpu")
    expected = accuracy_by_hand(load_model(adapter), load_tokenizer(adapter))
    assert on_top.mean == alone.mean == pytest.approx(expected)
    assert base.mean != on_top.mean
    assert base.settings["weights"] != on_top.settings["weights"]
    with pytest.raises(TokenRatioError, match="cannot load the adapter none"):
        run_suite(model, task_file, peft="none", device="cpu")


@needs_harness
def test_an_answer_that_is_generated_and_filtered(task_file, model, tmp_path):
    """The metric is the one by the first filter, as GSM8K's strict match is."""
    config = {
        **TASK,
        "output_type": "generate_until",
        "doc_to_target": "elm",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
        "filter_list": [
            {
                "name": "any",
                "filter": [
                    {"function": "regex", "regex_pattern": "(.?)", "fallback": "elm"},
                    {"function": "regex", "regex_pattern": "(no such text)", "fallback": "elm"},
                    {"function": "take_first"},
                ],
            },
            {"name": "raw", "filter": [{"function": "take_first"}]},
        ],
    }
    (score,) = run_suite(model, write(tmp_path, config), device="cpu").scores
    assert (score.metric, score.value, score.n) == ("exact_match", 1.0, 40)


@pytest.mark.slow
@needs_harness
def test_an_interrupted_run_goes_on_and_another_is_not_mixed_in(
    task_file, model, adapter, tmp_path, monkeypatch
):
    output = tmp_path / "suite.json"
    first = run_suite(model, task_file, output=output, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr("tokenratio.evaluation.suite._score", lambda *_: pytest.fail("asked again"))
        assert run_suite(model, task_file, output=output, device="cpu") == first
    with (tmp_path / "data" / "asked.jsonl").open("a") as file:
        file.write(json.dumps(QUESTIONS[0]) + "\n")
    for changed in ((model, task_file), (adapter, task_file)):
        with pytest.raises(TokenRatioError, match="another model, suite or setting"):
            run_suite(*changed, output=output, device="cpu")
    output.write_text("[]")
    with pytest.raises(TokenRatioError, match="is not a file of a suite's scores"):
        run_suite(model, task_file, output=output, device="cpu")


@needs_harness
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "must hold one task"),
        ({"metric_list": None}, "needs metric_list"),
        ({"metric_list": [{"metric": "bertscore_of_theirs"}]}, "not one of the harness's metrics"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "not one of the harness"),
        ({"unsafe_code": True}, "unsafe_code is not supported"),
        ({"include": "other.yaml"}, "include is not supported"),
        ({"dataset_kwargs": {}}, "needs dataset_kwargs"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "no data file"),
        ({"test_split": "tset"}, "cannot be loaded"),
        ({"doc_to_text": "{{question}} {{tone}}"}, "cannot be loaded: UndefinedError: 'tone'"),
        ({"output_type": "generate_until", "doc_to_target": "elm"}, "word_choice cannot be run"),
    ],
)
def test_a_task_file_that_cannot_be_used(changes, message, task_file, model, tmp_path):
    write(tmp_path, TASK | changes)
    with pytest.raises(TokenRatioError, match=message):
        run_suite(model, task_file, device="cpu")


@needs_harness
def test_a_task_file_runs_no_code(task_file, model, tmp_path):
    """The harness would import what stands behind !function."""
    (tmp_path / "hook.py").write_text("raise SystemExit('code was run')")
    with task_file.open("a") as file:
        file.write("process_docs: !function hook.run\n")
    with pytest.raises(TokenRatioError, match="!function, which runs code"):
        run_suite(model, task_file, device="cpu")


@needs_harness
def test_a_users_mistakes(task_file, model, tmp_path):
    with pytest.raises(TokenRatioError, match="unknown suite 'open-llm-v3'; known: open-llm-v1"):
        run_suite(model, "open-llm-v3")
    with pytest.raises(TokenRatioError, match="cannot read"):
        run_suite(model, tmp_path / "none.yaml")
    with pytest.raises(TokenRatioError, match="cannot load"):
        run_suite(tmp_path / "none", task_file, device="cpu")
    with pytest.raises(TokenRatioError, match="trust_remote_code in init_kwargs must stay false"):
        run_suite(model, task_file, init_kwargs={"trust_remote_code": True}, device="cpu")
    with pytest.raises(TokenRatioError, match="at least 1"):
        run_suite(model, task_file, limit=0, device="cpu")


@pytest.mark.slow
@needs_harness
def test_without_the_hub_the_suite_says_so(model, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(TokenRatioError, match=r"arc_challenge cannot be loaded.*fill the cache"):
        run_suite(model, device="cpu")


@pytest.mark.slow
@needs_harness
def test_the_suites_tasks_and_metrics_are_the_harness_s():
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index = TaskManager().task_index
    for spec in SUITES["open-llm-v1"]:
        config = load_yaml(index[spec.task].yaml_path, resolve_func=False, recursive=True)
        listed = config.get("metric_list") or config["aggregate_metric_list"]
        assert spec.metric in [each["metric"] for each in listed]
        filters = [each["name"] for each in config.get("filter_list") or [{"name": "none"}]]
        assert spec.filter in filters
        assert not config.get("unsafe_code")


def test_without_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TokenRatioError, match=r"pip install 'tokenratio\[lm-eval\]'"):
        check_installed()


def test_the_published_suite():
    """docs/method.md §8: the six tasks and their shots."""
    shots = {spec.task: spec.shots for spec in SUITES["open-llm-v1"]}
    assert shots == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
