"""The reward model: its loss, where its score is read, what it learns, and how recipes fail."""

import json
import math
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tiny import WORDS, tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.train_reward import COMMAND
from tokenratio.data import PairCollator
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.reward_model import RewardModelJudge
from tokenratio.models.response import Response
from tokenratio.models.reward_model import load_reward_model, with_padding
from tokenratio.training.reward_trainer import RewardConfig, RewardTrainer, bradley_terry_loss

run = COMMAND.run
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 64}
SHORT = {"max_position_embeddings": 8}
SMALL_BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
SMALL_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def settings(folder, **overrides):
    quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    return RewardConfig(**{"output_dir": str(folder), "max_length": 32, **quiet, **overrides})


def separable_pairs(num, *, seed=0):
    """The chosen response, and only it, holds the word "gum"."""
    pairs = word_pairs(num, seed=seed)
    others = [word for word in WORDS if word != "gum"]
    for index, pair in enumerate(pairs):
        for side in ("prompt", "chosen", "rejected"):
            pair[side] = pair[side].replace("gum", others[index % len(others)])
        words = pair["chosen"].split()
        words.insert(index % (len(words) + 1), "gum")
        pair["chosen"] = " ".join(words)
    return pairs


@pytest.fixture
def policy(tmp_path):
    """A policy's folder, as training leaves it."""
    tiny_model().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def make_trainer(policy, tmp_path):
    def make(pairs, **overrides):
        args = settings(**{"folder": tmp_path / "run", **overrides})
        model = load_reward_model(policy, seed=args.seed)
        with torch.no_grad():  # rewards of a size at which the loss is not flat
            model.score.weight.mul_(30)
        return RewardTrainer(model, args, pairs, pairs, processing_class=tiny_tokenizer())

    return make


def test_a_model_and_its_tokenizer_by_name(policy, tmp_path):
    """As `TokenRatioTrainer`: the tokenizer is by default the one saved with the model."""
    args, pairs = settings(tmp_path / "run", max_steps=1), word_pairs(4)
    loaded = load_reward_model(policy, seed=args.seed)
    weights = []
    for given in (
        {"model": policy},
        {"model": str(policy), "processing_class": str(policy)},
        {"model": loaded},
        {"model": loaded, "processing_class": tiny_tokenizer()},
    ):
        trainer = RewardTrainer(args=args, train_dataset=pairs, **given)
        assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
        weights.append(trainer.model.score.weight)
    for weight in weights[1:]:
        torch.testing.assert_close(weight, weights[0])


def test_a_model_without_a_tokenizer_needs_one(tmp_path):
    tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(TokenRatioError, match=r"cannot load a tokenizer for .*bare"):
        RewardTrainer(tmp_path / "bare", settings(tmp_path / "run"), word_pairs(4))


def test_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.5, 1.0, 0.0])
    expected = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(2.0)), math.log(2)]
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), torch.tensor(expected))
    assert bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4


def rewards_one_by_one(model, rows):
    """Each row alone, without padding: the score at its last token."""
    scores = []
    for row in rows:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
            hidden = model.model(ids).last_hidden_state[0, -1]
            scores.append(hidden @ model.score.weight[0])
    return torch.stack(scores).view(-1, 2)


def test_gradient_of_a_step_by_hand(make_trainer, tmp_path, monkeypatch):
    """Over two accumulated batches of unequal size, the mean is over the step's pairs."""
    trainer = make_trainer(
        word_pairs(5),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        optim="sgd",
    )
    rewards = rewards_one_by_one(trainer.model, trainer.train_dataset)
    margin = rewards[:, 0] - rewards[:, 1]
    score = trainer.model.score.weight
    # d/dr of -log σ(margin) is -(1 - σ(margin)) for chosen, + for rejected
    pull = torch.stack([margin.sigmoid() - 1, 1 - margin.sigmoid()], dim=1) / 5
    expected = torch.autograd.grad(rewards, [score, trainer.model.model.norm.weight], pull.detach())
    found = {}

    def keep(args, state, control):
        found["score"] = score.grad.clone()
        found["norm"] = trainer.model.model.norm.weight.grad.clone()
        return control

    monkeypatch.setattr(trainer.callback_handler, "on_pre_optimizer_step", keep)
    trainer.train()
    torch.testing.assert_close(found["score"], expected[0])
    torch.testing.assert_close(found["norm"], expected[1])
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(bradley_terry_loss(*rewards.T).mean().item(), rel=1e-5)
    assert line["rewards/margins"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert line["rewards/accuracies"] == pytest.approx((margin > 0).float().mean().item())


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>", None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_the_score_is_read_at_eos_whatever_the_padding(family, pad_token, tmp_path):
    """Also where the tokenizer pads with EOS, or has no pad token, as GPT-2's."""
    tiny_model(family).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad_token
    model = load_reward_model(tmp_path, seed=0).eval()
    saved = with_padding(model, tokenizer)
    assert tokenizer.pad_token == pad_token
    assert saved.pad_token_id not in (None, tokenizer.eos_token_id)
    eos = tokenizer.eos_token_id
    rows = [
        {"row": 0, "prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 4, eos], "rejected_ids": [5, eos]},
        # a chosen response that was cut, one with an EOS inside
        {"row": 1, "prompt_ids": [9], "chosen_ids": [7, 7], "rejected_ids": [6, eos, 6, eos]},
    ]
    for multiple in (None, 16):
        batch = PairCollator(saved.pad_token_id, pad_to_multiple_of=multiple)(rows)
        with torch.no_grad():
            scores = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, 0]
            body = getattr(model, model.base_model_prefix)
            hidden = body(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
        ends = batch["attention_mask"].sum(-1) - 1
        expected = model.score(hidden[torch.arange(4), ends])[:, 0]
        torch.testing.assert_close(scores, expected)
        assert scores.unique().numel() == 4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_loss_and_gradient_are_trl_s(make_trainer, tmp_path):
    """An implementation that is not ours, on the same batch."""
    from datasets import Dataset
    from trl import RewardConfig as TrlConfig
    from trl import RewardTrainer as TrlTrainer

    ours = make_trainer(word_pairs(6))
    rows = list(ours.train_dataset)
    theirs = TrlTrainer(
        model=ours.model,
        args=TrlConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(
            [
                {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
                for row in rows
            ]
        ),
        processing_class=tiny_tokenizer(),
    )
    batch = theirs.data_collator(list(theirs.train_dataset))
    expected = theirs.compute_loss(ours.model, batch)
    found = ours.compute_loss(ours.model, ours.data_collator(rows))
    torch.testing.assert_close(found, expected)
    weights = [p for p in ours.model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(a, b)


def recipe_of(tmp_path, **changes):
    for name, rows in (("train", separable_pairs(160)), ("test", separable_pairs(64, seed=1))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    document = {
        "model_config": {"model_type": "llama", **TINY},
        "tokenizer": {"byte_level_bpe": 300},
        "train_dataset": str(tmp_path / "train.jsonl"),
        "eval_dataset": str(tmp_path / "test.jsonl"),
        "max_length": 48,
        "max_steps": 10,
        "per_device_train_batch_size": 64,
        "learning_rate": 2e-2,
        "use_cpu": True,
        "save_strategy": "no",
        "output_dir": str(tmp_path / "run"),
        **changes,
    }
    document = {k: v for k, v in document.items() if v is not None}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_ten_steps_learn_what_is_separable(policy, tmp_path, capsys):
    recipe = recipe_of(tmp_path, model=str(policy), model_config=None, tokenizer=None)
    assert COMMAND.run([recipe]) == 0
    folder = tmp_path / "run"
    written = json.loads((folder / "eval.json").read_text())
    accuracy = written["held_out"]["accuracy"]
    assert accuracy["mean"] > 0.9
    assert accuracy["mean"] == pytest.approx(written["eval_rewards/accuracies"])
    assert accuracy["num"] == 64
    low, high = written["held_out"]["interval"]
    assert f"accuracy {accuracy['mean']:.3f} (95 % {low:.3f}–{high:.3f}; 64 pairs, no ties)" in (
        capsys.readouterr().out
    )
    record = json.loads((folder / "run.json").read_text())
    assert record["kind"] == "reward model"
    assert record["data"]["eval"]["rows_kept"] == 64
    # What is saved scores by itself as it did.
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["ash bay gum <eos>", "ash <eos>"], padding=True, return_tensors="pt")
    good, bad = model(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
    assert good > bad
    # And the judge, which reads texts, gives the same scores.
    judge = RewardModelJudge.load(folder)
    judged = judge.rewards([("ash ", Response("bay gum")), ("ash ", Response("bay"))])
    batch = tokenizer(["ash bay gum <eos>", "ash bay <eos>"], padding=True, return_tensors="pt")
    expected = model(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
    assert judged == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_seed_fixes_the_run(tmp_path):
    digests = []
    for seed in (0, 0, 1):
        flags = ["--overwrite", "--max_steps", "2", f"--seed={seed}"]
        assert COMMAND.run([recipe_of(tmp_path), *flags]) == 0
        digests.append((tmp_path / "run" / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] != digests[2]


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    steps = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    assert COMMAND.run([recipe_of(tmp_path), *steps]) == 0
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    resume = str(tmp_path / "run" / "checkpoint-2")
    assert COMMAND.run([recipe_of(tmp_path), *steps, "--resume_from_checkpoint", resume]) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "rewards/margins" in line] == [1, 2, 3, 4]


def test_a_policys_adapter_is_part_of_the_body(policy, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(policy)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_reward_model(tmp_path / "adapter", seed=0)
    plain = load_reward_model(policy, seed=0)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        hidden = adapted.get_base_model().model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model.model(input_ids=ids).last_hidden_state, hidden)
        assert (plain.model(input_ids=ids).last_hidden_state - hidden).abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = load_reward_model(tmp_path / "adapter", seed=0)
    assert torch.equal(model.score.weight, again.score.weight)
    assert again.config.num_labels == 1


def test_a_reward_models_adapter_is_no_start(policy, tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    changed = {"base_model_name_or_path": str(policy), "task_type": "SEQ_CLS"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(TokenRatioError, match=r"another kind of model \(SEQ_CLS\)"):
        load_reward_model(tmp_path / "adapter", seed=0)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(make_trainer):
    trainer = make_trainer(word_pairs(3), per_device_train_batch_size=3)
    with torch.no_grad():
        trainer.model.score.weight.fill_(math.nan)
    with pytest.raises(TokenRatioError, match="not finite at step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, "did you mean 'learning_rate'"),
        ({"loss": "dpo"}, "unknown key"),
        ({"model": "x"}, "either model or model_config"),
        ({"model": ".", "model_config": None, "tokenizer": "world:reviews"}, "cannot load"),
        ({"train_dataset": None}, "needs train_dataset"),
        ({"train_dataset": "none.jsonl"}, "none.jsonl"),
        ({"model_config": {"model_type": "vit"}}, "cannot build the model"),
        ({"model_config": {"model_type": "bart", **SMALL_BART}}, "encoder"),
        ({"model_config": {"model_type": "llama", **TINY, **SHORT}}, "max_length to 8"),
        ({"on_bad_row": "warn"}, "on_bad_row must be one of skip, error"),
        ({"train_sampling_strategy": "sorted"}, "train_sampling_strategy must be"),
        ({"per_device_train_batch_size": 0}, "must be at least 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
    ],
)
def test_a_bad_recipe(changes, message, tmp_path):
    with pytest.raises(TokenRatioError, match=message):
        COMMAND.run([recipe_of(tmp_path, **changes)])
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_resuming_is_exact_or_refused(make_trainer, tmp_path, caplog):
    rows = separable_pairs(40)

    def reward_trainer(folder, **changes):
        steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return make_trainer(rows, **{"folder": folder, **steps, **changes})

    reward_trainer(tmp_path / "whole").train()
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(folder / "checkpoint-6")
    for name, value in (
        ("per_device_train_batch_size", 2),
        ("seed", 3),
        ("learning_rate", 1e-5),
        ("max_steps", 5),
    ):
        with pytest.raises(TokenRatioError, match=f"began with {name} .* set it back"):
            reward_trainer(folder, **{name: value}).train(resume_from_checkpoint=True)
    reward_trainer(folder).train(resume_from_checkpoint=True)
    ends = [of / "checkpoint-6" / "model.safetensors" for of in (folder, tmp_path / "whole")]
    weights = [load_file(end) for end in ends]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    reward_trainer(folder).train(resume_from_checkpoint=True)
    assert "nothing is left to train" in caplog.text


def test_a_folder_that_is_not_a_reward_run_is_left_alone(policy, tmp_path):
    recipe = recipe_of(tmp_path, model=str(policy), model_config=None, tokenizer=None)
    with pytest.raises(TokenRatioError, match="model that the run starts from"):
        COMMAND.run([recipe, "--output_dir", str(policy), "--overwrite"])


def test_help(capsys):
    assert COMMAND.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "usage: tokenratio train-reward" in printed
    assert "--max_length" in printed
    assert "--beta" not in printed
