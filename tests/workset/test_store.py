"""What every store owes: the same bits back, nothing of what was taken, and what a meter may ask."""

import pytest
import torch

from gradfold.workset import DiskStore, HostStore, ResidentStore

STORES = {"resident": lambda path: ResidentStore(), "host": lambda path: HostStore(), "disk": DiskStore}
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
]
KEY = "model.layers.0.weight[0:128]"


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    made = STORES[request.param](tmp_path / "states")
    yield made
    getattr(made, "close", lambda: None)()


def random_bits(dtype, shape):
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def some(value=1.0, rows=3):
    return {"exp_avg": torch.full((rows, 5), value), "exp_avg.codes": torch.full((rows,), 7, dtype=torch.uint8)}


def assert_same(got, expected):
    assert got is not None and list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        as_bytes = [one.contiguous().reshape(-1).view(torch.uint8) for one in (got[name], tensor)]
        assert torch.equal(*as_bytes), name


@pytest.mark.parametrize("ahead", [False, True])
def test_every_dtype_and_shape_comes_back_bit_for_bit(store, ahead):
    shapes = [(3, 5), (), (0, 4), (1,), (2, 3, 7)]
    given = {f"{d}{list(s)}": random_bits(d, s) for d in DTYPES for s in shapes}
    given |= {"step": torch.tensor(7.0), "t": torch.randn(4, 6).t(), "nan": torch.tensor([float("nan"), -0.0])}
    expected = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in given.items()}
    store.put(KEY, given)
    assert store.keys() == [KEY]
    assert_same(store.peek(KEY), expected)
    if ahead:
        store.prefetch([KEY, "nobody"], "cpu")
    assert_same(store.peek(KEY), expected)
    assert_same(store.take(KEY, "cpu"), expected)
    assert store.take(KEY, "cpu") is None and store.peek(KEY) is None and store.keys() == []


def test_put_replaces_and_drop_forgets(store):
    store.put("a", some(1.0))
    store.put("A", some(2.0))
    store.prefetch(["a"], "cpu")
    store.put("a", some(3.0))
    assert sorted(store.keys()) == ["A", "a"]
    assert_same(store.take("a", "cpu"), some(3.0))
    store.drop("A")
    store.drop("nobody")
    assert store.keys() == [] and store.take("A", "cpu") is None
    assert sum(t.numel() for t in store.host_tensors()) == 0 and store.host_bytes == 0


def test_what_is_taken_may_be_changed(store):
    store.put("a", some(1.0))
    taken = store.take("a", "cpu")
    taken["exp_avg"].add_(1.0)
    store.put("a", taken)
    assert_same(store.peek("a"), {**some(1.0), "exp_avg": torch.full((3, 5), 2.0)})


def test_meters(tmp_path):
    tensors, size = some(), 3 * 5 * 4 + 3
    resident, host, disk = ResidentStore(), HostStore(), DiskStore(tmp_path)
    for store in (resident, host, disk):
        store.put("a", tensors)
    assert (resident.host_bytes, resident.disk_bytes, list(resident.host_tensors())) == (0, 0, [])
    assert (host.host_bytes, host.disk_bytes) == (size, 0)
    assert [id(t) for t in host.host_tensors()] == [id(t) for t in tensors.values()], "a CPU's are kept, not copied"
    assert disk.host_bytes == 0 and disk.disk_bytes == sum(p.stat().st_size for p in tmp_path.iterdir()) > size
    disk.prefetch(["a"], "cpu")
    disk._coming["a"].result()
    assert disk.host_bytes == size
    disk.take("a", "cpu")
    assert disk.host_bytes == 0
    disk.close()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
@pytest.mark.parametrize("ahead", [False, True])
def test_a_cuda_devices_states_go_and_come_bit_for_bit(store, ahead):
    for turn in range(20):
        given = {"exp_avg": torch.randn(1 << 20, device="cuda"), "step": torch.tensor(float(turn))}
        given["scalar"] = torch.tensor(3.0, device="cuda")
        expected = {name: tensor.cpu().clone() for name, tensor in given.items()}
        store.put(KEY, given)
        given["exp_avg"] = torch.full((1 << 20,), float("nan"), device="cuda")  # may reuse the memory just left
        del given
        if ahead:
            store.prefetch([KEY], "cuda")
        assert_same({name: tensor.cpu() for name, tensor in store.peek(KEY).items()}, expected)
        taken = store.take(KEY, "cuda")
        assert taken["exp_avg"].is_cuda and taken["step"].is_cpu and taken["scalar"].is_cuda
        assert_same({name: tensor.cpu() for name, tensor in taken.items()}, expected)


@cuda
def test_host_memory_is_pinned_and_the_devices_is_free():
    store, before = HostStore(), torch.cuda.memory_allocated()
    store.put("a", {"exp_avg": torch.ones(1 << 20, device="cuda")})
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() - before < 1 << 20
    assert all(tensor.is_pinned() for tensor in store.host_tensors())
