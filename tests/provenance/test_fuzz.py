"""Mutated documents: a report or the package's own error, nothing else; and never a verification."""

import copy
import io
import random

import pytest
from rich.console import Console

from gradfold.cli.record_show import card_of, print_card, print_report
from gradfold.provenance import ProvenanceError, canonical_bytes, merge, parse, verify
from gradfold.provenance.keys import read_keys
from tests.provenance.makers import SEEDS, at, bundle_of, event, leaves, read_seed, record_event, seed_bytes, signer

QUICK, FULL = 600, 100_000


def nested(levels):
    value = {}
    for n in range(levels):
        value = {"a": value} if n % 2 else [value]
    return value


JUNK = [
    None, True, False, 0, -1, 1, 2.5, -0.0, 10**4000, -(10**4000), 1e308, "", "x", "sha256:" + "0" * 64, "0" * 64,
    "pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF", "2026-01-01T00:00:00Z", "\u202e\x1b[31m\0", "[bold]", "\U0010ffff" * 9,
    "A" * 88,
    [], {}, [[]], [None] * 50, {"": {}}, {"event_id": None}, ["sha256:" + "f" * 64] * 3, nested(60),
]  # fmt: skip


def own_documents():
    """A bundle with links and forks, and its state, beside the published documents."""
    ada = signer("ada", 1)
    first = event(ada, {"n": 1})
    events = [record_event(ada), first, event(ada, {"n": 2}, prev_event=first["event_id"]), event(ada, {"n": 3}), None]
    bundle = bundle_of(ada, events)
    return [bundle, bundle["state"], first]


def branches(value):
    """The paths of all values, holders of others too."""
    return sorted({path[:n] for path in leaves(value) for n in range(1, len(path) + 1)}, key=repr)


def mutate(document, paths, rng):
    """One to four changes of structure, at random places."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 4))):
        path = rng.choice(paths)
        try:
            holder, key = at(document, path[:-1]), path[-1]
            value = holder[key]
            kind = rng.randrange(8)
            if kind < 3:
                holder[key] = copy.deepcopy(rng.choice(JUNK))
            elif kind == 3:
                del holder[key]
            elif kind == 4:
                holder[key] = [value] if rng.random() < 0.5 else {"a": value}
            elif kind == 5:
                holder[key] = copy.deepcopy(at(document, rng.choice(paths)))
            elif kind == 6 and isinstance(holder, list):
                holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(value))
            elif kind == 6:
                holder[rng.choice(("extra", "", "signature", "events", "event_type"))] = value
            elif isinstance(value, str) and value:
                place = rng.randrange(len(value))
                holder[key] = value[:place] + rng.choice(("", "A", "0", "\n", "\u00e9")) + value[place + 1 :]
            elif isinstance(value, int):
                holder[key] = value + 1
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    return document


def scramble(data, rng):
    """Some bytes changed, left out, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 40)]
        elif kind == 2:
            data[place:place] = data[place : place + rng.randrange(1, 40)]
        else:
            data[place:place] = rng.choice(
                (b"[", b"{", b'"', b"\\u", b"\\ud800", b"NaN", b"1e9999", b"9" * 5000, b"\xff", b"[" * 2000)
            )
    return bytes(data)


def attempt(action):
    try:
        return action()
    except ProvenanceError as error:
        assert len(str(error)) < 2000
        return None


def endure(number, seed):
    """Feed `number` mutants of both kinds to everything that reads documents."""
    rng = random.Random(seed)
    originals = [read_seed(name) for name in SEEDS]
    documents = [*originals, *own_documents()]
    paths = [branches(document) for document in documents]
    texts = [seed_bytes(name) for name in SEEDS]
    canonical = [canonical_bytes(document) for document in originals]
    console = Console(file=io.StringIO(), width=100)
    for n in range(number):
        if n % 2:
            document = attempt(lambda: parse(scramble(rng.choice(texts), rng)))
            if document is None:
                continue
        else:
            which = rng.randrange(len(documents))
            document = mutate(documents[which], paths[which], rng)
        report = attempt(lambda document=document: verify(document))
        if report is not None:
            assert not report.verified or canonical_bytes(document) in canonical
            card = card_of(document, report)
            if n % 50 == 0:
                print_card(card, console)
                print_report("x", report, every=n % 100 == 0, console=console)
        state = attempt(lambda document=document: merge([document]))
        if state is not None and n % 10 == 0:
            assert merge([state]) == state
        if n % 20 == 0:
            attempt(lambda document=document: read_keys(canonical_bytes(document)))


def test_mutants():
    endure(QUICK, seed=1)


@pytest.mark.slow
def test_many_mutants():
    endure(FULL, seed=2)


@pytest.mark.parametrize(
    "what", [n if JUNK[n] in (None, [], {}) else pytest.param(n, marks=pytest.mark.slow) for n in range(len(JUNK))]
)
def test_junk_in_every_place(what):
    """Each kind of junk in the place of every value of a bundle."""
    document = own_documents()[0]
    for path in branches(document):
        damaged = copy.deepcopy(document)
        at(damaged, path[:-1])[path[-1]] = JUNK[what]
        report = attempt(lambda damaged=damaged: verify(damaged))
        assert report is None or not report.verified
        attempt(lambda damaged=damaged: merge([damaged]))
