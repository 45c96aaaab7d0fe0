"""Where the answers of a chat stand in the text of the whole.

A template may write a message in another way when more follow it: reasoning models drop what was thought before earlier
answers. So an answer is not looked for in renderings of the chat up to there, but in the whole one: the whole is
rendered once more with other words in the answer's place, and where the two differ, there it stands. That holds for
answers that occur twice, and for contents that the template trims.

What is learned begins where a generation prompt ends, since the model is given that much, and ends with the token that
ends the turn. Where only the next turn would write such a token, it is written behind the last answer too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .chat_rows import Chat, Message
from .chat_template import ChatTemplate, Messages
from .shapes import REASONING

OTHER_WORDS = "\ue83a\uf1c7"  # of the private use area, so that no template and hardly a text has them
ANSWER_KEYS = ("content", "tool_calls", "function_call", *REASONING)


@dataclass(frozen=True)
class Answer:
    """An answer in the text: its turn after the generation prompt, from `start`; its own words, to `words_stop`.

    `index`: of its message. `in_other_words`: the message that was put in its place to find it.
    """

    index: int
    start: int
    words_stop: int
    in_other_words: Message


class AnswerFinder:
    """Finds messages in the text of one chat."""

    def __init__(self, chat: Chat, template: ChatTemplate):
        self.chat = chat
        self.template = template

    def find(self, index: int) -> Answer | None:
        """Message `index` in the text; None if the template does not write it."""
        found = self._words(index)
        if found is None:
            return None
        begin, stop, message = found
        return Answer(index, self._start(index, begin, stop), stop, message)

    def _words(self, index: int) -> tuple[int, int, Message] | None:
        """Where a message's own words are in the text, and the message that was put in its place to find them."""
        text, messages = self.chat.text, self.chat.messages
        for message in self._in_other_words(index):
            other = self._render([*messages[:index], message, *messages[index + 1 :]])
            if other is not None and OTHER_WORDS in other:
                begin = _common_prefix(text, other)
                stop = max(begin, len(text) - _common_suffix(text, other))
                return None if begin == stop and _has_words(messages[index]) else (begin, stop, message)
        return None

    def turn_end(self, answer: Answer) -> str | None:
        """What the template writes behind an answer if nothing follows it: the end of its turn. None if it refuses."""
        return self._behind(answer)

    def next_turn(self, answer: Answer) -> str | None:
        """What it writes behind an answer that a tool or the user replies to."""
        asks = "tool_calls" in self.chat.messages[answer.index]
        reply: Message = {"role": "tool" if asks else "user", "content": "."}
        return self._behind(answer, reply)

    def _behind(self, answer: Answer, *more: Message) -> str | None:
        other = self._render([*self.chat.messages[: answer.index], answer.in_other_words, *more])
        return None if other is None or OTHER_WORDS not in other else other.rpartition(OTHER_WORDS)[2]

    def _start(self, index: int, begin: int, stop: int) -> int:
        """Where a message's turn begins, after the generation prompt; `begin`, `stop`: where its words are."""
        text, messages = self.chat.text, self.chat.messages
        if messages[index]["role"] != "assistant":
            return begin
        before = self._render(messages[:index], answer=True) if index else None
        if before is not None and len(before) <= stop and text.startswith(before):
            # Without a generation prompt there may be a turn's heading between, which is no part of the answer.
            if not text[len(before) : begin].strip() or self._opening(index):
                return len(before)
        # The whole begins otherwise: look for the generation prompt, or as much of it as stands in this turn.
        opening = self._opening(index)
        earlier = self._words(index - 1) if index and opening else None
        after = earlier[1] if earlier else 0
        for size in range(len(opening), 0, -1):
            at = text.rfind(opening[:size], after, begin)
            if at >= 0:
                return at + size
        return begin

    def _opening(self, index: int) -> str:
        """The generation prompt of an answer; if the chat begins with it, that of the answer to some question."""
        return (self._generation_prompt(self.chat.messages[:index]) if index else "") or self._generation_prompt(
            [{"role": "user", "content": OTHER_WORDS}]
        )

    def _generation_prompt(self, messages: Messages) -> str:
        closed, opened = self._render(messages), self._render(messages, answer=True)
        if closed is None or opened is None or not opened.startswith(closed):
            return ""
        return opened[len(closed) :]

    def _in_other_words(self, index: int) -> list[Message]:
        """Message `index` with other words: as plain text, or, where a tool's reply needs its call, in the call."""
        message = self.chat.messages[index]
        content: Any = message.get("content", "")
        words = OTHER_WORDS if isinstance(content, str) else [{"type": "text", "text": OTHER_WORDS}]
        found = [{key: value for key, value in message.items() if key not in ANSWER_KEYS} | {"content": words}]
        if calls := message.get("tool_calls"):
            renamed = [_renamed(call) for call in calls]
            found.append({key: value for key, value in message.items() if key != "content"} | {"tool_calls": renamed})
        return found

    def _render(self, messages: Messages, answer: bool = False) -> str | None:
        try:
            return self.template.render(messages, self.chat.options, answer=answer)
        except Exception:  # templates refuse some beginnings of chats that they write as a whole
            return None


def _renamed(call: Message) -> Message:
    inner = call.get("function")
    return {**call, "function": _renamed(inner)} if isinstance(inner, dict) else {**call, "name": OTHER_WORDS}


def _has_words(message: Message) -> bool:
    content = message.get("content", "")
    texts = [content.rpartition("</think>")[2]] if isinstance(content, str) else [part["text"] for part in content]
    return any(text.strip() for text in texts) or "tool_calls" in message


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _common_suffix(a: str, b: str) -> int:
    return _common_prefix(a[::-1], b[::-1])
