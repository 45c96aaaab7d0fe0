"""Where the answers of a chat stand in the text of the whole.

A template may write a message in another way when more follow it: reasoning models drop what was thought before earlier
answers. So an answer is not looked for in renderings of the chat up to there, but in the whole one: the whole is
rendered once more with other words in the answer's place, and where the two differ, there it stands. That holds for
answers that occur twice, and for contents that the template trims.

What is learned begins where a generation prompt ends, since the model is given that much, and ends with the token that
ends the turn. Where only the next turn would write such a token, it is written behind the last answer too.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    `index`: of its message.
    """

    index: int
    start: int
    words_stop: int


class AnswerFinder:
    """Finds messages in the text of one chat."""

    def __init__(self, chat: Chat, template: ChatTemplate):
        self.chat = chat
        self.template = template
        self._opening: str | None = None

    def find(self, index: int, after: int = 0) -> Answer | None:
        """Message `index` in the text, not before `after`; None if the template does not write it."""
        text = self.chat.text
        for message in self._in_other_words(index):
            other = self._render([*self.chat.messages[:index], message, *self.chat.messages[index + 1 :]])
            if other is None or OTHER_WORDS not in other:
                continue
            begin = max(after, _common_prefix(text, other))
            stop = max(begin, len(text) - _common_suffix(text, other))
            if begin == stop and _has_words(self.chat.messages[index]):
                return None
            return Answer(index, self._start(index, after, begin, stop), stop)
        return None

    def turn_end(self, answer: Answer) -> str | None:
        """What the template writes behind an answer if nothing follows it: the end of its turn. None if it refuses."""
        return self._behind(answer.index, ())

    def next_turn(self, answer: Answer) -> str | None:
        """What it writes behind an answer that a tool or the user replies to."""
        asks = "tool_calls" in self.chat.messages[answer.index]
        reply: Message = {"role": "tool" if asks else "user", "content": "."}
        return self._behind(answer.index, (reply,))

    def _behind(self, index: int, more: Sequence[Message]) -> str | None:
        for message in self._in_other_words(index):
            other = self._render([*self.chat.messages[:index], message, *more])
            if other is not None and OTHER_WORDS in other:
                return other.rpartition(OTHER_WORDS)[2]
        return None

    def _start(self, index: int, after: int, begin: int, stop: int) -> int:
        """Where a message's turn begins, after the generation prompt; `begin`, `stop`: where its words are."""
        text, messages = self.chat.text, self.chat.messages
        if self._opening is None:
            self._opening = self._generation_prompt(messages[:index]) if index else ""
            if not self._opening:
                self._opening = self._generation_prompt([{"role": "user", "content": OTHER_WORDS}])
        if not self._opening or messages[index]["role"] != "assistant":
            return begin
        before = self._render(messages[:index], answer=True) if index else None
        if before is not None and after <= len(before) <= stop and text.startswith(before):
            return len(before)
        # The whole begins otherwise: look for the generation prompt, or as much of it as stands there.
        size = len(self._opening)
        lengths = [_common_prefix(text[at : min(at + size, begin)], self._opening) for at in range(after, begin)]
        longest = max(lengths, default=0)
        if not longest:
            return begin
        return after + max(at for at, length in enumerate(lengths) if length == longest) + longest

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
