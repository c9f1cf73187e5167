"""`evaluate` as a user runs it: small policies of the review world, every kind of run and judge."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel

from evaluation.loopback import KEY, Loopback
from tiny import WORDS, tiny_model, tiny_tokenizer
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.cli.main import main
from tokenratio.data.worlds import WORLDS, world_rows
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.backends import TransformersBackend
from tokenratio.evaluation.inputs import subjects_of
from tokenratio.evaluation.judges.gold import GoldJudge
from tokenratio.evaluation.judges.llm import LLMJudge
from tokenratio.evaluation.response_files import read_responses
from tokenratio.evaluation.results import PolicyMeasures
from tokenratio.models.loading import load_model

WORLD = WORLDS["reviews"]
NUM = 5
PROMPTS = f"world:reviews?pairs={NUM}&seed=3&split=test"
PAIRS = "world:reviews?pairs=6&seed=5&split=test"
QUICK = ["--max_new_tokens", "6", "--num_samples", "2"]


def save_policy(folder, seed, **changes):
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = WORLD.policy_config(**sizes, num_attention_heads=2, initializer_range=0.3, **changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    WORLD.build_tokenizer().save_pretrained(folder)


def train(folder, loss, **changes):
    args = TokenRatioConfig(
        output_dir=str(folder),
        loss=loss,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        max_length=64,
        max_steps=3,
        learning_rate=1e-2,
        warmup_steps=0,
        per_device_train_batch_size=4,
        baseline_hidden_size=8,
        **{name: value for name, value in changes.items() if name != "peft_config"},
    )
    trainer = TokenRatioTrainer(
        "base",
        args=args,
        train_dataset=world_rows("world:reviews?pairs=12"),
        processing_class=WORLD.build_tokenizer(),
        peft_config=changes.get("peft_config"),
    )
    trainer.train()
    trainer.save_model()


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """A starting policy and runs of it; `free` is a model that no run made."""
    folder = tmp_path_factory.mktemp("runs_folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_policy("base", 0)
        save_policy("free", 1)
        train("runs/dpo", "dpo", beta=0.2)
        train("runs/tbpo_q", "tbpo_q")
        train("runs/lora", "tbpo_a", peft_config=LoraConfig(r=4, target_modules="all-linear"))
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, request):
    """Each test has a folder of its own, with the runs at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    if "runs_folder" in request.fixturenames:
        for name in ("base", "free", "runs"):
            Path(name).symlink_to(request.getfixturevalue("runs_folder") / name)


def evaluate(capsys, *argv, code=0):
    found = main(["evaluate", *map(str, argv)])
    printed = capsys.readouterr()
    assert found == code, printed.err or printed.out
    if code:
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("tokenratio: ")
    elif "--suite" not in argv:  # the harness draws bars
        assert printed.err == ""
    assert KEY not in printed.out + printed.err
    return printed.err if code else printed.out


def measures(name, folder="evaluation"):
    return PolicyMeasures.load(Path(folder) / name)


def values(policy, measure):
    return [value for _, _, value in policy.named(measure).values]


@pytest.fixture
def pairs():
    """The world's pairs as a file: without credit, whose bootstrap takes a second."""
    lines = [json.dumps(row) + "\n" for row in world_rows(PAIRS)]
    Path("pairs.jsonl").write_text("".join(lines))
    return "pairs.jsonl"


def texts(path):
    return {g.id: [sample.text for sample in g.samples] for g in read_responses(path)}


def write_generations(path, answers, prompts=None, *, num=1):
    """A file of one answer to each of the world's prompts, `num` times."""
    rows = world_rows(PROMPTS)
    prompts = prompts or [row["prompt"] for row in rows]
    lines = [
        {
            "id": f"test_dataset:{i}",
            "prompt": prompt,
            "samples": [{"text": text, "token_ids": None, "finish_reason": "eos"}] * num,
            "settings": "hand",
        }
        for i, (prompt, text) in enumerate(zip(prompts, answers, strict=True))
    ]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def gold_rate(ours, theirs):
    """Wins and half the ties of one text against another, by the gold reward."""
    gaps = [
        WORLD.gold_reward(a) - WORLD.gold_reward(b)
        for id in ours
        for a, b in zip(ours[id], theirs[id] * (len(ours[id]) // len(theirs[id])), strict=True)
    ]
    return statistics.mean(0.5 + 0.5 * ((gap > 0) - (gap < 0)) for gap in gaps)


# the whole


@pytest.mark.slow
def test_runs_of_every_kind_end_to_end(runs_folder, capsys, monkeypatch):
    chosen = [row["chosen"] for row in world_rows(PROMPTS)]
    write_generations("human.jsonl", chosen, num=2)
    argv = ["runs/dpo", "runs/tbpo_q", "low=runs/lora", "free=free", "human.jsonl"]
    argv += ["--prompts", PROMPTS, "--pairs", PAIRS, *QUICK]
    shown = evaluate(capsys, *argv)

    # the table is printed and kept, the reference first: what the first run started from
    kept = Path("evaluation/table.md").read_text(encoding="utf-8")
    assert kept.split("\n\n")[0] in shown
    head = "| measure | reference | runs-dpo | runs-tbpo_q | low | free | human |"
    assert kept.startswith(head)
    found = {name: measures(name) for name in head.strip("| ").split(" | ")[1:]}
    groups = [policy.group for policy in found.values()]
    assert groups == ["reference", "dpo", "tbpo_q", "tbpo_a", "free", "human"]
    assert found["low"].settings["path"] == "runs/lora"
    assert Path(found["low"].settings["reference"]).parts[-2:] == ("runs_folder0", "base")

    for name, policy in found.items():
        answers = texts(policy.settings["path"] if name == "human" else f"evaluation/{name}/" + GEN)
        assert values(policy, "gold_reward") == [
            WORLD.gold_reward(text) for group in answers.values() for text in group
        ]
        has_model, has_reference = name != "human", name not in ("human", "reference")
        present = {measure.name for measure in policy.measures}
        assert ("diversity/entropy" in present) == has_model
        for group in ("kl_policy_ref", "pairs/accuracy", "pairs/margin", CREDIT.format("+kl")):
            assert (group in present) == has_reference, (name, group)
        assert (CREDIT.format("+baseline") in present) == (name == "runs-tbpo_q")
        assert ("stability/loss/end" in present) == (name in ("runs-dpo", "runs-tbpo_q", "low"))
        assert ("win_rate/gold" in present) == (name != "reference")
        if name != "reference":
            rate = gold_rate(answers, texts("evaluation/reference/" + GEN))
            assert policy.named("win_rate/gold").mean == pytest.approx(rate)
        assert not any("ALARM" in note and "reference" in note for note in policy.notes), name
        assert all(math.isfinite(value) for m in policy.measures for *_, value in m.values)

    # one frontier for each way of training, none for what is only read
    lines = [x for x in kept.splitlines() if x.startswith("- ") and "ALARM" not in x]
    assert [line.partition(":")[0] for line in lines] == ["- dpo", "- tbpo_q", "- tbpo_a", "- free"]
    assert all(line in shown for line in lines)

    # the same again computes nothing new but the figures
    before = {p: p.read_bytes() for p in Path("evaluation").rglob("*") if p.is_file()}
    for cls in (TransformersBackend, GoldJudge):
        monkeypatch.setattr(cls, "__call__", lambda *_: pytest.fail("asked again"))
    shown = evaluate(capsys, *argv)
    assert shown.count(f"{NUM} of {NUM} prompts are already answered") == 5
    assert shown.count("comparisons are already judged") == 5
    assert {p: p.read_bytes() for p in Path("evaluation").rglob("*") if p.is_file()} == before


GEN = "generations.jsonl"
CREDIT = "credit/log_ratio{}/spearman"


def sequence_log_ratios(model, ref_model, prompt_ids, response_ids):
    with torch.no_grad():
        logits = [
            m(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
            for m in (model, ref_model)
        ]
    return [each.double().log_softmax(-1) for each in logits]


def test_an_adapter_is_measured_as_peft_runs_it(runs_folder, pairs, capsys):
    """KL and margin by hand from PEFT's own loading, which is not how the command loads it."""
    evaluate(capsys, "runs/lora", "--prompts", PROMPTS, "--pairs", pairs, *QUICK, "--beta", "0.3")
    found = measures("runs-lora")
    base, tokenizer = load_model("base"), WORLD.build_tokenizer()
    policy = PeftModel.from_pretrained(load_model("base"), "runs/lora").eval()
    kl = []
    for generation in read_responses("evaluation/runs-lora/generations.jsonl"):
        prompt_ids = tokenizer(generation.prompt)["input_ids"]
        for sample in generation.samples:
            p, q = sequence_log_ratios(policy, base, prompt_ids, sample.token_ids)
            kl.append((p.exp() * (p - q)).sum().item())
    assert min(kl) > 1e-3
    assert values(found, "kl_policy_ref") == pytest.approx(kl, rel=1e-3)
    margins = []
    for row in world_rows(PAIRS):
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        rewards = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(row[side], add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
            p, q = sequence_log_ratios(policy, base, prompt_ids, ids)
            rewards.append(0.3 * (p - q)[range(len(ids)), ids].sum().item())
        margins.append(rewards[0] - rewards[1])
    assert values(found, "pairs/margin") == pytest.approx(margins, rel=1e-3, abs=1e-5)
    assert found.named("pairs/accuracy").mean == statistics.mean(m > 0 for m in margins)


def test_beta_is_the_runs_own(runs_folder, pairs, capsys):
    margins = {}
    for name, more in (("own", []), ("told", ["--beta", "0.4"])):
        evaluate(capsys, "runs/dpo", "--pairs", pairs, "--output_dir", name, *more)
        margins[name] = measures("runs-dpo", name).named("pairs/margin").mean
    assert margins["told"] == pytest.approx(2 * margins["own"], rel=1e-4)


def test_a_recipe_and_its_flags(runs_folder, capsys):
    recipe = {
        "runs": ["runs/dpo", "other=free"],
        "prompts": PROMPTS,
        "num_prompts": 3,
        "num_samples": 1,
        "max_new_tokens": 4,
        "output_dir": "from_recipe",
        "judges": {"gold": None},
        "against": "other",
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    evaluate(capsys, "recipe.yaml", "--num_prompts", "2")
    dpo = measures("runs-dpo", "from_recipe")
    assert dpo.named("gold_reward").num == 2
    other = texts("from_recipe/other/generations.jsonl")
    for name in ("runs-dpo", "reference"):
        rate = gold_rate(texts(f"from_recipe/{name}/generations.jsonl"), other)
        assert measures(name, "from_recipe").named("win_rate/gold").mean == rate
    assert measures("other", "from_recipe").named("win_rate/gold") is None
    # more prompts are added to those that are there
    shown = evaluate(capsys, "recipe.yaml", "--num_prompts", "4")
    assert "2 of 4 prompts are already answered" in shown
    assert "2 of 4 comparisons are already judged" in shown
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "num_prmpts": 2}))
    assert "did you mean 'num_prompts'" in evaluate(capsys, "recipe.yaml", code=2)


def test_without_a_run_the_reference_is_told(runs_folder, capsys):
    evaluate(capsys, "free", "--prompts", PROMPTS, *QUICK)
    assert measures("free").named("kl_policy_ref") is None
    assert measures("free").named("gold_reward").num == 2 * NUM
    assert not Path("evaluation/reference").exists()
    argv = ["free", "--prompts", PROMPTS, *QUICK, "--reference", "base"]
    evaluate(capsys, *argv)
    assert measures("free").named("kl_policy_ref").mean > 0
    shown = evaluate(capsys, "same=base", *argv)
    assert set(values(measures("same"), "kl_policy_ref")) == {0}
    assert "frontier" not in shown  # of a single policy besides the reference


def test_other_sampling_has_no_kl(runs_folder, capsys):
    for name, more in (("top_p", ["--top_p", "0.9"]), ("cold", ["--temperature", "0.7"])):
        evaluate(capsys, "runs/dpo", "--prompts", PROMPTS, *QUICK, *more, "--output_dir", name)
        found = measures("runs-dpo", name)
        assert found.named("kl_policy_ref") is None
        assert found.named("diversity/entropy") is not None
        assert "Gold reward for KL" not in Path(name, "table.md").read_text()


# whom judges compare with


@pytest.mark.parametrize("against", ["column:chosen", "given.jsonl"])
def test_against_texts_that_are_given(against, runs_folder, capsys):
    chosen = [row["chosen"] for row in world_rows(PROMPTS)]
    write_generations("given.jsonl", chosen)
    argv = ["runs/dpo", "--prompts", PROMPTS, *QUICK, "--num_prompts", "4", "--against", against]
    evaluate(capsys, *argv)
    theirs = texts("given.jsonl")
    for name in ("runs-dpo", "reference"):
        ours = texts(f"evaluation/{name}/generations.jsonl")
        assert len(ours) == 4
        assert measures(name).named("win_rate/gold").mean == gold_rate(ours, theirs)
    shown = evaluate(capsys, *argv[:-1], "runs-dpo", code=2)
    assert "was made with other settings (against " in shown


def test_a_file_must_answer_these_prompts(runs_folder, capsys):
    rows = world_rows(PROMPTS)
    chosen, prompts = ([row[name] for row in rows] for name in ("chosen", "prompt"))
    write_generations("few.jsonl", chosen[1:], prompts[1:])
    write_generations("other.jsonl", chosen, prompts[1:] + prompts[:1])
    argv = ["free", "--prompts", PROMPTS, *QUICK]
    for given, message in (
        (
            "few.jsonl",
            "few.jsonl has no answer to 1 of 5 prompts, first test_dataset:4",
        ),
        ("other.jsonl", "other.jsonl: the prompt of test_dataset:0 differs"),
    ):
        assert message in evaluate(capsys, given, "--prompts", PROMPTS, code=2)
        assert message in evaluate(capsys, *argv, "--against", given, code=2)
    assert not list(Path("evaluation").rglob("*.jsonl"))  # found before anything was generated


# judges


def test_judges_of_models(runs_folder, capsys):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained("free", num_labels=1)
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_config(config)
    reward.save_pretrained("reward")
    WORLD.build_tokenizer().save_pretrained("reward")
    capsys.readouterr()
    judges = {
        "reward-model": {"model": "reward", "batch_size": 3},
        "implicit": {"policy": "runs/lora", "reference": "base", "beta": 0.5},
    }
    argv = ["runs/dpo", "--prompts", PROMPTS, *QUICK, "--judges", json.dumps(judges)]
    evaluate(capsys, *argv)
    found = measures("runs-dpo")
    assert found.named("win_rate/gold") is None  # only those asked for
    ours, theirs = (
        texts(f"evaluation/{name}/generations.jsonl") for name in ("runs-dpo", "reference")
    )
    tokenizer = WORLD.build_tokenizer()

    def score(prompt, text):
        ids = tokenizer(f"{prompt}{text}{tokenizer.eos_token}")["input_ids"]
        with torch.no_grad():
            return reward.eval()(torch.tensor([ids])).logits.item()

    prompts = [row["prompt"] for row in world_rows(PROMPTS)]
    wins = [
        0.5 + 0.5 * ((gap > 0) - (gap < 0))
        for prompt, id in zip(prompts, ours, strict=True)
        for a, b in zip(ours[id], theirs[id], strict=True)
        for gap in [score(prompt, a) - score(prompt, b)]
    ]
    assert values(found, "win_rate/reward-model") == wins
    assert len(set(values(found, "win_rate/implicit"))) > 1
    judges["implicit"]["beta"] = 1
    argv[-1] = json.dumps(judges)
    assert "(beta 0.5, now 1.0)" in evaluate(capsys, *argv, code=2)


def test_every_model_is_loaded_once(runs_folder, pairs, capsys, monkeypatch):
    """The runs, their reference and an implicit judge's policy, whatever each is used for."""
    from transformers import AutoModelForCausalLM

    loaded = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda name, *args, **kwargs: loaded.append(Path(name).name) or load(name, *args, **kwargs),
    )
    judges = {"implicit": {"policy": "runs/dpo"}, "other": {"judge": "implicit", "policy": "free"}}
    argv = ["free", "runs/dpo", "runs/tbpo_q", "--reference", "base", "--prompts", PROMPTS]
    argv += ["--pairs", pairs, "--judges", json.dumps(judges), *QUICK]
    evaluate(capsys, *argv)
    assert sorted(loaded) == ["base", "dpo", "free", "tbpo_q"]
    assert "win_rate/implicit" in {measure.name for measure in measures("free").measures}


def test_dtype_is_that_of_the_policies_and_no_false_alarm(runs_folder, pairs, capsys, monkeypatch):
    """The reference is compared in the precision of training, whatever it is evaluated in."""
    dtypes = []
    draw = TransformersBackend.__call__

    def spy(self, prompts):
        dtypes.append(self.model.dtype)
        return draw(self, prompts)

    monkeypatch.setattr(TransformersBackend, "__call__", spy)
    argv = ["runs/dpo", "--prompts", PROMPTS, "--pairs", pairs, *QUICK, "--dtype", "bfloat16"]
    evaluate(capsys, *argv)
    assert dtypes == [torch.bfloat16] * 2
    assert not any("another reference" in note for note in measures("runs-dpo").notes)
    assert measures("runs-dpo").named("kl_policy_ref").mean > 0


@pytest.mark.slow
def test_auto_samples_in_bfloat16_where_that_is_faster_and_measures_in_float32(
    runs_folder, pairs, capsys, monkeypatch
):
    """The responses are those of `generate`; the measures are those of float32 weights."""
    argv = ["runs/dpo", "--prompts", PROMPTS, "--pairs", pairs, *QUICK]
    evaluate(capsys, *argv, "--output_dir", "plain")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    shown = evaluate(capsys, *argv)
    assert "device: cpu (no GPU found); samples in bfloat16 (dtype: auto; this CPU" in shown
    assert "measures in float32\n" in shown
    assert re.search(r"^runs-dpo: \d+ tokens in \d+\.\d s \([\d,]+/s\)$", shown, re.MULTILINE)
    assert "tokens in" not in evaluate(capsys, *argv)  # nothing was left to generate
    plain = PolicyMeasures.load(Path("plain/runs-dpo"))
    for name in ("pairs/margin", "pairs/accuracy"):
        assert measures("runs-dpo").named(name) == plain.named(name)
    settings = measures("runs-dpo").settings
    assert (settings["dtype"], settings["sampling_dtype"]) == ("float32", "bfloat16")
    how = ["--prompts", PROMPTS, "--split", "test", *QUICK, "--output", "own.jsonl"]
    assert main(["generate", "runs/dpo", *how]) == 0
    own, theirs = map(read_responses, ("own.jsonl", "evaluation/runs-dpo/generations.jsonl"))
    assert [each.samples for each in own] == [each.samples for each in theirs]
    assert "other settings (dtype" in evaluate(capsys, *argv, "--dtype", "float32", code=2)


def test_people_judge_by_a_sheet(runs_folder, capsys):
    chosen = [row["chosen"] for row in world_rows(PROMPTS)]
    write_generations("ours.jsonl", [text + " good" for text in chosen])
    argv = ["ours.jsonl", "--prompts", PROMPTS, "--judges", "{human: {}}"]
    argv += ["--against", "column:chosen"]
    sheet = Path("evaluation/ours/sheet.jsonl")
    for state in ("written", "no verdict is filled in yet"):
        assert f"{sheet}: {state}; set each verdict" in evaluate(capsys, *argv)
        assert measures("ours").named("win_rate/human") is None
    for num in (2, NUM):  # some of it, then the rest
        lines = [json.loads(line) for line in sheet.read_text().splitlines()]
        for line in lines[:num]:
            line["verdict"] = "12"[line["response_2"] + " good" != line["response_1"]]
        sheet.write_text("".join(json.dumps(line) + "\n" for line in lines))
        evaluate(capsys, *argv)
        rate = measures("ours").named("win_rate/human")
        assert (rate.mean, rate.num) == (1, num)
        assert measures("ours").named("not_judged/human").mean == 1 - num / NUM


def test_an_llm_judges_once(runs_folder, capsys, monkeypatch):
    chosen = [row["chosen"] for row in world_rows(PROMPTS)]
    write_generations("ours.jsonl", [f"so good number {i}" for i in range(NUM)])
    garbled = "so good number 0"

    def reply(question, number):
        first = re.search(r"-- response A \w+ -----\n(.*?)\n-----", question, re.S).group(1)
        if garbled in question:
            return "no idea"
        return "[[A]]" if first not in chosen else "[[B]]"

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Loopback(reply) as server:
        llm = {"base_url": server.url, "model": "tiny", "template": "hh-helpful"}
        argv = ["ours.jsonl", "--prompts", PROMPTS, "--against", "column:chosen", "--judges"]
        evaluate(capsys, *argv, json.dumps({"llm": llm}))
        asked = server.asked.total()
        assert asked == 2 * NUM
        found = measures("ours")
        assert found.named("win_rate/llm").mean == 1
        assert found.named("win_rate/llm").num == NUM - 1
        assert found.named("not_judged/llm").mean == 1 / NUM
        assert found.named("position_flips/llm").mean == 0
        evaluate(capsys, *argv, json.dumps({"llm": llm}))
        Path("evaluation/ours/judgements-llm.jsonl").unlink()
        evaluate(capsys, *argv, json.dumps({"llm": llm}))  # the answers are kept by content
        with monkeypatch.context() as patch:
            patch.setattr(LLMJudge, "__call__", lambda *_: pytest.fail("asked"))
            changed = json.dumps({"llm": llm | {"template": "tldr"}})
            shown = evaluate(capsys, *argv, changed, code=2)
            assert "(template 'hh-helpful', now 'tldr'" in shown
        assert server.asked.total() == asked
    files = [path.read_bytes() for path in Path("evaluation").rglob("*") if path.is_file()]
    assert KEY.encode() not in b"".join(files)


# what was kept, and what does not fit


def test_an_interrupted_evaluation_goes_on(runs_folder, capsys):
    argv = ["runs/dpo", "--prompts", PROMPTS, *QUICK]
    evaluate(capsys, *argv)
    path = Path("evaluation/runs-dpo/generations.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    shown = evaluate(capsys, *argv)
    assert f"2 of {NUM} prompts are already answered" in shown
    assert path.read_bytes() == whole
    for more, message in (
        (["--seed", "1"], "(seed 0, now 1)"),
        (["--top_p", "0.5"], "(top_p 1.0, now 0.5)"),
        (["--prompts", PROMPTS.replace("seed=3", "seed=4")], "prompts "),
    ):
        shown = evaluate(capsys, *argv, *more, code=2)
        assert "was made with other settings" in shown
        assert message in shown
    shutil.copytree("free", "again")
    evaluate(capsys, "again", *argv[1:])
    save_policy("again", 7)
    assert "other settings (weights" in evaluate(capsys, "again", *argv[1:], code=2)


def test_another_reference_than_that_of_training_is_an_alarm(runs_folder, pairs, capsys):
    argv = ["runs/dpo", "runs/lora", "--pairs", pairs, "--reference"]
    shown = evaluate(capsys, *argv, "free")
    for name in ("runs-dpo", "runs-lora"):
        note = measures(name).notes[0]
        assert note.startswith("ALARM: it was trained against another reference")
        assert f"{name}: {note}" in shown
    evaluate(capsys, *argv, "base")
    for name in ("runs-dpo", "runs-lora"):
        assert not any("another reference" in note for note in measures(name).notes)


def test_the_reference_is_told_by_its_values_in_the_runs_own_dtype(runs_folder, pairs, capsys):
    adapter = LoraConfig(r=4, target_modules="all-linear")
    train("half", "dpo", model_init_kwargs={"dtype": "bfloat16"}, peft_config=adapter)
    evaluate(capsys, "half", "--pairs", pairs)
    assert not any("ALARM: it was trained" in note for note in measures("half").notes)


def test_policies_that_share_no_vocabulary(runs_folder, capsys):
    """What needs both models is left out, and shown."""
    tiny_model().save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    rows = [{"prompt": "ash", "chosen": word, "rejected": "bay"} for word in WORDS[2:6]]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["tiny", "--reference", "base", "--prompts", "pairs.jsonl", "--pairs", "pairs.jsonl"]
    evaluate(capsys, *argv, *QUICK)
    found = measures("tiny")
    assert "KL and implicit reward are not measured" in found.notes[0]
    assert found.named("kl_policy_ref") is None
    assert found.named("pairs/accuracy") is None
    assert found.named("diversity/entropy").num > 0


def test_pairs_by_subset_and_those_that_cannot_be_used(capsys):
    tiny_model().save_pretrained("base")
    tiny_model(seed=1).save_pretrained("tiny")
    for name in ("base", "tiny"):
        tiny_tokenizer().save_pretrained(name)
    rows = [
        {"prompt": "ash", "chosen": word, "rejected": "bay bay", "kind": "ab"[i % 2]}
        for i, word in enumerate(WORDS[2:7])
    ]
    rows.insert(1, {"prompt": "ash", "chosen": "", "rejected": "bay", "kind": "c"})
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["tiny", "--reference", "base", "--pairs", "pairs.jsonl", "--max_length", "3"]
    shown = evaluate(capsys, *argv, "--subset_column", "kind")
    assert "tiny: 1 of 6 pairs cannot be used; 5 sides are cut at max_length 3" in shown
    found = measures("tiny")
    assert [found.named(f"pairs/accuracy, {kind}").num for kind in "ab"] == [3, 2]
    assert found.named("pairs/accuracy, c") is None
    assert found.named("pairs/accuracy").num == 5
    shown = evaluate(capsys, *argv, "--subset_column", "kid", code=2)
    assert "pairs.jsonl:1 has no column 'kid'" in shown


def test_credit_needs_the_worlds_tokenizer_and_says_so(capsys):
    tiny_model().save_pretrained("base")
    tiny_model(seed=1).save_pretrained("tiny")
    for name in ("base", "tiny"):
        tiny_tokenizer().save_pretrained(name)
    evaluate(capsys, "tiny", "--reference", "base", "--pairs", PAIRS)
    assert "credit is not measured: " in measures("tiny").notes[-1]
    assert measures("tiny").named("pairs/accuracy") is not None


@pytest.mark.slow
def test_suite(capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").resolve())
    datasets.disable_progress_bars()
    tiny_model().save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    rows = [{"question": word, "answer": i % 2} for i, word in enumerate(WORDS)]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "word_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "asked.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": ["elm fig", "gum hay"],
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    Path("task.yaml").write_text(yaml.safe_dump(task))
    loads = []
    load = load_model
    for module in ("suite", "inputs"):
        monkeypatch.setattr(
            f"tokenratio.evaluation.{module}.load_model",
            lambda path, how: loads.append((path, how["dtype"])) or load(path, how),
        )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    shown = evaluate(capsys, "tiny", "--suite", "task.yaml", "--reference", "tiny")
    score = json.loads(Path("evaluation/tiny/suite.json").read_text())["scores"][0]
    found = measures("tiny").named("suite/word_choice (0-shot acc)")
    assert (found.mean, found.standard_error) == (score["value"], score["stderr"])
    assert (found.num, found.better) == (12, "higher")
    assert measures("tiny").named("suite/mean").mean == found.mean
    # The evaluation's own model is asked, and not loaded again if nothing is left to score.
    assert loads == [("tiny", "bfloat16")] * 2
    assert f"| suite/mean ↑ | {found.text} |" in shown


# mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", PROMPTS], "needs runs, or a recipe with runs"),
        (["free"], "evaluate needs --prompts, --pairs or --suite"),
        (["none.yaml"], "cannot read none.yaml"),
        (["free", "--promts", "x"], "did you mean 'prompts'"),
        (["free", "--prompts", "none.jsonl"], "none.jsonl: no such file"),
        (["free", "--prompts", "world:revews?prompts=3"], "no world 'revews'"),
        (["free", "--prompts", PROMPTS, "--num_samples", "0"], "num_samples must be at least 1"),
        (["free", "--prompts", PROMPTS, "--num_prompts", "0"], "num_prompts must be at least 1"),
        (["free", "--prompts", PROMPTS, "--dtype", "int8"], "dtype must be one of auto, float32"),
        (["free", "--prompts", PROMPTS, "--top_p", "0"], "top_p must be above 0"),
        (["free", "--prompts", PROMPTS, "--temperature", "-1"], "temperature must be 0 or"),
        (["free", "--prompts", PROMPTS, "--beta", "0"], "beta must be positive"),
        (["./none", "--prompts", PROMPTS], "cannot load ./none: there is no such folder"),
        (["none.jsonl", "--prompts", PROMPTS], "cannot read none.jsonl"),
        (
            ["free", "--prompts", PROMPTS, "--reference", "./x"],
            "cannot load ./x: there is no such folder",
        ),
        (["a=free", "a=base", "--prompts", PROMPTS], "two runs are called a"),
        (["free", "free", "--prompts", PROMPTS], "free is given twice: leave one out"),
        (["x/free", "y=base", "z/x/free", "--prompts", PROMPTS], "two runs are called x-free"),
        (["reference=free", "--prompts", PROMPTS], "'reference' cannot be a policy's name"),
        (["a/b=free", "--prompts", PROMPTS], "'a/b' cannot be a policy's name"),
        (["a=", "--prompts", PROMPTS], "cannot be a policy's name"),
        (["", "--prompts", PROMPTS], "cannot be a policy's name"),
        (["..", "--prompts", PROMPTS], "cannot be a policy's name"),
        (["free", "--prompts", PROMPTS, "--judges", "{golden: {}}"], "unknown judge 'golden'"),
        (["free", "--prompts", PROMPTS, "--judges", "[gold]"], "judges must be a mapping"),
        (["free", "--prompts", PROMPTS, "--judges", "{gold: x}"], "must hold `key: value` lines"),
        (["free", "--prompts", PROMPTS, "--judges", "{gold: {wrld: x}}"], "did you mean 'world'"),
        (["free", "--prompts", PROMPTS, "--judges", "{reward-model: {}}"], "needs model"),
        (["free", "--prompts", PROMPTS, "--judges", "{implicit: {reference: x}}"], "needs policy"),
        (["free", "--prompts", PROMPTS, "--judges", "{llm: {model: x}}"], "needs base_url"),
        (["free", "--prompts", PROMPTS, "--judges", "{gold: {}}"], "give --reference, or another"),
        (["free", "--pairs", PAIRS, "--judges", "{gold: {}}"], "give --prompts"),
        (["free", "--pairs", PAIRS], "pairs need a reference"),
        (["free", "--prompts", PROMPTS, "--against", "fre"], "unknown run in --against 'fre'"),
        (["free", "--prompts", PROMPTS, "--against", "none.jsonl"], "cannot read none.jsonl"),
        (["free", "--prompts", PROMPTS, "--against", "column:chsen"], "column chsen is neither"),
        (
            ["free", "--prompts", "pairs.jsonl", "--against", "free"],
            "--against free has no effect without --judges",
        ),
    ],
)
def test_mistakes_are_one_line_and_generate_nothing(argv, message, runs_folder, capsys):
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert message in evaluate(capsys, *argv, code=2)
    assert not list(Path("evaluation").rglob("*.jsonl"))


def test_names_of_runs():
    given = ["runs/beta0.1", "runs/beta0.5", "/runs/x", "./y", "org/model", "a=b=c", "s/g.jsonl"]
    subjects = subjects_of(given)
    assert [(each.name, each.path) for each in subjects] == [
        ("runs-beta0.1", "runs/beta0.1"),
        ("runs-beta0.5", "runs/beta0.5"),
        ("runs-x", "/runs/x"),
        ("y", "./y"),
        ("org-model", "org/model"),
        ("a", "b=c"),
        ("s-g", "s/g.jsonl"),
    ]
    assert [each.is_file for each in subjects] == [False] * 6 + [True]
    with pytest.raises(TokenRatioError, match="cannot be a policy's name"):
        subjects_of(["/"])


def test_help(capsys):
    shown = evaluate(capsys, "--help")
    assert "--against" in shown
    assert "reward-model" in shown


def test_two_judges_of_one_kind_have_names_of_their_own(runs_folder, capsys):
    settings = "{first: {judge: gold}, second: {judge: gold, world: reviews}}"
    argv = ["free", "--reference", "base", "--prompts", PROMPTS, "--judges", settings]
    assert evaluate(capsys, *argv) is not None
    found = measures("free")
    figures = [found.named(f"win_rate/{name}").mean for name in ("first", "second")]
    assert figures[0] == figures[1]
    assert Path("evaluation/free/judgements-second.jsonl").is_file()
    shown = evaluate(capsys, *argv[:-1], "{'../x': {judge: gold}}", code=2)
    assert "cannot be a judge's name" in shown
