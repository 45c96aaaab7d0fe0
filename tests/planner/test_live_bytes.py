"""LiveBytes against byte counts worked out by hand, on real and on fake tensors."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from gradfold.planner.trace import CATEGORIES, LiveBytes

KIB = 1024


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request):
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield request.param


def test_a_storage_counts_once_until_its_last_view_dies():
    with LiveBytes() as live:
        a = torch.empty(KIB)
        assert live.now_bytes == 4 * KIB
        views = [a.view(32, 32), a[::2], a.detach(), a.t(), a.expand(8, KIB)]
        assert live.now_bytes == 4 * KIB
        del a
        assert live.now_bytes == 4 * KIB
        views.clear()
        assert live.now_bytes == 0
    assert live.peak_bytes == 4 * KIB


def test_in_place_and_out_variants_allocate_nothing():
    with LiveBytes() as live:
        a, b = torch.ones(KIB), torch.ones(KIB)
        a.add_(b).mul_(2)
        torch.add(a, b, out=b)
        a[3:5].fill_(0)
        torch._foreach_add_([a, b], 1.0)
        assert live.now_bytes == live.peak_bytes == 8 * KIB


def test_a_result_is_counted_while_its_inputs_are_alive():
    with LiveBytes() as live:
        a = torch.ones(KIB)
        a = a + 1  # the old and the new one meet here
        assert live.peak_bytes == 8 * KIB
        assert live.now_bytes == 4 * KIB
        a = (a * 2) - 1  # a, the product and the difference
        assert live.peak_bytes == 12 * KIB
        assert live.now_bytes == 4 * KIB


@pytest.mark.parametrize(("dtype", "nbytes"), [(torch.float64, 8), (torch.bfloat16, 2), (torch.int8, 1)])
def test_bytes_follow_the_dtype(dtype, nbytes):
    with LiveBytes() as live:
        a = torch.zeros(7, 11, dtype=dtype)
        assert live.now_bytes == 77 * nbytes
        del a


def test_resized_storages():
    with LiveBytes() as live:
        a = torch.empty(KIB)
        a.resize_(3 * KIB)
        assert live.now_bytes == live.peak_bytes == 12 * KIB
        a.untyped_storage().resize_(0)  # no operator is involved
        assert live.now_bytes == 0
        a.untyped_storage().resize_(12 * KIB)
        assert live.now_bytes == 12 * KIB
    del a
    assert live.now_bytes == 0
    assert "resize_" not in vars(torch.UntypedStorage)


def test_older_tensors_count_when_tracked_or_first_touched():
    tracked, touched, never = torch.ones(KIB), torch.ones(2 * KIB), torch.ones(64 * KIB)
    with LiveBytes() as live:
        live.track(tracked)
        assert live.now_bytes == 4 * KIB
        touched.add_(1)
        assert live.now_bytes == 12 * KIB
        live.track(tracked, [touched[5:]])
        assert live.now_bytes == 12 * KIB
    assert never.numel()


def test_backward_by_hand():
    T, N, K = 16, 32, 64
    w = torch.nn.Parameter(torch.ones(N, K))
    x = torch.ones(T, K)
    with LiveBytes() as live:
        live.track(w, category="weights")
        live.track(x)
        start = live.now_bytes
        assert start == 4 * (N * K + T * K)
        y = linear(x, w)  # [T, N]
        assert live.now_bytes - start == 4 * T * N
        y.backward(torch.ones(T, N))
        # y, dY, and at the end dW, which w.grad takes over without a copy
        assert live.peak_bytes - start == 4 * (2 * T * N + N * K)
        assert live.now_bytes - start == 4 * (T * N + N * K)
        live.label(w.grad, "gradients")
        del y
        w.grad = None
        assert live.now_bytes == start
    timeline = live.timeline()
    assert timeline.live_bytes[:, CATEGORIES.index("gradients")].max() == 4 * N * K


def test_memory_inside_custom_functions_and_hooks_is_seen():
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            assert torch.zeros(100 * KIB).numel()  # 400 KiB, gone at once
            return dy * 1

    x = torch.ones(KIB, requires_grad=True)
    with LiveBytes() as live:
        live.track(x)
        y = Wasteful.apply(x)
        before = live.now_bytes
        y.backward(torch.ones(KIB))
        assert live.peak_bytes == before + 4 * KIB + 400 * KIB

        seen = []
        x.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.double().sum()))
        x.grad = None
        live.peak_bytes = before = live.now_bytes
        (x * 1).backward(torch.ones(KIB))
        # dY, dX, and the hook's copy of dX in fp64
        assert live.peak_bytes >= before + 4 * KIB + 8 * KIB
        assert len(seen) == 1


@pytest.mark.parametrize("how", ["fused", "foreach", "forloop"])
def test_optimizer_states_are_seen_and_found(how):
    kwargs = {"fused": {"fused": True}, "foreach": {"foreach": True}, "forloop": {"foreach": False}}[how]
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), **kwargs)
    n = 64 * 64 * 4
    with LiveBytes() as live:
        live.track(model)
        model.weight.grad = torch.ones_like(model.weight)
        assert live.now_bytes == 2 * n
        optimizer.step()
        assert live.now_bytes == 4 * n + 4  # two moments and the step count
        live.track(optimizer)
        assert live.now_bytes == 4 * n + 4
        assert live.timeline().at(-1)["states"] == 2 * n + 4
        optimizer.zero_grad()
        assert live.now_bytes == 3 * n + 4
    # A fused step makes nothing; the others need room for a root and a quotient at least.
    extra = live.peak_bytes - (4 * n + 4)
    assert extra == 0 if how == "fused" else extra >= n


def test_labels_reach_back_over_the_whole_life():
    with LiveBytes() as live:
        a, b = torch.ones(KIB), torch.ones(KIB)
        c = a + b
        del a
        live.label(c, "gradients")
        live.label(b, "scratch")
    by_category = {name: live.timeline().live_bytes[:, i].tolist() for i, name in enumerate(CATEGORIES)}
    k = 4 * KIB
    assert by_category["gradients"] == [0, 0, k, k]
    assert by_category["scratch"] == [0, k, k, k]
    assert by_category["temporary"] == [k, k, k, 0]


def test_timeline_agrees_with_the_counters():
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    with LiveBytes() as live:
        live.track(model)
        live.moment("forward")
        loss = model(torch.ones(32, 8)).sum()
        live.moment("backward")
        loss.backward()
        live.moment("end")
    timeline = live.timeline()
    total = timeline.live_bytes.sum(axis=1)
    assert total.max() == live.peak_bytes
    assert total[-1] == live.now_bytes
    assert total.min() >= 0 and timeline.live_bytes.min() >= 0
    assert sum(timeline.at(timeline.peak_event).values()) == live.peak_bytes
    assert timeline.moment_of(timeline.peak_event) == live.peak_moment == "backward"
    assert timeline.moment_of(0) == ""
    assert [m.label for m in timeline.moments] == ["forward", "backward", "end"]
    assert (timeline.touched_bytes[1:] >= timeline.touched_bytes[:-1]).all()


def test_touched_bytes_are_inputs_plus_outputs():
    with LiveBytes() as live:
        a = torch.ones(KIB)
        b = a + a
        c = b.view(2, -1).t()[3:]  # looking at a tensor in another way touches nothing
    # ones: 4 KiB out; add: two times 4 KiB in, 4 KiB out
    assert live.timeline().end_touched_bytes == 16 * KIB
    del b, c


def test_no_tensor_is_kept_alive():
    with LiveBytes() as live:
        a = torch.ones(KIB)
        live.track(a)
        live.label(a, "scratch")
        gone = weakref.ref(a)
        del a
        assert gone() is None
        assert live.now_bytes == 0
    dead = weakref.ref(live)
    keep = torch.ones(3)
    live.track(keep)
    del live
    gc.collect()
    assert dead() is None
    del keep  # its callback finds nobody and says nothing


def test_without_timeline_the_peak_is_the_same():
    with LiveBytes(timeline=False) as live:
        a = torch.ones(KIB) + 1
    assert live.peak_bytes == 8 * KIB
    assert live.now_bytes == 4 * KIB
    with pytest.raises(ValueError, match="timeline=True"):
        live.timeline()
    del a


def test_wrong_arguments_are_named():
    live = LiveBytes()
    with pytest.raises(ValueError, match="category='gradient'.*gradients"):
        live.track(torch.ones(1), category="gradient")
    with pytest.raises(ValueError, match="weights, masters, states, staging, gradients"):
        live.label(torch.ones(1), "w")
    with pytest.raises(TypeError, match="cannot track a int"):
        live.track(3)


@pytest.mark.parametrize("tensors", ["real"], indirect=True)  # torch has no fake sparse embedding gradient
def test_sparse_gradients_count_their_parts():
    embedding = torch.nn.Embedding(100, 16, sparse=True)
    with LiveBytes() as live:
        live.track(embedding)
        embedding(torch.arange(5)).sum().backward()
        gc.collect()
        # 5 int64 ids and 5 rows of 16 fp32
        assert live.now_bytes >= 100 * 16 * 4 + 5 * 8 + 5 * 16 * 4
        before = live.now_bytes
        embedding.weight.grad = None
        assert before - live.now_bytes >= 5 * 16 * 4
