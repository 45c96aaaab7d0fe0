"""Links ``prev_event`` and ``supersedes``: they must lead to events of the same paper, and form no circle."""

from __future__ import annotations

from typing import Any

from .checks import Document, claimed_id
from .events import is_event_id
from .report import Checker, Status, brief, typed


def links_of(event: Any) -> list[str]:
    """Return the ids that an event points to."""
    links = [typed(event, "prev_event", str), *(typed(event, "supersedes", list) or [])]
    return [link for link in links if is_event_id(link)]


def check_links(document: Document, checker: Checker) -> None:
    """Check that every link leads to an event of this paper, and once that there is no circle."""
    events = {claimed_id(found.event): found.event for found in document.events}
    graph: dict[str, list[str]] = {}
    for found in document.events:
        links = links_of(found.event)
        if not links:
            continue
        at = checker.at(found.where)
        if document.kind == "event":
            at.note("links", Status.NOT_CHECKED, "the events it points to are not in this file")
            continue
        own = claimed_id(found.event)
        if own is not None:
            graph[own] = links
        subject = found.event.get("subject_pith_number")
        trouble = [f"{link} is not here" for link in links if link not in events]
        trouble += [
            f"{link} is of another paper, {brief(events[link].get('subject_pith_number'))}"
            for link in links
            if link in events and events[link].get("subject_pith_number") != subject
        ]
        at.test("links", not trouble, "; ".join(trouble[:5]))
    if document.kind != "event":
        circle = find_circle(graph)
        checker.test("link_circles", circle is None, f"{circle} points back to itself by way of others")


def find_circle(graph: dict[str, list[str]]) -> str | None:
    """Return a node that can be reached from itself, or None; without recursion, because chains may be long."""
    done: set[str] = set()
    for start in graph:
        path: set[str] = set()
        stack = [(start, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                path.discard(node)
                done.add(node)
            elif node in path:
                return node
            elif node not in done:
                path.add(node)
                stack.append((node, True))
                stack.extend((link, False) for link in graph.get(node, ()))
    return None
