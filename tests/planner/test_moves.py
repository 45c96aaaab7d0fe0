"""What LiveBytes says of a byte beside its size: what it was for at each moment, in which operator and module."""

import torch

from gradfold.planner.trace import CATEGORIES, LiveBytes

KIB = 1024


def by_category(timeline, *names):
    return [timeline.live_bytes[:, CATEGORIES.index(name)].tolist() for name in names]


def test_a_move_changes_what_follows_and_not_what_was():
    with LiveBytes() as live:
        a = torch.empty(KIB)
        b = torch.empty(KIB)
        live.move("tape", a)
        c = torch.empty(KIB)
        live.move("states", a, b)
        d = torch.empty(KIB)
    k = 4 * KIB
    timeline = live.timeline()
    temporary, tape, states = by_category(timeline, "temporary", "tape", "states")
    assert temporary == [k, k, k, 2 * k]  # from the event before the move on
    assert tape == [0, k, 0, 0]
    assert states == [0, 0, 2 * k, 2 * k]
    assert timeline.live_bytes.sum(axis=1).tolist() == [k, 2 * k, 3 * k, 4 * k]
    assert live.peak_bytes == 4 * k
    del a, b, c, d
    assert live.now_bytes == 0
    assert live.timeline().live_bytes[-1].tolist() == [0] * len(CATEGORIES)


def test_a_label_after_a_move_reaches_back_to_the_move_only():
    with LiveBytes() as live:
        a, b = torch.empty(KIB), torch.empty(KIB)
        live.move("staging", a)
        c = torch.empty(KIB)
        live.label(a, "states")
    k = 4 * KIB
    assert by_category(live.timeline(), "temporary", "states", "staging") == [[k, k, 2 * k], [0, k, k], [0, 0, 0]]
    del a, b, c


def test_what_was_not_seen_yet_is_counted_when_it_moves():
    a = torch.ones(KIB)
    with LiveBytes() as live:
        live.move("staging", a)
        assert live.now_bytes == 4 * KIB
        live.move("staging", a)
    assert live.timeline().live_bytes[-1].sum() == 4 * KIB
    without = LiveBytes(timeline=False)
    with without:
        without.move("staging", a)
        assert without.now_bytes == 4 * KIB


def test_set_aside_until_it_is_met_again():
    a = torch.ones(KIB)
    with LiveBytes() as live:
        live.set_aside(a)  # never seen: not counted
        assert live.now_bytes == 0
        live.track(a)
        live.set_aside(a)
        live.moment("later")
        assert live.now_bytes == 0
        live.move("staging", a)
        assert live.now_bytes == 4 * KIB
        live.set_aside(a)
        a.add_(1)
        assert live.now_bytes == 4 * KIB


def test_activations_are_what_backward_finds():
    x = torch.ones(KIB, requires_grad=True)
    with LiveBytes() as live:
        live.moment("forward")
        y = x.exp()  # kept for backward
        assert (y + 1).numel()  # not kept
        live.moment("backward")
        y.backward(torch.ones(KIB))
    timeline = live.timeline()
    names = [{n for n, size in timeline.at(event).items() if size} for event in range(len(timeline.ops))]
    assert timeline.at(-1)["activations"] == 2 * 4 * KIB  # x, y
    assert {"activations", "temporary"} in names
    assert timeline.live_bytes[:, CATEGORIES.index("temporary")].max() == 2 * 4 * KIB  # dY, dX
    assert timeline.at(0)["temporary"] == 0


def test_operators_and_places():
    where = iter(["first", "second", "second", "third", "", ""])  # twice more as b and c go
    with LiveBytes(place=lambda: next(where)) as live:
        a = torch.ones(KIB)
        b = a + a
        del a
        c = b.exp()
    timeline = live.timeline()
    assert [timeline.op_of(e) for e in (0, 1, 3)] == ["aten.ones.default", "aten.add.Tensor", "aten.exp.default"]
    assert [timeline.place_of(e) for e in range(4)] == ["first", "second", "second", "third"]
    assert (timeline.op_of(-1), timeline.place_of(-1)) == ("", "")
    assert live.peak_op == "aten.add.Tensor"
    del b, c
