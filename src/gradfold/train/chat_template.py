"""A tokenizer's chat template, rendered by transformers, with its clock stopped at the run's own time.

Templates are programs in jinja. What a template reads is found in its source: its free variables, which columns of a
row can fill, and whether it marks the answers itself (`{% generation %}`).
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

Messages = Sequence[dict[str, Any]]

CLOCK = "strftime_now"  # the only clock that transformers gives templates
RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"})
"""Names that a column cannot fill, beside the special tokens."""


class ChatTemplate:
    """The chat template of a tokenizer, as `apply_chat_template` renders it.

    Args:
        tokenizer: one that has a template.
        now: the time that a template is told which writes the date; None for the time of each rendering.
    """

    def __init__(self, tokenizer: Any, now: datetime | None = None):
        self.tokenizer = tokenizer
        self.now = now
        self.read_columns: set[str] = set()  # columns that some row's rendering was seen to depend on
        self.read_keys: set[str] = set()  # keys of messages that some message's rendering was seen to depend on
        self.unread_keys: set[str] = set()

    def render(self, messages: Messages, options: dict[str, Any] | None = None, answer: bool = False) -> str:
        """Messages as text; `answer`: up to where an answer would begin. Raises whatever the template raises."""
        options = options or {}
        with _stopped_clock(self._sources(), self.now):
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer, **options
            )

    def render_marked(self, messages: Messages, options: dict[str, Any]) -> tuple[list[int], list[bool]]:
        """(tokens, which of them the template marks as an answer's), for a template that `marks_answers`."""
        with _stopped_clock(self._sources(), self.now):
            encoded = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
            )
        return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]

    def names(self, *words: str) -> bool:
        """Whether one of these words stands anywhere in the template."""
        return any(re.search(rf"\b{re.escape(word)}\b", source) for source in self._sources() for word in words)

    @property
    def writes_date(self) -> bool:
        """Whether a rendering may depend on when it is made."""
        return self.names(CLOCK)

    def is_variable(self, name: str) -> bool:
        """Whether the template reads a variable of this name which a row may fill."""
        special = getattr(self.tokenizer, "special_tokens_map", {})
        if name in RESERVED or name in special:
            return False
        return any(name in _variables(source) for source in self._sources())

    @property
    def marks_answers(self) -> bool:
        """Whether the template says itself which of its text is an answer's, in a way that can be followed."""
        return self.tokenizer.is_fast and any(_marks(source) for source in self._sources())

    @functools.cached_property
    def turn_ends(self) -> dict[int, bool]:
        """Tokens that can end a turn: those added to the vocabulary -> whether they are special."""
        tokenizer = self.tokenizer
        ends = {token: added.special for token, added in tokenizer.added_tokens_decoder.items()}
        ends |= dict.fromkeys(tokenizer.all_special_ids, True)
        for token in (tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id):
            if token != tokenizer.eos_token_id:
                ends.pop(token, None)
        return ends

    def _sources(self) -> list[str]:
        """The template, or all of them where there are several (one for chats with tools)."""
        template = self.tokenizer.chat_template
        return list(template.values()) if isinstance(template, dict) else [template]


def _compiled(source: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # cached there; no public name gives it

    return _compile_jinja_template(source)


@contextlib.contextmanager
def _stopped_clock(sources: list[str], now: datetime | None) -> Iterator[None]:
    """While rendering, templates that ask for the time are told `now`."""
    templates = [_compiled(source) for source in sources if now is not None and CLOCK in source]
    for template in templates:
        template.globals[CLOCK] = now.strftime  # pyright: ignore[reportOptionalMemberAccess]
    try:
        yield
    finally:
        for template in templates:
            del template.globals[CLOCK]  # what the environment gives shows again


@functools.lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    """Names that a template reads without having set them."""
    from jinja2 import TemplateError, meta

    try:
        return frozenset(meta.find_undeclared_variables(_compiled(source).environment.parse(source)))
    except TemplateError:  # what is wrong with it is said when it is rendered
        return frozenset()


@functools.lru_cache(maxsize=8)
def _marks(source: str) -> bool:
    """Whether a template has `{% generation %}` blocks at places that transformers counts rightly.

    It takes the start of a block from what has been written so far, of which it sees nothing inside a macro or a block
    that is kept in a variable.
    """
    from jinja2 import TemplateError, nodes

    if not re.search(r"\{%-?\+?\s*generation\s*[-+]?%\}", source):
        return False
    try:
        tree = _compiled(source).environment.parse(source)
    except TemplateError:
        return False
    held = [outer for kind in (nodes.Macro, nodes.AssignBlock, nodes.FilterBlock) for outer in tree.find_all(kind)]
    return not any(_is_marker(call) for outer in held for call in outer.find_all(nodes.CallBlock))


def _is_marker(call: Any) -> bool:
    return getattr(call.call.node, "name", "") == "_generation_support"
