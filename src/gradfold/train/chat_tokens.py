"""A row of messages as tokens: the text of the whole as its template writes it, and which of it is learned."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from .answers import Answer, AnswerFinder
from .chat_rows import open_chat
from .chat_template import ChatTemplate
from .errors import DataError, ModelError
from .shapes import DataRow

Span = tuple[int, int]
"""Characters [start, stop) of a text."""


@dataclass(frozen=True)
class EncodedChat:
    """Tokens, a mark for each, and what the template did not read (`Chat.unread`)."""

    ids: list[int]
    learned: list[bool]
    unread: tuple[str, ...]


def encode_chat(row: DataRow, template: ChatTemplate, whole: bool) -> EncodedChat:
    """Tokenize one row. Learned are the assistant's answers with what ends them; `whole`: all of it.

    Raises ModelError without a template, DataError if it cannot write the row or if an answer cannot be found.
    """
    chat = open_chat(row, template)
    if not template.tokenizer.is_fast:
        raise ModelError(f"{type(template.tokenizer).__name__} cannot tell where its tokens start; set text.loss_on to "
                         "all and give `text` rows, or use a fast tokenizer")  # fmt: skip
    wanted, unwanted = _choose(row, whole)
    if not wanted and not whole:
        return EncodedChat([], [], chat.unread)  # the row says of each answer that it is not to be learned
    finder = AnswerFinder(chat, template)
    text = TokenizedText(chat.text, template)
    if not whole and template.marks_answers:
        ids, learned = template.render_marked(chat.messages, chat.options)
        if any(learned):
            spans = [_turn(finder, _found(finder, row, index), text, False).span for index in unwanted]
            kept = [mark and not left for mark, left in zip(learned, text.within(spans), strict=True)]
            return EncodedChat(ids, kept, chat.unread)
    last = len(chat.messages) - 1
    turns: dict[int, _Turn] = {}
    for index in sorted({*wanted, *unwanted}):
        if whole and index in wanted:  # for its end only, which a template that rewrites it may do without
            answer = finder.find(index)
            if answer is None:
                continue
        else:
            answer = _found(finder, row, index)
        turns[index] = _turn(finder, answer, text, index == last and index in wanted)
    if more := "".join(turn.more for turn in turns.values()):
        text = TokenizedText(chat.text + more, template)
    learn = [(0, len(text.text))] if whole else [turns[index].span for index in wanted]
    keep = [turns[index].span for index in unwanted]
    ids = text.ids
    learned = [mark and not left for mark, left in zip(text.within(learn), text.within(keep), strict=True)]
    if any(turn.ends_text for turn in turns.values()) and template.tokenizer.eos_token_id is not None:
        ids, learned = [*ids, template.tokenizer.eos_token_id], [*learned, True]
    return EncodedChat(ids, learned, chat.unread)


class TokenizedText:
    """A text that has its special tokens already, its tokens, and the characters of each."""

    def __init__(self, text: str, template: ChatTemplate):
        encoded = template.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        self.text = text
        self.ids: list[int] = encoded["input_ids"]
        self.places: list[Span] = encoded["offset_mapping"]
        self._ends = template.turn_ends

    def turn_end(self, at: int) -> Span | None:
        """The first token from character `at` on that can end a turn: a special one, or any other if it comes first."""
        for index in range(bisect.bisect_left(self.places, at, key=lambda place: place[0]), len(self.ids)):
            start, stop = self.places[index]
            special = self._ends.get(self.ids[index])
            if special is None or not self.text[start:stop].strip():
                continue
            if special or not self.text[at:start].strip():
                return start, stop
        return None

    def within(self, spans: Sequence[Span]) -> list[bool]:
        """For each token whether it is part of one of the spans: with more than the space behind what comes before."""
        return [any(self._is_within(place, span) for span in spans) for place in self.places]

    def _is_within(self, place: Span, span: Span) -> bool:
        (start, stop), (begin, end) = place, span
        if begin <= start < end:
            return True
        if not start < begin < stop:
            return False
        return bool(self.text[begin:stop].strip()) or not self.text[start:begin].strip()


def _choose(row: DataRow, whole: bool) -> tuple[list[int], list[int]]:
    """(indices of the messages whose end is to be learned, of those that are not to be learned)."""
    marks = row.learn or (None,) * len(row.messages)
    last = len(row.messages) - 1
    if whole:
        unwanted = [index for index, mark in enumerate(marks) if mark is False]
        return ([last] if row.messages[last]["role"] == "assistant" and last not in unwanted else []), unwanted
    for index, (message, mark) in enumerate(zip(row.messages, marks, strict=True)):
        if mark and message["role"] != "assistant":
            raise DataError(
                f"{row.where}: message {row.number(index)} is to be learned, says its weight, but its role is "
                f"{message['role']!r} and text.loss_on completions; take the weight away, or set text.loss_on to all"
            )
    answers = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    if not any(index >= row.answers_from for index in answers):
        raise DataError(f"{row.where}: has no assistant message to learn; set text.loss_on to all to learn the others")
    wanted = [index for index in answers if index >= row.answers_from and marks[index] is not False]
    return wanted, [index for index in answers if index not in wanted]


def _found(finder: AnswerFinder, row: DataRow, index: int) -> Answer:
    answer = finder.find(index)
    if answer is None:
        raise DataError(
            f"{row.where}: the chat template rewrites earlier turns, so message {row.number(index)} cannot be found in "
            "the whole; split the row so that it ends there, or set text.loss_on to all"
        )
    return answer


# ---- the end of a turn -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """`span`: an answer with what ends it. `more`: what the next turn would write to end it, which the text lacks.

    `ends_text`: nothing ends it, and only the end of the text can.
    """

    span: Span
    more: str = ""
    ends_text: bool = False


def _turn(finder: AnswerFinder, answer: Answer, text: TokenizedText, last: bool) -> _Turn:
    """What ends an answer's turn: the first special token behind it, of this turn or of the next one."""
    whole, stop = text.text, answer.words_stop
    end = text.turn_end(stop)
    if end is not None and not whole[stop : end[0]].strip():
        return _Turn((answer.start, end[1]))
    closing = finder.turn_end(answer) or ""
    if not whole.startswith(closing, stop):
        closing = ""
    if end is not None and end[0] < stop + len(closing):
        return _Turn((answer.start, end[1]))
    if closing.strip() or not last:  # words end it, or nothing does
        return _Turn((answer.start, stop + len(closing)))
    behind = finder.next_turn(answer)
    if behind is not None and behind.startswith(whole[stop:]):
        more = behind[len(whole) - stop :]
        end = TokenizedText(more, finder.template).turn_end(0)
        if end is not None and not more[: end[0]].strip():
            return _Turn((answer.start, len(whole) + end[1]), more[: end[1]])
    return _Turn((answer.start, len(whole)), ends_text=True)
