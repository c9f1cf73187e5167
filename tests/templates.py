"""Tiny byte-level tokenizers with the chat templates of the usual families."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_HEADER = (
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + (m['content'] | trim) + "
    "'<|eot_id|>' }}"
)
_LLAMA3 = (
    "{% for m in messages %}" + _HEADER + "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and loop.last %}"
    "{%- set c = m.content %}{%- set r = m.reasoning_content or '' %}{%- if '</think>' in c %}"
    "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + c + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# Writes the day and, unless it thinks, an empty block before every answer.
_SMOLLM3 = (
    "{%- set think = enable_thinking is not defined or enable_thinking %}"
    "{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + "
    "'\nReasoning Mode: ' + ('/think' if think else '/no_think') + '\n<|im_end|>\n' }}"
    "{%- set block = '' if think else '<think>\n\n</think>\n' %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' + block + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' + block }}"
    "{%- endif %}"
)
_HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\nTools:' }}{%- for t in tools %}"
    "{{- '\n' + (t | tojson) }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
    "{%- if m.content %}{{- '\n' + m.content }}{%- endif %}"
    "{%- for c in (m.tool_calls or []) %}"
    '{{- \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + '
    "(c.function.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_STRIPS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<|Assistant|>' + "
    "m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
# family: (EOS, further special tokens, template)
FAMILIES = {
    "chatml": (
        "<|im_end|>",
        ["<|im_start|>"],
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>\n' }}{% endfor %}" + _GENERATION,
    ),
    "llama3": (
        "<|end_of_text|>",
        ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        _LLAMA3,
    ),
    # writes the day, as Llama 3.1 and Granite do
    "dated": (
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        "{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n' }}" + _LLAMA3,
    ),
    "gemma": (
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
        "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + (m['content'] | trim) + "
        "'<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}",
    ),
    "qwen3": ("<|im_end|>", ["<|im_start|>"], _QWEN3),
    "smollm3": ("<|im_end|>", ["<|im_start|>"], _SMOLLM3),
    "hermes": ("<|im_end|>", ["<|im_start|>"], _HERMES),
    # R1's manner: what stands before </think> is cut off
    "strips": ("<|end|>", ["<|User|>", "<|Assistant|>"], _STRIPS),
    # newer R1: the generation prompt opens the reasoning
    "opens_think": (
        "<|end|>",
        ["<|User|>", "<|Assistant|>"],
        _STRIPS.replace("{{ '<|Assistant|>' }}", "{{ '<|Assistant|><think>\n' }}"),
    ),
    # a further token ends the whole conversation
    "phi3": (
        "<|endoftext|>",
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
    ),
    # two tokens end a turn, a space before one
    "command": (
        "<|END_OF_TURN_TOKEN|>",
        ["<|START|>", "<|END_RESPONSE|>"],
        "{% for m in messages %}{{ '<|START|>' + m['role'] + ':' + m['content'] + "
        "' <|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START|>assistant:' }}{% endif %}",
    ),
    # no end of turn at all
    "bare": (
        "</s>",
        [],
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    ),
}


def family_tokenizer(family: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with a family's special tokens and template.

    Args:
        bos: it puts `<s>` before each text.
    """
    eos, extra, template = FAMILIES[family]
    special = list(dict.fromkeys(["<s>", "<pad>", eos, *extra]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    made.chat_template = template
    return made


def chat_pair(prompt: str, chosen: str, rejected: str, **row: object) -> dict[str, object]:
    """A pair of conversations of one turn each."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **row,
    }
