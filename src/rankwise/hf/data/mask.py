"""Rows to tokens, and which of the tokens are learned.

| schema     | learned                                                                           |
|------------|-----------------------------------------------------------------------------------|
| text       | everything, the end-of-sequence token included                                    |
| completion | the completion and the end-of-sequence token                                      |
| messages   | what the assistant says, with its end-of-turn token                               |
| label      | the class of the whole text                                                       |

A template that marks `{% generation %}` says itself what the assistant says. From any other the
answer to `messages[:k]` is what rendering `messages[:k + 1]` adds to rendering `messages[:k]` with
the generation prompt. Templates that rewrite the past (Qwen3 drops earlier thoughts, gpt-oss ends
only the last turn in `<|return|>`) make an early answer look unlike what the model had to say; such
a dialogue is *unrolled* into several examples, in each of which every learned turn reads as it is
generated. An answer that opens a dialogue was asked for by nothing, and is context.

Legend: T tokens of an example.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.errors import DataError
from rankwise.hf.data.read import Row

Turns = list[dict[str, Any]]
Tokens = tuple[list[int], list[bool]]  # ids, and beside each whether it is learned


@dataclass(frozen=True)
class Encoder:
    """Turns rows into tokens by one tokenizer.

    Attributes:
        tokenizer: A `transformers` tokenizer.
        template_kwargs: Passed to the chat template (for example `{"enable_thinking": False}`).
    """

    tokenizer: Any
    template_kwargs: Mapping[str, Any]

    def __call__(self, row: Row, schema: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids (T,) int32 and learned (T,) bool of the row's examples: one, but for unrolled dialogues."""
        answer = row.fields["text" if schema == "label" else schema]
        prompt: Any = {"completion": row.fields.get("prompt"), "messages": []}.get(schema, "")
        if schema == "label":
            ids = self._ids(answer, special=True)
            found = [(ids, [True] * len(ids))]
        elif isinstance(prompt, str) and isinstance(answer, str):
            found = [self._document(prompt, answer)]
        else:
            found = self._dialogue(prompt, answer, row)
        if not all(any(learn[schema != "label" :]) for _, learn in found):  # nothing predicts the first token
            raise DataError(f"rows teach; the mask of {row.where} is all zero: remove it")
        return [(np.array(ids, np.int32), np.array(learn)) for ids, learn in found]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        """Return a text's ids, if asked with the tokenizer's own special tokens; no doubled BOS."""
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids[1:] if ids[:2] == [self.tokenizer.bos_token_id] * 2 else ids

    def _document(self, prompt: str, text: str) -> Tokens:
        """Learn a text after its prompt; open with BOS if the tokenizer does so, close with EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("texts end in EOS; the tokenizer has none: set tokenizer.eos_token")
        head, ids = self._ids(prompt), self._ids(prompt + text)
        answer = ids[len(head) :] if ids[: len(head)] == head else self._ids(text)  # a token straddles
        if eos not in answer[-2:]:  # a rendered chat may end in EOS and a line break
            answer = [*answer, eos]
        if bos is not None and (head + answer)[0] != bos and self._ids("a", special=True)[0] == bos:
            head = [bos, *head]
        return head + answer, [False] * len(head) + [True] * len(answer)

    def _dialogue(self, prompt: Turns | str, answer: Turns | str, row: Row) -> list[Tokens]:
        """Learn what the assistant says in the answer."""
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        messages, first = asked + turns, max(len(asked), 1)
        said = [k for k, turn in enumerate(messages) if turn["role"] == "assistant" and k >= first]
        if not said:
            found = f"{row.where} has the roles {', '.join(turn['role'] for turn in messages)}"
            raise DataError(f"the 'assistant' is learned; {found}: rename a role, or remove it")
        if not (self.tokenizer.chat_template and self.tokenizer.is_fast):
            raise DataError(f"messages need a fast tokenizer's chat template; {row.where} finds none: set one")
        template = self.tokenizer.get_chat_template(tools=row.fields.get("tools"))
        marked = not asked and re.search(r"\{%-?\s*generation\s*-?%\}", template)
        return [self._marked(messages, row)] if marked else self._unrolled(messages, said, row)

    def _marked(self, messages: Turns, row: Row) -> Tokens:
        """Take the template's own mask, and add the end-of-turn token if it stops short of that."""
        out = self._render(messages, row, tokenize=True, return_assistant_tokens_mask=True)
        ids, learn = out["input_ids"], [bool(mark) for mark in out["assistant_masks"]]
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        closed = False
        for i, token in enumerate(ids):
            if learn[i]:  # closed: the turn has its control token, and at most white space after it
                closed = token in special or (closed and not self.tokenizer.decode([token]).strip())
            else:
                learn[i] = closed = i > 0 and learn[i - 1] and not closed and token in special
        return ids, learn

    def _unrolled(self, messages: Turns, said: list[int], row: Row) -> list[Tokens]:
        """Render up to the last turn of `said`, and learn what reads there as it is generated.

        The same again for the turns that this rendering has rewritten, until none is left.
        """
        found: list[Tokens] = []
        while said:
            full, spans, rewritten = self._render(messages[: said[-1] + 1], row), [], []
            for k in said:
                asked = self._render(messages[:k], row, add_generation_prompt=True)
                answered = self._render(messages[: k + 1], row).rstrip()
                if full.startswith(asked) and full.startswith(answered):
                    spans.append((len(asked), len(answered)))
                elif k < said[-1]:
                    rewritten.append(k)
                else:
                    mend = "add the thought that the template expects, or mark {% generation %} in it"
                    raise DataError(f"answers follow {asked[-30:]!r}; message {k + 1} of {row.where} does not: {mend}")
            out = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            # a blank that ends the prompt may come trimmed to (a, a)
            learn = [any(a <= i < b and a < j for a, b in spans) for i, j in out["offset_mapping"]]
            found.insert(0, (out["input_ids"], learn))
            said = rewritten
        return found

    def _render(self, messages: Turns, row: Row, **options: Any) -> Any:
        extra = row.fields.get("chat_template_kwargs") or {}
        options = {"tools": row.fields.get("tools"), **self.template_kwargs, **extra, **options}
        try:
            return self.tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
        except Exception as error:  # a template may raise anything: Jinja's, TypeError, its own
            raise DataError(f"a chat template renders all rows; it refuses {row.where}: {error}") from error
