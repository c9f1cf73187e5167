"""The contrast of tokens: what it is, how its rows are found, what is refused."""

import json

import numpy as np
import pytest
import torch

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.data import padding_id, prepare_pairs
from tokenratio.data.contrast import with_prompt_template
from tokenratio.errors import TokenRatioError
from tokenratio.training.reference_cache import CacheSettings
from tokenratio.training.token_contrast import (
    ContrastSide,
    TokenContrast,
    compute_contrast,
    row_keys,
)

TOKENIZER = tiny_tokenizer()
ROWS = word_pairs(9)


def prepare(rows=ROWS, **limits):
    return prepare_pairs(rows, TOKENIZER, **{"max_length": 32, "max_prompt_length": None, **limits})


def score(folder, data=None, *, prompts=("{prompt}", "{prompt}"), seeds=(0, 1), rows=ROWS):
    data = prepare() if data is None else data
    voices = [
        ContrastSide(
            tiny_model(seed=seed),
            data if prompt == "{prompt}" else with_prompt_template(data, rows, TOKENIZER, prompt),
            prompt,
        )
        for seed, prompt in zip(seeds, prompts, strict=True)
    ]
    return compute_contrast(
        data,
        *voices,
        CacheSettings(
            root=folder / "cache",
            batch_size=4,
            device=torch.device("cpu"),
            padding_id=padding_id(TOKENIZER),
            progress=False,
        ),
    )


def log_probs(model, prompt, response):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    table = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return table.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


@pytest.mark.slow
def test_contrast_by_hand_with_models_and_prompts(tmp_path):
    """log p₊ − log p₋ of each token, one row at a time; the prompts' words stand around theirs."""
    data, ids = prepare(), TOKENIZER.convert_tokens_to_ids
    for prompts, seeds in (
        (("{prompt}", "{prompt}"), (0, 1)),
        (("ash bay {prompt}", "{prompt} cow"), (3, 3)),
    ):
        values = score(tmp_path, data, prompts=prompts, seeds=seeds).values
        around = [[ids(part.split()) for part in text.split("{prompt}")] for text in prompts]
        for row, key in zip(data.dataset, row_keys(data.dataset), strict=True):
            for side, ours in zip(("chosen_ids", "rejected_ids"), values[key], strict=True):
                said = [
                    log_probs(tiny_model(seed=seed), [*a, *row["prompt_ids"], *b], row[side])
                    for seed, (a, b) in zip(seeds, around, strict=True)
                ]
                np.testing.assert_allclose(ours, said[0] - said[1], rtol=0, atol=1e-5)


def test_saved_and_read_again_bit_for_bit(tmp_path):
    scores = score(tmp_path)
    scores.save(tmp_path / "scores")
    again = TokenContrast.open(tmp_path / "scores")
    assert again.ingredients == scores.ingredients
    assert again.values.keys() == scores.values.keys()
    for key, pair in scores.values.items():
        for ours, theirs in zip(pair, again.values[key], strict=True):
            assert (ours == theirs).all()


def test_rows_are_found_by_their_tokens_in_any_order(tmp_path):
    scores = score(tmp_path)
    whole = scores.attach(prepare()).dataset
    part = scores.attach(prepare(ROWS[5:2:-1])).dataset
    for row, index in zip(part, (5, 4, 3), strict=True):
        assert row["chosen_contrast"] == whole[index]["chosen_contrast"]
        assert len(row["rejected_contrast"]) == len(row["rejected_ids"])
    assert whole[0]["chosen_contrast"] != whole[1]["chosen_contrast"]


def test_a_runs_data_digest_covers_the_scores(tmp_path):
    data, other = prepare(), score(tmp_path, seeds=(0, 2))
    digests = {data.digest, score(tmp_path).attach(data).digest, other.attach(data).digest}
    assert len(digests) == 3
    assert other.attach(prepare()).digest in digests


def test_rows_without_scores_are_refused_by_name(tmp_path):
    scores = score(tmp_path)
    for other in (
        prepare([*ROWS[:3], {**ROWS[0], "chosen": "log log log log"}]),
        prepare(max_length=6),  # cut elsewhere: other tokens
    ):
        with pytest.raises(
            TokenRatioError, match=r"rows have no token scores \(train_dataset:\d.*max_length"
        ):
            scores.attach(other)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    with pytest.raises(TokenRatioError, match="9 of 9 rows"):
        scores.attach(prepare(swapped))


def test_another_contrast_does_not_join(tmp_path):
    scores = score(tmp_path)
    more = score(tmp_path, prepare(word_pairs(3, seed=5)))
    assert len(scores.joined(more).values) == 12
    with pytest.raises(TokenRatioError, match="differ in negative"):
        scores.joined(score(tmp_path, seeds=(0, 2)))


def test_damage_is_seen(tmp_path):
    folder = tmp_path / "scores"
    score(tmp_path).save(folder)
    raw = bytearray((folder / "scores.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "scores.safetensors").write_bytes(bytes(raw))
    with pytest.raises(TokenRatioError, match="damaged"):
        TokenContrast.open(folder)
    (folder / "scores.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(TokenRatioError, match="damaged"):
        TokenContrast.open(folder)
    with pytest.raises(TokenRatioError, match="no token scores in"):
        TokenContrast.open(tmp_path / "nothing")


def trainer(folder, **overrides):
    return TokenRatioTrainer(
        tiny_model(),
        args=TokenRatioConfig(
            **{
                "output_dir": str(folder),
                "loss": "t_reg",
                "use_cpu": True,
                "save_strategy": "no",
                "max_length": 32,
                **overrides,
            }
        ),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
    )


@pytest.mark.parametrize("loss", ["tis_dpo", "sepo", "t_reg"])
def test_losses_refuse_rows_without_scores_in_words(loss, tmp_path):
    with pytest.raises(TokenRatioError, match=f"{loss} needs .* `tokenratio score-tokens`"):
        trainer(tmp_path, loss=loss)
    score(tmp_path).save(tmp_path / "scores")
    made = trainer(tmp_path, loss=loss, token_scores=str(tmp_path / "scores"))
    batch = next(iter(made.get_train_dataloader()))
    rows = {tuple(row["chosen_ids"]): row["chosen_contrast"] for row in made.train_dataset}
    first = made.train_dataset[int(batch["row"][0])]
    length = len(first["chosen_ids"])
    assert batch["contrast"][:length].tolist() == rows[tuple(first["chosen_ids"])]
    with pytest.raises(TokenRatioError, match="lack the contrast"):
        made.evaluate(prepare(word_pairs(2, seed=9)).dataset)


def test_models_of_two_vocabularies_are_refused(tmp_path):
    data = prepare()
    voices = (
        ContrastSide(tiny_model(), data, "{prompt}"),
        ContrastSide(tiny_model(vocab_size=40), data, "{prompt}"),
    )
    with pytest.raises(TokenRatioError, match="16 and 40 tokens"):
        compute_contrast(
            data,
            *voices,
            CacheSettings(
                root=tmp_path,
                batch_size=4,
                device=torch.device("cpu"),
                padding_id=0,
                progress=False,
            ),
        )


def test_a_template_goes_on_the_users_last_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}"
        "{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "ash"},
        {"role": "assistant", "content": "bay"},
        {"role": "user", "content": "cow"},
    ]
    rows = [
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": "dew"}],
            "rejected": [{"role": "assistant", "content": "elm elm"}],
        }
    ]
    data = prepare_pairs(rows, tokenizer, max_length=None, max_prompt_length=None)
    after = with_prompt_template(data, rows, tokenizer, "fig {prompt} gum").dataset[0]
    assert tokenizer.decode(after["prompt_ids"]).split()[-3:] == ["fig", "cow", "gum"]
    assert after["chosen_ids"] == data.dataset[0]["chosen_ids"]
    rows[0]["prompt"] = [{"role": "system", "content": "ash"}]
    data = prepare_pairs(rows, tokenizer, max_length=None, max_prompt_length=None)
    with pytest.raises(TokenRatioError, match="no user text"):
        with_prompt_template(data, rows, tokenizer, "{prompt} gum")
