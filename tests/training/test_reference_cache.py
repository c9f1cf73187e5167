"""What is read from the cache is what the reference says, and never what another one said."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig
from tokenratio.data import prepare_pairs
from tokenratio.data.length_grouping import row_lengths
from tokenratio.errors import TokenRatioError
from tokenratio.models.processes import Group
from tokenratio.models.token_requests import answer_token_requests, disable_dropout
from tokenratio.training import reference_cache as module
from tokenratio.training.cache_entry import FileLayout
from tokenratio.training.reference_cache import CacheSettings, reference_cache

TEMPLATE = (
    "{% set turn = ' bay ' %}{% for m in messages %}{{ turn + m['content'] }} <eos>{% endfor %}"
    "{% if add_generation_prompt %}{{ turn }}{% endif %}"
)
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
CPU = torch.device("cpu")


def reference(family="llama", **overrides):
    model = tiny_model(family, **overrides)
    answer_token_requests(model)
    disable_dropout(model)
    return model.eval().requires_grad_(False)


def pairs(num=9, *, tokenizer=None, max_length=None, rows=None):
    rows = word_pairs(num) if rows is None else rows
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    return prepare_pairs(rows, tokenizer, max_length=max_length, max_prompt_length=None)


def conversations(template, **limits):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    rows = [
        {key: [{"role": role, "content": row[key]}] for key, role in ROLES.items()}
        for row in word_pairs(6)
    ]
    return pairs(tokenizer=tokenizer, rows=rows, **limits)


def cached(folder, model, data, what="log_probs", **overrides):
    settings = {"batch_size": 4, "device": CPU, "padding_id": 0, "progress": False, **overrides}
    return reference_cache(model, data, what, CacheSettings(root=folder, **settings))


def forwards(model, act):
    """How many batches the model was run on while `act` did its work."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    act()
    handle.remove()
    return len(calls)


def entries(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def said_of(model, row, what):
    """The oracle: one row at a time, whole logits, without any of the library's machinery."""
    sides = []
    shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        states = slice(len(row["prompt_ids"]) - 1, -1)
        with torch.no_grad():
            if what == "hidden":
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                sides.append(hidden[0, states][:shared])
            else:
                log_probs = model(input_ids=ids).logits[0, states].log_softmax(-1)
                sides.append(log_probs.gather(-1, torch.tensor(row[side])[:, None]).squeeze(-1))
    return sides


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["log_probs", "hidden"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_it_says_what_the_reference_says(family, what, tmp_path):
    model, data = reference(family), pairs()
    assert any(len(row["chosen_ids"]) > len(row["rejected_ids"]) for row in data.dataset)
    cache = cached(tmp_path, model, data, what)
    for row in data.dataset:
        read, expected = cache.read(what, row["row"]), said_of(model, row, what)
        for ours, theirs in zip(read, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        flat = [side[:1] for side in expected]
        first = cache.of_steps([row["row"]], [1])
        torch.testing.assert_close(first, {f"ref_{what}": torch.cat(flat)}, rtol=1e-4, atol=1e-5)


def test_steps_are_chosen_tokens_of_all_rows_then_rejected_ones(tmp_path):
    cache = cached(tmp_path, reference(), pairs())
    (a, b), (c, d) = cache.read("log_probs", 3), cache.read("log_probs", 1)
    lengths = [min(len(a), len(b)), min(len(c), len(d)) - 1]
    expected = [a[: lengths[0]], c[: lengths[1]], b[: lengths[0]], d[: lengths[1]]]
    assert torch.equal(cache.of_steps([3, 1], lengths)["ref_log_probs"], torch.cat(expected))


@pytest.mark.parametrize("what", ["log_probs", "hidden"])
def test_batches_do_not_matter_and_the_same_ones_repeat(what, tmp_path):
    model, data = reference(), pairs(11)
    caches = [
        cached(tmp_path / name, model, data, what, batch_size=size)
        for name, size in (("one", 1), ("four", 4), ("again", 4))
    ]
    one, four, again = ([side for r in range(11) for side in c.read(what, r)] for c in caches)
    torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(four, again, strict=True))
    files = [(cache.folder / "values.safetensors").read_bytes() for cache in caches[1:]]
    assert files[0] == files[1]


def test_bfloat16_states_are_kept_as_they_are(tmp_path):
    model, data = reference().bfloat16(), pairs()
    cache = cached(tmp_path, model, data, "hidden", batch_size=1)
    row = data.dataset[2]
    for ours, theirs in zip(cache.read("hidden", 2), said_of(model, row, "hidden"), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    log_probs = cached(tmp_path, model, data)
    assert {side.dtype for side in log_probs.read("log_probs", 2)} == {torch.float32}
    # On CUDA autocast computes a last LayerNorm in float32, whatever the weights: kept as well.
    model = reference("gpt2").bfloat16()
    model.transformer.ln_f.register_forward_hook(lambda *hooked: hooked[-1].float() + 2**-20)
    assert cached(tmp_path, model, data, "hidden").read("hidden", 2)[0].dtype == torch.float32


def test_rows_of_like_length_run_together_the_longest_first(tmp_path):
    model, widths = reference(), []
    model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    data = pairs(40)
    for what, pruned in (("log_probs", False), ("hidden", True)):
        widths.clear()
        cached(tmp_path, model, data, what, batch_size=2)
        batches = widths[-20:]
        lengths = sorted(row_lengths(data.dataset, pruned=pruned).tolist(), reverse=True)
        assert batches == lengths[::2]


def test_it_is_a_safetensors_file_of_the_size_that_was_said(tmp_path):
    model, data = reference(), pairs()
    rows = [(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in data.dataset]
    for what, dtype in (("log_probs", torch.float32), ("hidden", torch.bfloat16)):
        folder = cached(tmp_path, model.to(dtype), data, what).folder
        shape, kept_in = ((), torch.float32) if what == "log_probs" else ((16,), dtype)
        size = FileLayout.of(data, what, shape, kept_in).size
        assert size == (folder / "values.safetensors").stat().st_size
        tokens = (
            4 * sum(map(sum, rows)) if what == "log_probs" else 2 * 16 * 2 * sum(map(min, rows))
        )
        assert tokens < size < tokens + 8 * 2 * (len(rows) + 1) + 512
        with safe_open(folder / "values.safetensors", "pt") as file:
            assert sorted(file.keys()) == sorted(
                ["chosen", "chosen_offsets", "rejected", "rejected_offsets"]
            )
            assert file.get_tensor("rejected").dtype == dtype


def test_adapters_are_off_and_the_model_is_left_as_it_was(tmp_path):
    data = pairs()
    plain = cached(tmp_path / "plain", reference(), data)
    model = tiny_model()
    answer_token_requests(model)
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).train()
    cache = cached(tmp_path / "adapted", adapted, data)
    assert adapted.training
    assert cache.folder.name == plain.folder.name  # the base alone counts
    for row in range(len(data.dataset)):
        torch.testing.assert_close(cache.read("log_probs", row), plain.read("log_probs", row))
    row = data.dataset[0]
    with_adapter = said_of(adapted.eval().get_base_model(), row, "log_probs")[0]
    assert (with_adapter - plain.read("log_probs", 0)[0]).abs().max() > 1e-3


def test_it_can_be_sent_to_other_processes(tmp_path):
    cache = cached(tmp_path, reference(), pairs(), "hidden")
    before = cache.read("hidden", 4)  # the file is open now
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert all(
        torch.equal(x, y) for x, y in zip(pickle.loads(sent).read("hidden", 4), before, strict=True)
    )


def test_misuse_is_named(tmp_path):
    cache = cached(tmp_path, reference(), pairs())
    with pytest.raises(ValueError, match="holds log_probs, not hidden"):
        cache.read("hidden", 0)
    for row in (-1, 9):
        with pytest.raises(IndexError, match="of 9"):
            cache.read("log_probs", row)


# --- what is another entry ------------------------------------------------------------------------


def nudged(model):
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(torch.inf))
    return model


def test_nothing_stale_is_read(tmp_path):
    """One weight by its last bit, one character of the template, one token of the length."""
    data = conversations(TEMPLATE, max_length=8)
    model = reference()
    assert forwards(model, lambda: cached(tmp_path, model, data)) == 2
    again = reference()  # the same, rebuilt
    same = conversations(TEMPLATE, max_length=8)
    assert forwards(again, lambda: cached(tmp_path, again, same)) == 0
    changed = {
        "weight": (nudged(reference()), data),
        "template": (model, conversations(TEMPLATE.replace("bay", "hay"), max_length=8)),
        "length": (model, conversations(TEMPLATE, max_length=9)),
        "row": (model, pairs(5)),
    }
    assert data.report.truncated["chosen"].rows  # or the length would not matter
    for name, (its_model, its_data) in changed.items():
        act = lambda: cached(tmp_path, its_model, its_data)  # noqa: B023, E731
        assert forwards(its_model, act) == 2, name
        assert forwards(its_model, act) == 0, name
    assert len(entries(tmp_path)) == 5
    row = changed["template"][1].dataset[0]
    read = cached(tmp_path, model, changed["template"][1]).read("log_probs", 0)
    torch.testing.assert_close(list(read), said_of(model, row, "log_probs"))


def test_another_precision_or_configuration_is_another_entry(tmp_path):
    data = pairs(4)

    def runs(model, what="log_probs", **settings):
        return forwards(model, lambda: cached(tmp_path, model, data, what, **settings))

    assert runs(reference()) == 1
    assert runs(reference().bfloat16()) == 1
    assert runs(reference(), autocast=torch.bfloat16) == 1
    assert runs(reference(rms_norm_eps=1e-5)) == 1
    assert runs(reference(attn_implementation="eager")) == 1
    buffered = reference()
    buffered.register_buffer("correction", torch.ones(2))
    assert runs(buffered) == 1
    buffered.correction[1] = 2
    assert runs(buffered) == 1
    assert runs(reference(), "hidden") == 2  # one row first, to see what a state is like
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert runs(reference()) == 1
    finally:
        torch.set_float32_matmul_precision(precision)
    # Nothing of this changes what the reference says.
    moved = reference()
    moved.config._name_or_path, moved.config.use_cache = "elsewhere", False
    moved.config.transformers_version = "0"
    assert runs(moved) == runs(reference()) == runs(reference(), "hidden") == 0
    assert runs(reference(), batch_size=1) == 0


def test_autocast_is_used(tmp_path):
    model, data = reference(), pairs()
    plain, mixed = (
        cached(tmp_path, model, data),
        cached(tmp_path, model, data, autocast=torch.bfloat16),
    )
    difference = max(
        (x - y).abs().max().item()
        for row in range(9)
        for x, y in zip(plain.read("log_probs", row), mixed.read("log_probs", row), strict=True)
    )
    assert 1e-4 < difference < 0.5


# --- what is not whole ----------------------------------------------------------------------------


def flip_a_bit(folder):
    path = folder / "values.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut_off(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-20])

    return damage


def rename_another(folder):
    note = json.loads((folder / "entry.json").read_text())
    note["key"] = "0" * 64
    (folder / "entry.json").write_text(json.dumps(note))


DAMAGE = {
    "a bit flipped": flip_a_bit,
    "values cut off": cut_off("values.safetensors"),
    "note cut off": cut_off("entry.json"),
    "no values": lambda folder: (folder / "values.safetensors").unlink(),
    "no note": lambda folder: (folder / "entry.json").unlink(),
    "note of another kind": lambda folder: (folder / "entry.json").write_text("[]"),
    "another entry": rename_another,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_anew_and_said(damage, tmp_path, caplog):
    model, data = reference(), pairs()
    cache = cached(tmp_path, model, data)
    whole = cache.read("log_probs", 5)
    assert "is damaged" not in caplog.text
    DAMAGE[damage](cache.folder)
    assert forwards(model, lambda: cached(tmp_path, model, data)) == 3
    assert "is damaged" in caplog.text
    assert str(cache.folder) in caplog.text
    assert forwards(model, lambda: cached(tmp_path, model, data)) == 0
    again = cached(tmp_path, model, data).read("log_probs", 5)
    assert all(torch.equal(x, y) for x, y in zip(again, whole, strict=True))


def test_an_interrupted_run_leaves_nothing_to_be_found(tmp_path):
    model, data = reference(), pairs()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, model, data)
    assert list(tmp_path.iterdir()) == []
    handle.remove()
    assert forwards(model, lambda: cached(tmp_path, model, data)) == 3


def test_what_killed_runs_left_is_removed_after_a_day(tmp_path):
    names = {age: f".{age:064x}.0123abcd.tmp" for age in (1, 25)}
    for hours, name in names.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "values.safetensors"
        path.touch()
        then = path.stat().st_mtime - 3600 * hours
        os.utime(path, (then, then))
    mine = tmp_path / ".mine.tmp"
    mine.mkdir()
    (mine / "values.safetensors").touch()
    os.utime(mine / "values.safetensors", (0, 0))
    cached(tmp_path, reference(), pairs())
    assert {p.name for p in tmp_path.iterdir() if p.name[0] == "."} == {names[1], ".mine.tmp"}


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path):
    """A second run begins and ends while the first is at work on the same entry."""
    model, data = reference(), pairs()
    second = []

    def start_another(*_):
        handle.remove()
        second.append(cached(tmp_path, reference(), data, batch_size=2))

    handle = model.register_forward_hook(start_another)
    first = cached(tmp_path, model, data)
    assert first.folder == second[0].folder
    assert [path.name for path in tmp_path.iterdir()] == [first.folder.name]
    for row in data.dataset:
        expected = said_of(model, row, "log_probs")
        for cache in (first, second[0]):
            torch.testing.assert_close(list(cache.read("log_probs", row["row"])), expected)


# --- what is refused ------------------------------------------------------------------------------


def test_an_entry_that_does_not_fit_is_refused_before_it_is_computed(tmp_path, monkeypatch):
    model, data = reference(), pairs()
    size = FileLayout.of(data, "log_probs", (), torch.float32).size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(TokenRatioError, match=r"needs .*iB, and .*iB free"):
        cached(tmp_path, model, data)
    assert not calls
    assert not list(tmp_path.iterdir())
    handle.remove()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=size))
    assert forwards(model, lambda: cached(tmp_path, model, data)) == 3


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TokenRatioError, match="cannot write the reference cache"):
        cached(tmp_path / "file" / "cache", reference(), pairs())


@pytest.mark.parametrize("what", ["log_probs", "hidden"])
def test_an_answer_that_is_not_finite_is_refused(what, tmp_path):
    model = reference()
    data = pairs(rows=[*word_pairs(4), {"prompt": "odd", "chosen": "ash", "rejected": "bay cow"}])
    model.get_input_embeddings().weight[data.dataset[4]["prompt_ids"]] = torch.nan
    with pytest.raises(TokenRatioError, match=r"train_dataset:4 .*are not finite"):
        cached(tmp_path, model, data, what)
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"batch_size": 4, "device": CPU, "padding_id": 0, "progress": False}
    root = TokenRatioConfig(output_dir=str(tmp_path), use_cpu=True).reference_cache_dir
    cache = reference_cache(reference(), pairs(), "log_probs", CacheSettings(root=root, **settings))
    assert cache.folder.parent == tmp_path / ".cache/tokenratio/reference"


# --- several processes ----------------------------------------------------------------------------

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from accelerate import PartialState
sys.path.insert(0, {tests!r})
from training_test_reference_cache import cached, forwards, pairs, reference
torch.set_num_threads(1)
state, folder, model = PartialState(cpu=True), Path({folder!r}), reference()
runs = forwards(model, lambda: cached(folder, model, pairs(11), "hidden", batch_size=2))
Path(folder, f".runs-{{state.process_index}}").write_text(str(runs))
cache = cached(folder, model, pairs(11), "hidden")
assert len(cache.read("hidden", 10)) == 2
state.wait_for_everyone()
state.destroy_process_group()
os._exit(0)
"""


def test_a_process_that_computes_is_waited_for(tmp_path, monkeypatch):
    """Each batch counts as progress, and the others meet this one before the plain barrier."""
    done = []
    monkeypatch.setattr(module, "advance", lambda: done.append("batch"))
    monkeypatch.setattr(Group, "gather", lambda self, value: done.append("meeting"))
    monkeypatch.setattr(PartialState, "wait_for_everyone", lambda self: done.append("barrier"))
    cached(tmp_path, reference(), pairs(9), batch_size=4)
    assert done == [*["batch"] * 3, "meeting", "barrier", "barrier"]


@pytest.mark.slow
def test_processes_share_the_work(tmp_path):
    script = tmp_path / "script.py"
    (tmp_path / "training_test_reference_cache.py").write_text(Path(__file__).read_text())
    folder = tmp_path / "cache"
    script.write_text(SCRIPT.format(folder=str(folder), tests=str(Path(__file__).parents[1])))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--multi_gpu", "--main_process_port", "0", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # 6 batches; the first process also looks at one row, to see what a state is like.
    assert [(folder / f".runs-{index}").read_text() for index in (0, 1)] == ["4", "3"]
    model, data = reference(), pairs(11)
    assert len(entries(folder)) == 1
    cache = cached(folder, model, data, "hidden")
    assert forwards(model, lambda: cached(folder, model, data, "hidden")) == 0
    for row in data.dataset:
        torch.testing.assert_close(
            list(cache.read("hidden", row["row"])),
            said_of(model, row, "hidden"),
            rtol=1e-4,
            atol=1e-5,
        )
