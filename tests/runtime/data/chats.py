"""Chat templates of the usual kinds, with and without marks, and conversations for them."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

Record = dict[str, Any]

# Header and end of each message; what a turn of the assistant adds to the prompt is between the marks.
CHATML = (
    "{%- if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\n' -}}{%- generation -%}{{- m.content -}}"
    "{%- for call in m.tool_calls or [] -%}{{- '<call>' ~ (call.function | tojson) -}}{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# Roles must alternate, and the assistant's turns have no header of their own.
INSTRUCT = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate: user, assistant') }}{%- endif -%}"
    "{%- if m.role == 'user' -%}{{- ' [INST] ' ~ m.content ~ ' [/INST]' -}}"
    "{%- else -%}{%- generation -%}{{- ' ' ~ m.content ~ eos_token -}}{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}"
)
# As Qwen 3 does: the assistant's thoughts are shown in the last turn only, so the text of a prefix isn't one of the whole.
THINKING = (
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' -}}"
    "{%- if m.role == 'assistant' and loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content ~ '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def without_marks(template: str) -> str:
    """The same template as most models have it."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def with_template(folder: Path, template: str | None, out: Path) -> Path:
    """Save a tokenizer with another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    return out


def make_chats(texts: list[str], count: int, *, system: bool = True, tools: bool = True) -> list[Record]:
    """Conversations of one to three turns, some with a system message, tools and calls of them."""
    draw = random.Random(3)
    made: list[Record] = []
    for number in range(count):
        messages: list[Record] = [{"role": "system", "content": "Be brief."}] if system and number % 3 == 0 else []
        for _ in range(1 + number % 3):
            messages.append({"role": "user", "content": draw.choice(texts)[:60]})
            messages.append({"role": "assistant", "content": draw.choice(texts)[:90] + " d\u00e9j\u00e0 \U0001f600"})
        record: Record = {"messages": messages, "source": number}
        if tools and number % 4 == 1:
            record["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
            call = {"type": "function", "function": {"name": "look", "arguments": {"at": number}}}
            messages[-1:] = [
                {"role": "assistant", "content": "I look.", "tool_calls": [call]},
                {"role": "tool", "content": "a tree"},
                {"role": "assistant", "content": "There is a tree."},
            ]
        made.append(record)
    return made
