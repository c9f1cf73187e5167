"""A row is rendered alike, and on one day, by every command from training to judging."""

import json
from datetime import date
from pathlib import Path

import pytest
import yaml

from evaluation.loopback import KEY, Loopback
from templates import chat_pair, family_tokenizer
from tiny import tiny_model
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.cli.main import main
from tokenratio.data import template
from tokenratio.evaluation.journal import read_settings
from tokenratio.evaluation.response_files import read_responses
from tokenratio.run_folder import write_run_file

QUIET = {"enable_thinking": False}
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def on(monkeypatch):
    """Sets the day."""
    return lambda day: monkeypatch.setattr(template, "_today", lambda: date.fromisoformat(day))


def run(capsys, *argv, code=0):
    found = main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert found == code, printed.err or printed.out
    return printed.err if code else printed.out


def model(folder, family):
    tokenizer = family_tokenizer(family)
    made = tiny_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def rows(path, num=4, **more):
    found = [chat_pair(f"word {n}?", f"ash {n}", f"{n} bay bay", **more) for n in range(num)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


def recipe(path, **settings):
    values = {
        "model": "base",
        "train_dataset": "rows.jsonl",
        "loss": "dpo",
        "max_length": 300,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "use_cpu": True,
        "report_to": "none",
    }
    Path(path).write_text(yaml.safe_dump({**values, **settings}))


def prompts_seen(folder, tokenizer, monkeypatch):
    """Patches generation so that each prompt it reads is kept."""
    from tokenratio.models import generation

    seen, encode = [], generation.encode_prompts

    def keep(*args, **more):
        found = encode(*args, **more)
        seen.extend(tokenizer.decode(ids) for ids in found)
        return found

    monkeypatch.setattr(generation, "encode_prompts", keep)
    return seen


def test_a_run_is_generated_from_and_evaluated_as_it_was_trained(capsys, monkeypatch):
    tokenizer = model("base", "qwen3")
    rows("rows.jsonl")
    recipe("r.yaml", chat_template_kwargs=QUIET)
    run(capsys, "train", "r.yaml", "--output_dir", "run")
    assert json.loads(Path("run/run.json").read_text())["config"]["chat_template_kwargs"] == QUIET
    seen = prompts_seen("run", tokenizer, monkeypatch)
    argv = ["--prompts", "rows.jsonl", "--max_new_tokens", "3", "--num_samples", "1"]
    printed = run(capsys, "generate", "run", *argv, "--output", "g.jsonl")
    assert (
        "run: rendered as it was trained: chat_template_kwargs {'enable_thinking': False}"
        in printed
    )
    assert len(seen) == 4
    assert all(text.endswith(NO_THOUGHT) for text in seen)
    (settings,) = read_settings("g.jsonl").values()
    assert settings["chat_template_kwargs"] == QUIET
    seen.clear()
    # set otherwise, and a policy without a run
    run(
        capsys,
        *("generate", "run", *argv, "--output", "h.jsonl"),
        *("--chat_template_kwargs", "{enable_thinking: true}"),
    )
    run(capsys, "generate", "base", *argv, "--output", "i.jsonl")
    assert not any(NO_THOUGHT in text for text in seen)
    seen.clear()
    # evaluate asks the reference as the run is asked
    printed = run(capsys, "evaluate", "run", *argv, "--split", "train", "--pairs", "rows.jsonl")
    assert len(seen) >= 8
    assert all(text.endswith(NO_THOUGHT) for text in seen)
    assert "kl_policy_ref" in printed


def test_what_a_row_tells_its_template_is_kept_with_its_generations(capsys):
    model("base", "qwen3")
    rows("rows.jsonl", 2, chat_template_kwargs=QUIET, tools=[{"name": "clock"}])
    argv = ["--prompts", "rows.jsonl", "--max_new_tokens", "3"]
    run(capsys, "generate", "base", *argv, "--output", "g.jsonl")
    line = json.loads(Path("g.jsonl").read_text().splitlines()[0])
    assert (line["chat_template_kwargs"], line["tools"]) == (QUIET, [{"name": "clock"}])
    first = read_responses("g.jsonl")[0]
    assert (first.prompt.template_kwargs, first.prompt.tools) == (QUIET, [{"name": "clock"}])
    run(capsys, "generate", "base", *argv, "--output", "g.jsonl")  # the same prompts
    rows("rows.jsonl", 2)
    assert "has changed" in run(capsys, "generate", "base", *argv, "--output", "g.jsonl", code=2)


def test_an_endpoint_is_told_or_refuses(capsys):
    rows("rows.jsonl", 2, chat_template_kwargs=QUIET)
    given = ["--chat_template_kwargs", "{depth: 2}", "--tools", "[{type: function}]"]
    with Loopback() as server:
        argv = ["generate", "tiny", "--prompts", "rows.jsonl", "--endpoint", server.url]
        run(capsys, *argv, *given, "--output", "g.jsonl")
        for body in server.bodies:
            assert body["chat_template_kwargs"] == {"depth": 2, **QUIET}
            assert body["tools"] == [{"type": "function"}]
        refused = run(capsys, *argv, *given, "--api", "completions", "--output", "h.jsonl", code=2)
        assert "chat_template_kwargs and tools cannot be sent with api=completions" in refused
        refused = run(capsys, *argv, "--template_date", "2025-03-01", code=2)
        assert "--template_date" in refused


def test_a_resumed_run_keeps_its_day(capsys, on):
    model("base", "dated")
    rows("rows.jsonl")
    recipe("r.yaml", loss="tbpo_a")
    on("2025-03-01")
    printed = run(capsys, "train", "r.yaml", "--output_dir", "whole")
    assert "fixed to 2025-03-01" in printed
    run(capsys, "train", "r.yaml", "--output_dir", "run")
    for path in sorted(Path("run/checkpoint-2").iterdir()):
        path.unlink()
    Path("run/checkpoint-2").rmdir()
    on("2025-03-02")
    resume = ["train", "r.yaml", "--output_dir", "run", "--resume_from_checkpoint"]
    printed = run(capsys, *resume, "true")
    assert "fixed to 2025-03-01" in printed
    assert Path("run/model.safetensors").read_bytes() == (
        Path("whole/model.safetensors").read_bytes()
    )
    assert json.loads(Path("run/run.json").read_text())["config"]["template_date"] == "2025-03-01"
    refused = run(capsys, *resume, "true", "--template_date", "2025-03-02", code=2)
    assert "began with template_date 2025-03-01, not 2025-03-02" in refused
    # from Python too, where resuming is asked for only after the data are prepared
    args = TokenRatioConfig(
        "run", loss="tbpo_a", max_length=300, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = TokenRatioTrainer("base", args=args, train_dataset="rows.jsonl")
    assert trainer.args.template_date == "2025-03-01"
    # a new run has its own day
    run(capsys, "train", "r.yaml", "--output_dir", "new")
    assert json.loads(Path("new/run.json").read_text())["config"]["template_date"] == "2025-03-02"


def test_token_scores_keep_their_day(capsys, on):
    model("base", "dated")
    rows("rows.jsonl")
    recipe("r.yaml", loss="sepo")
    score = ["score-tokens", "rows.jsonl", "--negative_model", "other", "--output", "scores"]
    score += ["--positive_model", "base", "--max_length", "300", "--cache_dir", "cache"]
    tiny = family_tokenizer("dated")
    tiny_model(seed=3, vocab_size=len(tiny), max_position_embeddings=512).save_pretrained("other")
    tiny.save_pretrained("other")
    on("2025-03-01")
    run(capsys, *score)
    on("2025-03-02")
    run(capsys, *score)  # added to, on another day
    train = ["train", "r.yaml", "--token_scores", "scores"]
    assert "fixed to 2025-03-01" in run(capsys, *train, "--output_dir", "run")
    refused = run(capsys, *train, "--output_dir", "two", "--template_date", "2025-03-02", code=2)
    assert "rendered with template_date 2025-03-01, those of this run with template_date" in refused


def test_generations_and_evaluations_keep_their_day(capsys, on, monkeypatch):
    tokenizer = model("base", "dated")
    rows("rows.jsonl")
    seen = prompts_seen("base", tokenizer, monkeypatch)
    argv = ["--prompts", "rows.jsonl", "--max_new_tokens", "2"]
    evaluate = ["evaluate", "base", *argv, "--split", "train", "--num_samples", "2"]
    for day, num in (("2025-03-01", 1), ("2025-03-02", 3)):
        on(day)
        run(capsys, "generate", "base", *argv, "--num_prompts", num, "--output", "g.jsonl")
        run(capsys, *evaluate)
    assert len(seen) > 4
    assert all("Today Date: 01 Mar 2025" in text for text in seen)
    assert "fixed" not in Path("g.jsonl").read_text()
    (settings,) = read_settings("g.jsonl").values()
    assert settings["template_date"] == "2025-03-01"


def test_inspect_data_shows_what_a_run_would_see(capsys, on):
    model("dated", "dated")
    model("qwen", "qwen3")
    model("gemma", "gemma")
    rows("rows.jsonl")
    on("2025-03-01")
    assert "fixed to 2025-03-01" in run(
        capsys, "inspect-data", "rows.jsonl", "--tokenizer", "dated"
    )
    argv = ["inspect-data", "rows.jsonl", "--tokenizer", "dated", "--template_date", "2024-07-26"]
    assert "Today Date: 26 Jul 2024" in run(capsys, *argv)
    argv = ["inspect-data", "rows.jsonl", "--tokenizer", "qwen"]
    assert r"<think>\n\n</think>\n\n'" not in run(capsys, *argv)
    given = ["--chat_template_kwargs", "{enable_thinking: false}"]
    assert r"<think>\n\n</think>\n\n'" in run(capsys, *argv, *given)
    assert "generates past the end of turn '<end_of_turn>'" in run(
        capsys, "inspect-data", "rows.jsonl", "--tokenizer", "gemma"
    )
    Path("other.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    shown = run(capsys, *argv, "--chat_template", "other.jinja")
    assert "'[word 0?]'" in shown


def test_training_warns_of_an_end_that_generation_passes(caplog):
    model("base", "gemma")
    args = TokenRatioConfig("run", loss="dpo", max_length=300, use_cpu=True, report_to="none")
    TokenRatioTrainer("base", args=args, train_dataset=rows("rows.jsonl"))
    assert "generates past the end of turn '<end_of_turn>'" in caplog.text


def test_a_reward_model_and_its_judge_read_the_same(capsys, on):
    tokenizer = model("base", "dated")
    rows("rows.jsonl")
    on("2025-03-01")
    recipe("r.yaml")
    settings = yaml.safe_load(Path("r.yaml").read_text())
    del settings["loss"]
    Path("r.yaml").write_text(yaml.safe_dump(settings))
    run(capsys, "train-reward", "r.yaml", "--output_dir", "rm")
    config = json.loads(Path("rm/run.json").read_text())["config"]
    assert config["template_date"] == "2025-03-01"
    on("2025-03-02")
    from tokenratio.data import prepare_pairs
    from tokenratio.data.chat import Conversation
    from tokenratio.data.template import TemplateSettings
    from tokenratio.evaluation.inputs import ModelPool
    from tokenratio.evaluation.judges.protocol import JudgeContext
    from tokenratio.evaluation.judges.registry import judge_settings

    context = JudgeContext(None, None, Path(), Path("cache"), [], ModelPool().model)
    judge = judge_settings("reward-model", {"model": "rm"}).make(context)
    row = json.loads(Path("rows.jsonl").read_text().splitlines()[0])
    trained = prepare_pairs(
        [row],
        tokenizer,
        max_length=None,
        max_prompt_length=None,
        template=TemplateSettings(day=date(2025, 3, 1)),
    ).dataset[0]
    ids = judge._encode(Conversation(row["prompt"]), row["chosen"][0]["content"])["input_ids"]
    assert ids == [*trained["prompt_ids"], *trained["chosen_ids"]]


def test_an_implicit_judge_reads_a_prompt_as_the_policy_was_trained():
    from tokenratio.data.chat import Conversation
    from tokenratio.evaluation.inputs import ModelPool
    from tokenratio.evaluation.judges.protocol import JudgeContext
    from tokenratio.evaluation.judges.registry import judge_settings
    from tokenratio.models.response import Response

    tokenizer = model("policy", "qwen3")
    turns = [{"role": "user", "content": "word?"}]
    context = JudgeContext(None, "policy", Path(), Path("cache"), [], ModelPool().model)
    plain = judge_settings("implicit", {"policy": "policy"}).make(context)
    given = judge_settings("implicit", {"policy": "policy", "chat_template_kwargs": QUIET}).make(
        context
    )
    write_run_file("policy", config={"chat_template_kwargs": QUIET})
    trained = judge_settings("implicit", {"policy": "policy"}).make(context)
    ids = tuple(tokenizer("ash", add_special_tokens=False)["input_ids"])
    for sampled in (None, ids):
        for judge, prompt in (
            (plain, Conversation(turns, None, QUIET)),
            (given, Conversation(turns)),
            (trained, Conversation(turns)),
        ):
            prompt_ids, _ = judge._encode(prompt, Response("ash", "eos", sampled))
            assert tokenizer.decode(prompt_ids).endswith(NO_THOUGHT)
        prompt_ids, _ = plain._encode(Conversation(turns), Response("ash", "eos", sampled))
        assert NO_THOUGHT not in tokenizer.decode(prompt_ids)
    assert plain.identity() != given.identity() == trained.identity()
