"""A small tokenizer, and chat templates with the structure of four stock ones (own minimal texts)."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA = """
{{- bos_token }}
{%- set system = "" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul\n\n" + system + "<|eot_id|>" }}
{%- for m in messages %}
    {{- "<|start_header_id|>" + m.role + "<|end_header_id|>\n\n" + m.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{%- endif %}
"""

# Thoughts are kept only after the last question, and the last answer always has a (maybe empty) one.
QWEN3 = r"""
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {%- set content = m.content %}
        {%- set thought = m.reasoning_content or "" %}
        {%- if "</think>" in content %}
            {%- set thought = content.split("</think>")[0].split("<think>")[-1].strip("\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\n") %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {%- set content = "<think>\n" + thought + "\n</think>\n\n" + content %}
        {%- endif %}
        {{- "<|im_start|>assistant\n" + content + "<|im_end|>\n" }}
    {%- else %}
        {{- "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- "<think>\n\n</think>\n\n" }}{%- endif %}
{%- endif %}
"""

GEMMA3 = """
{{- bos_token }}
{%- set prefix = "" %}
{%- if messages[0].role == "system" %}
    {%- set prefix = messages[0].content + "\n\n" %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set role = "model" if m.role == "assistant" else m.role %}
    {{- "<start_of_turn>" + role + "\n" + (prefix if loop.first else "") + m.content | trim }}
    {{- "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\n" }}{%- endif %}
"""

# Only the last turn ends in <|return|> and shows its analysis.
GPT_OSS = """
{{- "<|start|>system<|message|>You are helpful.<|end|>" }}
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {%- if loop.last and not add_generation_prompt %}
            {%- if m.thinking %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + m.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + m.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + m.content + "<|end|>" }}
        {%- endif %}
    {%- else %}
        {{- "<|start|>" + m.role + "<|message|>" + m.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}
"""

MARKED = """
{%- for m in messages %}
    {{- "<|im_start|>" + m.role + "\n" }}
    {%- if m.role == "assistant" %}
        {%- generation %}{{- m.content + INSIDE }}{%- endgeneration %}{{- OUTSIDE }}
    {%- else %}{{- m.content + "<|im_end|>\n" }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}
"""

SPECIAL = [
    *("<pad>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
]
CORPUS = [
    "Hello there, what is the capital of France? The capital of France is Paris.",
    "system user assistant model final analysis You are helpful. I think so. Bye now, good day.",
    "\n\nthink\n\n /think\n",
]


def make_tokenizer(
    template: str | None = None, *, bos: bool = True, eos: str | None = "</s>", pad: str | None = "<pad>"
) -> Any:
    """A byte-level BPE tokenizer; with `bos` it opens every text with <s>, as Llama's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)
