"""Chat templates that write the same text as those published with the checkpoints of each family."""

from __future__ import annotations

_PART = (
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
)
_CONTENT = (
    "{%- macro written(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    f"{{%- for part in content -%}}{_PART}{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}"
)
_OPENS = "{{- '<|im_start|>' ~ message.role ~ '\\n' -}}"
_CLOSES = "{{- '<|im_end|>\\n' -}}"
_PROMPTS = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"

# Qwen2-VL and Qwen2.5-VL: a default system prompt.
QWEN2_5_VL = (
    f"{_CONTENT}{{%- for message in messages -%}}{{%- if loop.first and message.role != 'system' -%}}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    f"{_OPENS}{{{{- written(message.content) -}}}}{_CLOSES}{{%- endfor -%}}{_PROMPTS}"
)

_TOOLS = (
    "{%- if tools -%}{{- '<|im_start|>system\\n' -}}{%- if messages[0].role == 'system' -%}"
    "{{- written(messages[0].content) ~ '\\n\\n' -}}{%- endif -%}{{- '# Tools\\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\\n' ~ tool | tojson -}}{%- endfor -%}{{- '\\n</tools><|im_end|>\\n' -}}"
    "{%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\\n' ~ written(messages[0].content) -}}"
    f"{_CLOSES}{{%- endif -%}}"
)
_CALLS = (
    "{%- for call in message.tool_calls or [] -%}{%- set function = call.function or call -%}"
    "{%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    '{{- \'<tool_call>\\n{"name": "\' ~ function.name ~ \'", "arguments": \' -}}'
    "{{- function.arguments if function.arguments is string else function.arguments | tojson -}}"
    "{{- '}\\n</tool_call>' -}}{%- endfor -%}"
)
_RESULT = (
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
    "{{- '\\n<tool_response>\\n' ~ written(message.content) ~ '\\n</tool_response>' -}}"
    f"{{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}}{_CLOSES}{{%- endif -%}}"
)
_LAST_QUESTION = (
    "{%- set place = namespace(last=messages | length - 1, open=true) -%}{%- for message in messages[::-1] -%}"
    "{%- if place.open and message.role == 'user' -%}{%- set place.open = false -%}"
    "{%- set place.last = messages | length - 1 - loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
_REASONING = (
    "{%- set reasoning = '' -%}{%- if message.reasoning_content is string -%}"
    "{%- set reasoning = message.reasoning_content -%}{%- elif '</think>' in content -%}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{%- if loop.index0 > place.last and (loop.last or reasoning) -%}"
    "{{- '<think>\\n' ~ reasoning.strip('\\n') ~ '\\n</think>\\n\\n' ~ content.lstrip('\\n') -}}"
    "{%- else -%}{{- content -}}{%- endif -%}"
)


def qwen3_with(answer: str, prompts: str = _PROMPTS) -> str:
    """The template of Qwen3 with another text of answers (``content`` is set) and other prompts."""
    return (
        f"{_CONTENT}{_TOOLS}{_LAST_QUESTION}{{%- for message in messages -%}}"
        "{%- set content = written(message.content) -%}"
        f"{{%- if message.role == 'tool' -%}}{_RESULT}{{%- elif message.role == 'assistant' -%}}"
        f"{_OPENS}{answer}{_CALLS}{_CLOSES}{{%- elif message.role == 'user' or not loop.first -%}}"
        f"{_OPENS}{{{{- content -}}}}{_CLOSES}{{%- endif -%}}{{%- endfor -%}}{prompts}"
    )


QWEN3_VL = qwen3_with("{{- content -}}")
# Qwen3 writes the reasoning of answers after the last question only.
QWEN3 = qwen3_with(_REASONING)
# The prompts of thinking-only checkpoints already open the reasoning.
QWEN3_VL_THINKING = qwen3_with(_REASONING, _PROMPTS.replace("assistant\\n", "assistant\\n<think>\\n"))

# Qwen3.5 writes <think> in every answer after the last question, and in prompts, unless they are to close it at once.
_PARAMETERS = (
    "{%- for name, value in function.arguments | items -%}{{- '<parameter=' ~ name ~ '>\\n' -}}"
    "{{- value if value is string else value | tojson -}}{{- '\\n</parameter>\\n' -}}{%- endfor -%}"
)
_CALLS_3_5 = (
    "{%- for call in message.tool_calls or [] -%}{%- set function = call.function or call -%}"
    "{{- ('' if loop.first and not content else '\\n\\n' if loop.first else '\\n') -}}"
    f"{{{{- '<tool_call>\\n<function=' ~ function.name ~ '>\\n' -}}}}{_PARAMETERS}"
    "{{- '</function>\\n</tool_call>' -}}{%- endfor -%}"
)
_PROMPTS_3_5 = (
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
QWEN3_5 = (
    qwen3_with(_REASONING.replace(" and (loop.last or reasoning)", ""), _PROMPTS_3_5)
    .replace("set content = written(message.content)", "set content = written(message.content) | trim")
    .replace(_CALLS, _CALLS_3_5)
)

_IMAGES_FIRST = (
    "{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}{{- '<image>\\n' -}}{%- endfor -%}"
)
_VIDEOS_NEXT = _IMAGES_FIRST.replace("image", "video")
_TEXTS = "{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}TEXT{%- endfor -%}"
_MARKED = "{% generation %}{{- part.text -}}{% endgeneration %}"

LLAVA = (
    "{%- for message in messages -%}{%- if message.role != 'system' -%}{{- message.role.upper() ~ ': ' -}}{%- endif -%}"
    f"{_IMAGES_FIRST}{{%- if message.role == 'assistant' -%}}"
    f"{_TEXTS.replace('TEXT', _MARKED.replace('part.text', 'part.text ~ ' + repr(' ')))}"
    f"{{%- else -%}}{_TEXTS.replace('TEXT', '{{- part.text ~ ' + repr(' ') + ' -}}')}{{%- endif -%}}{{%- endfor -%}}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
LLAVA_NEXT = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{- '[INST] ' -}}"
    f"{_IMAGES_FIRST}{_TEXTS.replace('TEXT', '{{- part.text -}}')}{{{{- ' [/INST]' -}}}}"
    "{%- elif message.role == 'system' -%}{{- '<<SYS>>\\n' ~ message.content[0].text ~ '\\n<</SYS>>\\n\\n' -}}"
    "{%- else -%}{{- ' ' ~ message.content[0].text ~ '<\\\\s> ' -}}{%- endif -%}{%- endfor -%}"  # sic: no end token
)
LLAVA_ONEVISION = (
    f"{{%- for message in messages -%}}{_OPENS}{_IMAGES_FIRST}{_VIDEOS_NEXT}{{%- if message.role == 'assistant' -%}}"
    f"{_TEXTS.replace('TEXT', _MARKED)}{{%- else -%}}{_TEXTS.replace('TEXT', '{{- part.text -}}')}{{%- endif -%}}"
    f"{_CLOSES}{{%- endfor -%}}{_PROMPTS}"
)
INTERNVL = (
    f"{{%- for message in messages -%}}{_OPENS}{{%- if message.content is string -%}}{{{{- message.content -}}}}"
    "{%- else -%}{%- for part in message.content -%}{%- if part.type == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}"
    "{%- elif part.type == 'video' -%}{{- '<video>\\n' -}}{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}"
    f"{{%- endif -%}}{_CLOSES}{{%- endfor -%}}{_PROMPTS}"
)
