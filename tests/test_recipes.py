"""Every recipe is read, dry-run and trained for two steps, on a tiny model of its family.

Model, data and length are replaced by flags, as a user would.
"""

import json
import re
import zlib
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3Config

from templates import chat_pair, family_tokenizer
from tiny import tiny_model, word_pairs
from tokenratio.cli.main import main
from tokenratio.cli.recipe import read_recipe, resolve
from tokenratio.data import prepare_pairs
from tokenratio.evaluation import PolicyMeasures
from tokenratio.run_folder import read_run_file

RECIPES = Path(__file__).parents[1] / "recipes"
EVALUATIONS = sorted(RECIPES.rglob("evaluate_*.yaml"))
REWARDS = sorted(RECIPES.rglob("reward_*.yaml"))
LAUNCHERS = sorted((RECIPES / "accelerate").glob("*.yaml"))
POLICIES = sorted({*RECIPES.rglob("*.yaml")} - {*EVALUATIONS, *REWARDS, *LAUNCHERS})
# The hub's models in the recipes: a tiny family of tiny.py, a chat template of templates.py.
MODELS = {
    "HuggingFaceH4/mistral-7b-sft-alpha": ("mistral", "chatml"),
    "RLHFlow/LLaMA3-SFT-v2": ("llama", "llama3"),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama_tied", "dated"),
    "Qwen/Qwen3-0.6B": ("qwen3", "qwen3"),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", "smollm3"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama_tied", "chatml"),
    "google/gemma-3-1b-it": ("gemma3", "gemma"),
    "package:smollm2": ("llama_tied", "chatml"),
}
# The rows of the hub's data sets, as far as training reads them.
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
ARMORM = "princeton-nlp/llama3-ultrafeedback-armorm"
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2}
TWO_STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "2"]
TWO_STEPS += ["--gradient_accumulation_steps", "2", "--data_cache_dir", "null"]


def name_of(path):
    return str(path.relative_to(RECIPES).with_suffix(""))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def hub_row(number, pair, source):
    """A pair with the columns that the hub's data set has."""
    question = {"role": "user", "content": pair["prompt"]}
    sides = {
        side: [question, {"role": "assistant", "content": pair[side]}]
        for side in ("chosen", "rejected")
    }
    row = {"prompt": pair["prompt"], "prompt_id": str(number), **sides}
    if source == ULTRAFEEDBACK:
        return {**row, "messages": sides["chosen"], "score_chosen": 8.0, "score_rejected": 5.0}
    return {**row, "all_generated_responses": [pair["rejected"]] * 5, "all_rm_scores": [0.1] * 5}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Each model and data set of the hub that recipes name, in a folder of that name."""
    root = tmp_path_factory.mktemp("hub")
    for name, (family, template) in MODELS.items():
        tokenizer = family_tokenizer(template)
        tiny_model(
            family,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            **{key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")},
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, splits in (
        (ULTRAFEEDBACK, ("train_prefs", "test_prefs", "train_sft", "test_sft")),
        (ARMORM, ("train", "test")),
    ):
        (root / name).mkdir(parents=True)
        for seed, split in enumerate(splits):
            rows = [hub_row(i, pair, name) for i, pair in enumerate(word_pairs(8, seed=seed))]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{split}.jsonl").write_text(lines)
    return root


def flags_of(path, hub):
    """What replaces a recipe's models and data by small ones on this machine."""
    document = read(path)
    flags = {}
    if "model_config" in document:
        flags["model_config"] = {**document["model_config"], **TINY}
    else:
        flags["model"] = str(hub / document["model"])
    if isinstance(document.get("tokenizer"), dict):
        flags["tokenizer"] = {"byte_level_bpe": 300}
    for name in ("train_dataset", "eval_dataset"):
        source = str(document[name])
        if source.startswith("world:"):
            flags[name] = re.sub(r"pairs=\d+", "pairs=8", source)
        elif "data/" not in source:
            flags[name] = str(hub / source)
    corpus = document.get("sft", {}).get("train_dataset")
    if corpus is not None:
        small = re.sub(r"corpus=\d+", "corpus=200", corpus)
        flags["sft"] = {**document["sft"], "train_dataset": small}
    if path not in REWARDS:
        flags["baseline_hidden_size"] = 8
    return [
        word
        for name, value in flags.items()
        for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with the local files that recipes name."""
    monkeypatch.chdir(tmp_path)
    texts = "\n".join(path.read_text(encoding="utf-8") for path in RECIPES.rglob("*.yaml"))
    for name in sorted(set(re.findall(r"data/[\w/]+\.jsonl", texts))):
        rows = word_pairs(12, seed=zlib.crc32(name.encode()))
        if name.startswith("data/chat/"):
            rows = [chat_pair(**row) for row in rows]
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(capsys, *argv):
    found = main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert found == 0, printed.err
    return printed.out


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@each(POLICIES)
def test_a_policy_is_dry_run_and_trained(path, hub, project, capsys):
    recipe, settings = read_recipe(str(path), {})
    flags = flags_of(path, hub)
    said = run(capsys, "train", path, *flags, "--dry-run", "--data_cache_dir", "null")
    assert "estimated memory" in said
    assert "main, eval: " in said
    run(capsys, "train", path, *flags, *TWO_STEPS)
    folder = project / "runs" / path.stem / settings.get("loss", "tbpo_a")
    assert len([line for line in lines_of(folder) if "loss" in line]) == 2
    data = read_run_file(folder)["data"]
    assert all(part["rows_kept"] == part["rows_read"] >= 8 for part in data.values())
    saved = "model" if recipe.peft is None else "adapter_model"
    assert (folder / f"{saved}.safetensors").is_file()


@pytest.mark.slow
@each(EVALUATIONS)
def test_an_evaluation_with_the_runs_and_judges_it_names(path, hub, project, capsys):
    document = read(path)
    recipes = {other.stem: other for other in (*POLICIES, *REWARDS)}
    runs = [Path(name.split("=")[-1]) for name in document["runs"]]
    for folder in runs:
        recipe = recipes[folder.parent.name]
        flags = ["--loss", folder.name, *flags_of(recipe, hub), *TWO_STEPS]
        run(capsys, "train", recipe, *flags)
    judge, rewards = reward_of(path)
    flags = ["--output_dir", judge, *flags_of(rewards, hub), *TWO_STEPS]
    said = run(capsys, "train-reward", rewards, *flags)
    assert "reward model: 2 steps" in said
    small = ["--num_prompts", "3", "--num_samples", "2", "--max_new_tokens", "4"]
    run(capsys, "evaluate", path, *small)
    for folder in runs:
        measured = PolicyMeasures.load(project / document["output_dir"] / folder.name)
        assert measured.named("win_rate/reward-model").num == 6
        assert measured.named("pairs/accuracy").num == 12


def reward_of(evaluation):
    """The folder of its reward model, and the recipe that trains it."""
    folder = Path(read(evaluation)["judges"]["reward-model"]["model"])
    (recipe,) = (path for path in REWARDS if path.stem in folder.parts)
    return folder, recipe


def test_every_reward_model_judges_in_an_evaluation():
    assert {reward_of(path)[1] for path in EVALUATIONS} == {*REWARDS}


def on_the_hub():
    return [path for path in POLICIES if "/" in read(path).get("model", "")]


@each(on_the_hub())
def test_published_settings(path):
    """docs/method.md §7: what a recipe does not write out is the library's default."""
    resolved = resolve(str(path), {}, {})
    recipe, args = resolved.recipe, resolved.main.args
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    adapter = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert recipe.peft == adapter
    assert (args.num_train_epochs, args.max_length, args.warmup_steps) == (1, 2048, 0.05)
    assert args.lr_scheduler_type == "cosine"
    if args.loss != "sft":  # its paper's row had other settings
        optimizer = (args.optim, args.learning_rate, args.max_grad_norm)
        assert optimizer == ("rmsprop", 5e-7, 10)
    data = {
        (f"{ULTRAFEEDBACK}@train_prefs", f"{ULTRAFEEDBACK}@test_prefs"),
        (f"{ARMORM}@train", f"{ARMORM}@test"),
    }
    assert (recipe.train_dataset, recipe.eval_dataset) in data


def test_the_methods_recipes_differ_only_in_their_method():
    """So that one can be run beside another: model, data, adapter and batches are the same."""
    blocks = set()
    for path in (*(RECIPES / "methods").iterdir(), RECIPES / "tbpo_q_released.yaml"):
        text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)  # the memory differs
        shared = re.search(r"^model: .*?^activation_checkpointing: true$", text, FLAGS)
        blocks.add(shared[0])
    assert len(blocks) == 1


FLAGS = re.MULTILINE | re.DOTALL


@pytest.mark.parametrize(
    ("name", "block"), [("qwen3", "<think>\n\n</think>\n\n"), ("smollm3", "<think>\n\n</think>\n")]
)
def test_an_empty_thought_is_part_of_the_prompt(name, block, hub):
    """It would otherwise be the first tokens that are trained on."""
    resolved = resolve(str(RECIPES / "models" / f"{name}.yaml"), {}, {})
    tokenizer = family_tokenizer(name)
    (row,) = prepare_pairs(
        [hub_row(0, word_pairs(1)[0], ULTRAFEEDBACK)],
        tokenizer,
        max_length=None,
        max_prompt_length=None,
        template=resolved.main.args.template,
    ).dataset
    assert tokenizer.decode(row["prompt_ids"]).endswith(f"<|im_start|>assistant\n{block}")
    assert "think" not in tokenizer.decode(row["chosen_ids"])


@pytest.mark.slow
def test_a_gemma_that_reads_images_is_trained_on_text(hub, project, capsys):
    """As the recipe says: an adapter on the language model only."""
    path = RECIPES / "models" / "gemma3.yaml"
    (peft,) = re.findall(r"--peft '(.*?)'", path.read_text().replace("\n# ", " "))
    tokenizer = family_tokenizer("gemma")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 8}
    eyes = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(
        text_config={**text, "vocab_size": len(tokenizer)},
        vision_config=eyes,
        mm_tokens_per_image=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("gemma")
    tokenizer.save_pretrained("gemma")
    flags = [*flags_of(path, hub), "--model", "gemma", "--peft", peft]
    run(capsys, "train", path, *flags, "--dry-run")
    run(capsys, "train", path, *flags, *TWO_STEPS)
    names = load_file("runs/gemma3/tbpo_a/adapter_model.safetensors")
    assert {"language_model" in name for name in names} == {True}


@each(LAUNCHERS)
def test_accelerate_reads_the_launchers_configurations(path, monkeypatch):
    parser = launch.launch_command_parser()
    command = ["--config_file", str(path), "-m", "tokenratio", "train", "recipe.yaml"]
    args, found, _ = launch._validate_launch_command(parser.parse_args(command))
    machines = int(re.search(r"_(\d)x8$", path.stem)[1])
    assert (args.num_machines, args.num_processes) == (machines, 8 * machines)
    assert args.module
    if path.stem.startswith("fsdp2"):
        assert found.distributed_type == DistributedType.FSDP
        environment = launch.prepare_multi_gpu_env(args)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert not plugin.cpu_ram_efficient_loading
        assert "SHARDED" in str(plugin.state_dict_type)
    else:
        assert found.distributed_type == DistributedType.DEEPSPEED
        assert args.zero_stage == int(path.stem[len("zero")])
        assert args.gradient_accumulation_steps == "auto"
        assert args.zero_stage == 2 or args.zero3_save_16bit_model


def test_the_lines_in_the_documentation_name_files_that_exist():
    text = (RECIPES.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    named = re.findall(r"recipes/[\w/]+\.yaml", text)
    assert len(named) >= 5
    assert all((RECIPES.parent / name).is_file() for name in named)
