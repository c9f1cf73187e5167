"""TBPO-A with LoRA on conversational pairs, from Python.

    python examples/lora_chat.py PAIRS.jsonl [OUTPUT FOLDER]

Builds a small Llama with a chat template from nothing, so that it runs anywhere: SFT on the chosen
replies, then LoRA on the pairs. With a model of your own, start at `TokenRatioTrainer(model=...)`.
"""

import sys
from pathlib import Path

from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.data import read_rows
from tokenratio.data.vocabulary import train_byte_level_bpe

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


def main(pairs: str, output: str = "runs/lora_chat") -> dict[str, float]:
    """Train, and return the metrics on the pairs that were held out."""
    rows = [row.fields for row in read_rows(pairs)]
    held_out = rows[: len(rows) // 5]
    rows = rows[len(rows) // 5 :]

    texts = [turn["content"] for row in rows for key in ("prompt", "chosen") for turn in row[key]]
    tokenizer = train_byte_level_bpe(texts, 2048)
    tokenizer.chat_template = CHAT_TEMPLATE
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    lengths = {"max_length": 512, "max_prompt_length": 256}
    sft = TokenRatioTrainer(
        model,
        args=TokenRatioConfig(
            output_dir=str(Path(output) / "sft"),
            loss="sft",
            optim="adamw_torch",
            learning_rate=2e-3,
            num_train_epochs=3,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            save_strategy="no",
            logging_steps=10,
            **lengths,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    sft.train()
    sft.save_model()

    # Load it from its folder, which the adapter then names as its base.
    trainer = TokenRatioTrainer(
        sft.args.output_dir,
        args=TokenRatioConfig(
            output_dir=str(Path(output) / "tbpo_a"),
            learning_rate=5e-4,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            save_strategy="no",
            logging_steps=10,
            **lengths,
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name, value in main(*sys.argv[1:]).items():
        print(f"{name:32} {value:.4f}")
