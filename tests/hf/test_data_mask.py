"""Loss only on what should be learned, on templates of the stock shapes."""

import json
from typing import Any

import pytest
from chat_templates import GEMMA3, GPT_OSS, LLAMA, MARKED, QWEN3, make_tokenizer

from rankwise.errors import DataError
from rankwise.hf import data
from rankwise.hf.data.examples import IGNORE

ASK = {"role": "user", "content": "What is it?"}
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello there!"},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]


def load(*args: Any, **options: Any) -> Any:
    return data.load(*args, **options)


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def learned(examples, tokenizer):
    """For each example the runs of learned text."""
    found = []
    for item in examples.items:
        runs, last = [], None
        for i, (token, label) in enumerate(zip(item.input_ids, item.labels, strict=True)):
            if label == IGNORE:
                continue
            assert label == token
            if last != i - 1:
                runs.append([])
            runs[-1].append(int(token))
            last = i
        found.append([tokenizer.decode(run) for run in runs])
    return found


def whole(example, tokenizer):
    return tokenizer.decode(example.input_ids.tolist())


# -- the stock shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, [["Hello there!<|eot_id|>", "Paris.<|eot_id|>"]]),
        (GEMMA3, [["Hello there!<end_of_turn>", "Paris.<end_of_turn>"]]),
        (QWEN3, [["<think>\n\n</think>\n\nHello there!<|im_end|>"], ["<think>\n\n</think>\n\nParis.<|im_end|>"]]),
        (
            GPT_OSS,
            [["<|channel|>final<|message|>Hello there!<|return|>"], ["<|channel|>final<|message|>Paris.<|return|>"]],
        ),
    ],
    ids=["llama-3.1", "gemma-3", "qwen3", "gpt-oss"],
)
@pytest.mark.parametrize("system", [False, True])
def test_the_assistants_turns_and_their_ends_are_learned(template, expected, system, file):
    if system and template is not GPT_OSS:
        messages = [{"role": "system", "content": "You are helpful."}, *TALK]
    else:
        messages = TALK
    tokenizer = make_tokenizer(template)
    examples = load(file({"messages": messages}), tokenizer)
    assert learned(examples, tokenizer) == expected
    # the last example is what the template says of the whole dialogue
    reference = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert examples.items[-1].input_ids.tolist() == reference
    assert (examples.items[-1].input_ids == tokenizer.bos_token_id).sum() <= 1


def test_each_turn_is_learned_after_the_context_that_it_is_generated_in(file):
    messages = [
        TALK[0],
        {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nHello!"},
        TALK[2],
        {"role": "assistant", "content": "Paris.", "reasoning_content": "I think."},
    ]
    tokenizer = make_tokenizer(QWEN3)
    examples = load(file({"messages": messages}), tokenizer)
    assert learned(examples, tokenizer) == [
        ["<think>\nSo.\n</think>\n\nHello!<|im_end|>"],
        ["<think>\nI think.\n</think>\n\nParis.<|im_end|>"],
    ]
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert whole(examples.items[1], tokenizer).startswith(prompt)
    assert "So." not in whole(examples.items[1], tokenizer)


def test_turns_that_are_not_rewritten_stay_in_one_example(file):
    messages = [
        ASK,
        {"role": "assistant", "content": "Look.", "reasoning_content": "So."},
        {"role": "tool", "content": "Paris"},
        {"role": "assistant", "content": "Paris.", "reasoning_content": "I see."},
    ]
    tokenizer = make_tokenizer(QWEN3)
    found = learned(load(file({"messages": messages}), tokenizer), tokenizer)
    first, second = "<think>\nSo.\n</think>\n\nLook.", "<think>\nI see.\n</think>\n\nParis."
    assert found == [[f"{first}<|im_end|>", f"{second}<|im_end|>"]]


def test_both_channels_are_learned(file):
    messages = [ASK, {"role": "assistant", "content": "Paris.", "thinking": "I think."}]
    tokenizer = make_tokenizer(GPT_OSS)
    start = "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant"
    found = learned(load(file({"messages": messages}), tokenizer), tokenizer)
    assert found == [[f"{start}<|channel|>final<|message|>Paris.<|return|>"]]


def test_template_kwargs_reach_the_template(file):
    tokenizer = make_tokenizer(QWEN3)
    kwargs = {"enable_thinking": False}
    found = load(file({"messages": TALK[:2]}), tokenizer, template_kwargs=kwargs)
    assert learned(found, tokenizer) == [["Hello there!<|im_end|>"]]
    row = {"messages": TALK[:2], "chat_template_kwargs": kwargs}
    assert learned(load(file(row), tokenizer), tokenizer) == [["Hello there!<|im_end|>"]]


def test_what_follows_the_last_answer_and_what_opens_is_context(file):
    opening = {"role": "assistant", "content": "Hello, I am here."}
    tokenizer = make_tokenizer(LLAMA)
    examples = load(file({"messages": [opening, *TALK, ASK]}), tokenizer)
    assert learned(examples, tokenizer) == [["Hello there!<|eot_id|>", "Paris.<|eot_id|>"]]


@pytest.mark.parametrize(
    ("inside", "outside", "end"),
    [
        ("'<|im_end|>'", "'\n'", "<|im_end|>"),
        ("'<|im_end|>\n'", "''", "<|im_end|>\n"),
        ("''", "'<|im_end|>\n'", "<|im_end|>"),  # the template forgets the end of the turn
    ],
)
def test_generation_marks_are_taken_and_completed(inside, outside, end, file):
    template = MARKED.replace("INSIDE", inside).replace("OUTSIDE", outside)
    tokenizer = make_tokenizer(template)
    found = learned(load(file({"messages": TALK}), tokenizer), tokenizer)
    assert found == [[f"Hello there!{end}", f"Paris.{end}"]]


def test_a_blank_at_the_end_of_the_prompt_is_not_learned(file):
    from tokenizers import processors

    template = LLAMA.replace("<|end_header_id|>\n\n", "<|end_header_id|> ")
    tokenizer = make_tokenizer(template, bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [ASK, {"role": "assistant", "content": "<|message|>  Hello there"}]
    found = learned(load(file({"messages": messages}), tokenizer), tokenizer)
    assert found == [["<|message|>  Hello there<|eot_id|>"]]


# -- what cannot be masked ------------------------------------------------------------------------


def refused(path, tokenizer, *words, **options):
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert ";" in message and ":" in message and "\n" not in message  # convention; found: remedy


def test_an_all_zero_mask_names_the_row(file):
    template = MARKED.replace("m.content + INSIDE", "''").replace("OUTSIDE", "m.content")
    tokenizer = make_tokenizer(template)
    refused(file({"messages": TALK}), tokenizer, "data.jsonl, line 1", "all zero")


def test_no_assistant(file):
    refused(file({"messages": [ASK]}), make_tokenizer(LLAMA), "line 1", "user", "assistant")
    refused(file({"messages": [{"role": "assistant", "content": "Hi"}]}), make_tokenizer(LLAMA), "1")


def test_a_template_that_refuses(file):
    path = file({"messages": TALK}, {"messages": [ASK, ASK, TALK[1]]})
    refused(path, make_tokenizer(GEMMA3), "data.jsonl, line 2", "must alternate")


def test_an_answer_unlike_the_generation_prompt(file):
    template = QWEN3.replace(r'assistant\n" }}', r'assistant\n<think>hm" }}')
    assert template != QWEN3
    refused(file({"messages": TALK}), make_tokenizer(template), "line 1", "<think>hm", "message 4")


def test_no_chat_template(file):
    refused(file({"messages": TALK}), make_tokenizer(), "line 1", "chat template")


def test_no_end_of_sequence_token(file):
    refused(file({"text": "Hello"}), make_tokenizer(eos=None), "eos_token")


# -- text and completions -------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_is_learned_whole(bos, file):
    tokenizer = make_tokenizer(bos=bos)
    item = load(file({"text": "Hello there, Paris"}), tokenizer).items[0]
    assert whole(item, tokenizer) == ("<s>" if bos else "") + "Hello there, Paris</s>"
    assert item.labels[0] == IGNORE and (item.labels[1:] == item.input_ids[1:]).all()


def test_special_tokens_are_not_doubled(file):
    tokenizer = make_tokenizer()
    item = load(file({"text": "<s>Hello there</s>\n"}), tokenizer).items[0]
    assert whole(item, tokenizer) == "<s>Hello there</s>\n"
    item = load(file({"prompt": "<s>Hello", "completion": " there</s>"}), tokenizer).items[0]
    assert whole(item, tokenizer) == "<s>Hello there</s>"


def test_a_bos_that_is_also_the_eos_closes_nothing(file):
    tokenizer = make_tokenizer(eos="<s>")
    item = load(file({"text": "H"}), tokenizer).items[0]
    assert whole(item, tokenizer) == "<s>H<s>" and item.learned == 2


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("prompt", ["Hello there,", ""])
def test_only_the_completion_is_learned(bos, prompt, file):
    tokenizer = make_tokenizer(bos=bos)
    examples = load(file({"prompt": prompt, "completion": " what is the capital?"}), tokenizer)
    assert whole(examples.items[0], tokenizer) == (("<s>" if bos else "") + prompt + " what is the capital?</s>")
    first = tokenizer.decode(tokenizer.encode(" what", add_special_tokens=False)[:1])
    lost = 0 if prompt or bos else len(first)  # nothing predicts the very first token
    assert learned(examples, tokenizer) == [[" what is the capital?</s>"[lost:]]]


def test_a_prompt_is_tokenised_as_at_inference(file):
    tokenizer = make_tokenizer(bos=False)
    joined, head = tokenizer("Hello there")["input_ids"], tokenizer("Hello t")["input_ids"]
    assert joined[: len(head)] != head  # a token straddles the boundary
    item = load(file({"prompt": "Hello t", "completion": "here"}), tokenizer).items[0]
    assert item.input_ids[: len(head)].tolist() == head
    assert (item.labels[: len(head)] == IGNORE).all() and whole(item, tokenizer) == "Hello there</s>"


@pytest.mark.parametrize(("prompt", "completion"), [(TALK[:3], TALK[3:]), (TALK[:3], "Paris."), ("Where?", TALK[3:])])
def test_a_conversational_prompt(prompt, completion, file):
    tokenizer = make_tokenizer(LLAMA)
    examples = load(file({"prompt": prompt, "completion": completion}), tokenizer)
    assert learned(examples, tokenizer) == [["Paris.<|eot_id|>"]]
