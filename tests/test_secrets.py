"""Secrets planted by every way in are in no file that a command writes or text that it prints."""

import copy
import json
import pickle
import time
from pathlib import Path

import pytest
import yaml

from evaluation.loopback import Loopback
from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import RewardConfig, TokenRatioConfig
from tokenratio.cli.main import main
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.endpoint import EndpointSettings
from tokenratio.evaluation.judges.registry import judge_settings
from tokenratio.masking import MASK, mask_secrets, mask_text

PLANT = "PLANTED0123456789abcdefghijklmnopq"  # no secret is without it
TOKEN, KEY, PASSWORD = f"hf_{PLANT}", f"sk-{PLANT}", f"pw{PLANT}"
URL = f"https://user:{PASSWORD}@127.0.0.1:1/x"
MODEL = {"model": "model", "train_dataset": "pairs.jsonl", "eval_dataset": "pairs.jsonl"}
RUN = {
    **MODEL,
    "hub_token": TOKEN,
    "model_init_kwargs": {"token": TOKEN},
    "run_name": URL,
    "use_cpu": True,
    "max_length": 32,
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a model and pairs, in which all caches are too; secrets in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    rows = [{**row, "prompt": "ash " * (i + 1)} for i, row in enumerate(word_pairs(6))]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def run(home, capfd):
    """Runs a command and looks for what was planted."""

    def run(*argv, code=0):
        found = main([str(word) for word in argv])
        printed = capfd.readouterr()
        assert found == code, printed.err or printed.out
        assert PLANT not in printed.out + printed.err
        given = {home / "recipe.yaml", home / "evaluation.yaml"}
        for path in sorted(set(home.rglob("*")) - given):
            assert PLANT not in path.name
            assert not path.is_file() or PLANT.encode() not in path.read_bytes(), path
        return printed.out + printed.err

    return run


def recipe(**changes):
    Path("recipe.yaml").write_text(yaml.safe_dump({**RUN, **changes}))
    return "recipe.yaml"


@pytest.mark.slow
def test_train(run):
    sft = {"hub_token": TOKEN, "model_init_kwargs": {"token": TOKEN}, "run_name": URL}
    path = recipe(sft={**sft, "max_steps": 1}, peft={"r": 2, "target_modules": "all-linear"})
    printed = run("train", path, "--dry-run")
    assert printed.count(MASK) >= 6
    assert "127.0.0.1" in printed  # the rest of the address is shown
    run("train", path, "--output_dir", "runs/mine")
    assert list(Path("runs/mine/checkpoint-2").glob("rng_state*"))
    assert not list(Path().rglob("training_args.bin"))
    run("train", path, "--output_dir", "runs/mine", "--resume_from_checkpoint", "true")
    assert Path("runs/mine/README.md").is_file()
    assert json.loads(Path("runs/mine/run.json").read_text())["config"]["hub_token"] == MASK


@pytest.mark.slow
def test_train_reward_and_score_tokens(run):
    reward = {name: value for name, value in RUN.items() if name != "max_steps"}
    Path("recipe.yaml").write_text(yaml.safe_dump({**reward, "max_steps": 1}))
    run("train-reward", "recipe.yaml", "--output_dir", "reward")
    scores = ["--positive_model", "model", "--negative_model", "model"]
    scores += ["--negative_prompt", "ash {prompt}"]
    run("score-tokens", "pairs.jsonl", "--output", "scores", "--tokenizer", "model", *scores)


def test_a_flag_is_masked_and_warned_of(run):
    printed = run("train", recipe(), "--dry-run", "--hub_token", TOKEN)
    assert "every user of this machine can read --hub_token" in printed


@pytest.mark.parametrize(
    "changes",
    [
        {"train_dataset": f"{URL}/pairs.jsonl"},
        {"train_dataset": [{"path": f"{URL}/pairs.parquet"}, "pairs.jsonl"]},
        {"model": URL},
        {"model": f"https://{TOKEN}@127.0.0.1/x"},
        {"tokenizer": f"{URL}?token={PASSWORD}"},
        {"ref_model": URL},
        {"hub_token": [PASSWORD]},
        {"model_init_kwargs": f"{{token: {PASSWORD}"},
        {"model_init_kwargs": [f"token: {PASSWORD}"]},
        {"report_to": "none", "learning_rate": URL},
    ],
    ids=str,
)
def test_an_error_shows_none(changes, run):
    printed = run("train", recipe(**changes), "--output_dir", "runs/mine", code=2)
    assert printed.count("\n") == 1


def refused(question, times):
    return (401, {}, json.dumps({"error": {"message": f"Incorrect API key: {KEY}, see {URL}"}}))


QUICK = ["--max_retries", "0", "--timeout", "5", "--extra_body", json.dumps({"api_key": PASSWORD})]


@pytest.mark.slow
def test_generate_and_judge(run):
    ask = ["--prompts", "pairs.jsonl", "--max_new_tokens", "4"]
    run("generate", "model", *ask, "--output", "ours.jsonl")
    with Loopback(lambda question, number: "[[A]]") as server:
        there = ["--endpoint", server.url, *QUICK]
        run("generate", "tiny", *ask, *there, "--output", "theirs.jsonl")
        sides = ["ours.jsonl", "--against", "theirs.jsonl", "--judge", "llm", "--model", "tiny"]
        judge = [*sides, "--base_url", server.url, *QUICK, "--cache", "verdicts.sqlite"]
        run("judge", *judge, "--output", "verdicts.jsonl")
        assert server.keys == {f"Bearer {KEY}"}
        assert server.bodies[0]["api_key"] == PASSWORD
    with Loopback(fault=refused) as server:
        there = ["--endpoint", server.url, *QUICK]
        printed = run("generate", "tiny", *ask, *there, "--output", "no.jsonl", code=2)
        assert "Incorrect API key: <key>" in printed
    there = ["--endpoint", URL, *QUICK]
    run("generate", "tiny", *ask, *there, "--output", "no.jsonl", code=2)


@pytest.mark.slow
def test_evaluate(run):
    path = recipe()
    run("train", path, "--output_dir", "runs/mine")
    with Loopback(lambda question, number: "[[A]]") as server:
        judge = {"base_url": server.url, "model": "tiny", "extra_body": {"api_key": PASSWORD}}
        run(
            *("evaluate", "runs/mine", "--prompts", "pairs.jsonl", "--pairs", "pairs.jsonl"),
            *("--max_new_tokens", "4", "--output_dir", "evaluation"),
            *("--judges", json.dumps({"llm": judge})),
        )
        assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "output_dir"),
    [
        ("hf_tinyllama110000model", "sk-wikipedia-2023-train.jsonl", "sk-word-pairs-run-0001"),
        (TOKEN, f"{KEY}.jsonl", KEY),
    ],
)
def test_names_like_tokens_stay(model, data, output_dir, home):
    Path("model").rename(model)
    Path("pairs.jsonl").rename(data)
    names = {"model": model, "train_dataset": data, "eval_dataset": data}
    assert main(["train", recipe(**names), "--output_dir", output_dir]) == 0
    written = Path(output_dir, "run.json").read_text()
    found = json.loads(written)
    assert found["model"] == str(Path(model).resolve())
    assert found["starts_from"]["path"] == str(Path(model).resolve())
    assert found["config"]["output_dir"] == output_dir
    assert found["config"]["hub_token"] == MASK
    argv = ["evaluate", output_dir, "--pairs", data, "--output_dir", f"{output_dir}-measured"]
    assert main(argv) == 0
    measured = list(Path(f"{output_dir}-measured").rglob("measures.json"))
    assert len(measured) == 2  # of the policy and of the reference
    assert not any(MASK in path.read_text() for path in measured)


def test_paths_stay_and_their_urls_are_masked():
    names = {"train_dataset": [{"path": f"{KEY}.jsonl"}], "references": [TOKEN], "ref_model": TOKEN}
    assert mask_secrets(names) == names
    urls = {"model": URL, "train_dataset": [{"path": URL}]}
    assert PLANT not in str(mask_secrets(urls))
    assert mask_secrets({"model": {"token": PASSWORD}}) == {"model": {"token": MASK}}
    args = TokenRatioConfig(output_dir=KEY, use_cpu=True, run_name=KEY)
    read = pickle.loads(pickle.dumps(args))
    assert (read.output_dir, read.run_name) == (KEY, MASK)


@pytest.mark.parametrize("config", [TokenRatioConfig, RewardConfig])
def test_settings_in_python(config, tmp_path):
    args = config(
        output_dir=str(tmp_path),
        use_cpu=True,
        hub_token=TOKEN,
        model_init_kwargs={"token": TOKEN},
        run_name=URL,
    )
    shown = (repr(args), str(args), f"{args}", args.to_json_string(), str(args.to_sanitized_dict()))
    for text in (*shown, str(args.to_dict()), str(pickle.dumps(args))):
        assert PLANT not in text
        assert "output_dir" in text
    for same in (args, copy.copy(args), copy.deepcopy(args)):
        assert (same.hub_token, same.run_name) == (TOKEN, URL)
        assert same.init_kwargs == {"token": TOKEN}
    read = pickle.loads(pickle.dumps(args))
    assert (read.hub_token, read.learning_rate) == (MASK, args.learning_rate)
    assert read.save_strategy is args.save_strategy


def test_an_address_with_a_password_is_refused():
    for settings in (
        EndpointSettings,
        lambda url, model: judge_settings("llm", {"base_url": url, "model": model}),
    ):
        with pytest.raises(TokenRatioError) as error:
            settings(URL, "tiny")
        assert PLANT not in str(error.value)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("see https://u:p@host/x", "see https://<masked>@host/x"),
        ("https://u:p@ss@host", "https://<masked>@host"),
        ("https://u:p/q@host/x", "https://<masked>@host/x"),
        ("s3://id:key@bucket", "s3://<masked>@bucket"),
        ("https://me@firm:p@host", "https://<masked>@host"),
        (f"https://{TOKEN}@host", "https://<masked>@host"),
        (
            "http://host/x?a=1&access_token=b#c",
            "http://host/x?a=1&access_token=<masked>#c",
        ),
        (f"it says {TOKEN}, {KEY}.", "it says <masked>, <masked>."),
        ("https://mysecrettoken@host/x", "https://<masked>@host/x"),
        ("git+https://ghp_abc@h, git://me@h", "git+https://<masked>@h, git://<masked>@h"),
        (f"sk-{'0a1b2c3d' * 4}, 'sk-or-v1-{'0a' * 32}'", "<masked>, '<masked>'"),
    ],
)
def test_text_is_masked(text, masked):
    assert mask_text(text) == masked
    assert mask_text(masked) == masked
    assert str(TokenRatioError(text)) == masked
    assert mask_secrets({"name": [text]}) == {"name": [masked]}


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8000/v1/x@main",
        "hf://datasets/org/name@main",
        "world:reviews?pairs=100&seed=3",
        "write to me@host, see http://host/",
        "hf_token and sk-learn",
        "ssh://git@host, s3://bucket@x",
        "/models/hf_tinyllama110000model",
        "sk-wikipedia-2023-train.jsonl and sk-Wikipedia-2023-train.jsonl",
        "sk-Word-Pairs-Run-0001/checkpoint-2, runs/sk-Word-Pairs-Run-0001",
        "sk-word-pairs-run-0001, sk-word-pairs-of-wikipedia-run-0001, sk-Word-Pairs-Of-Wikipedia",
    ],
)
def test_text_without_secrets_stays(text):
    assert mask_text(text) == text


@pytest.mark.parametrize(
    "part", ["a://b:", "a://", "https://a:b", "?token=", "sk-", "hf_", "sk-a-"]
)
def test_a_long_text_is_masked_in_time_with_its_length(part):
    """It takes minutes where the time grows with the square."""
    text = part * (300_000 // len(part))
    began = time.process_time()
    mask_text(text)
    assert time.process_time() - began < 20


def test_what_a_template_renders_is_kept():
    """Evaluation renders with the run's record."""
    rendered = {"chat_template_kwargs": {"my_key": "a"}, "tools": [{"api_key": "b"}]}
    assert mask_secrets(rendered) == rendered


def test_tokens_that_are_no_secrets_are_kept():
    special = ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "image")
    kept = {f"{name}_token": "</s>" for name in special}
    kept |= {"sort_key": "length", "cache_key": "a", "columns": {"key": "q"}}
    assert mask_secrets(kept) == kept
    for name in ("token", "key", "api_key", "hub_token", "access_token", "client_secret"):
        assert mask_secrets({name: "</s>"}) == {name: MASK}
