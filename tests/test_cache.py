"""How many slots there are, how long they are and which graphs run them: few, and never more than fit."""
import pytest
import torch

from cache import Graphs, bucket, slot_capacity, slot_count
from run import processes
from run.processes import host_memory, in_batches


@pytest.mark.parametrize("needed, current, growing, want", [
    (100, None, False, 128),  # whole grains
    (100, 256, False, 256),  # long enough: stays
    (100, 1024, False, 128),  # more than four times too long: made anew
    (300, 256, False, 320),
    (300, 256, True, 512),  # doubles while others run
    (300, 1200, True, 1200),
    (300, 200, True, 448),  # twice 200, in whole grains
    (1100, 1088, True, 1536),  # but not beyond the context
])
def test_slot_capacity(needed, current, growing, want):
    assert slot_capacity(needed, current, growing, context=1500, grain=64) == want


@pytest.mark.parametrize("waiting, current, wanted, fitting, want", [
    (10, 0, 0, 50, 10),
    (999, 0, 0, 50, 50),
    (999, 0, 0, 500, 128),  # more are no faster
    (5, 20, 0, 50, 20),  # what is there stays
    (999, 0, 7, 50, 7),  # the caller's word
    (999, 0, 70, 50, 70),  # which fit_cache refuses
    (999, 0, 0, 0, 1),  # so does it this one, with the figures
])
def test_slot_count(waiting, current, wanted, fitting, want):
    assert slot_count(waiting, current, wanted, fitting, most=128) == want


def test_batches_are_of_similar_length_and_bounded():
    assert in_batches([5, 1, 4, 2, 30], int, most=8, padded=True) == [[1, 2], [4], [5], [30]]
    assert in_batches([5, 1, 4, 2, 30], int, most=8) == [[1, 2, 4], [5], [30]]
    assert in_batches([3, 3, 3], int, most=9, padded=True) == [[3, 3, 3]] and in_batches([], int, 9) == []


def test_buckets():
    expected = {1: 1, 2: 2, 3: 4, 5: 8, 16: 16, 17: 32, 20: 32, 128: 128, 129: 192, 200: 256}
    assert {n: bucket(n) for n in expected} == expected
    assert all(bucket(n) >= n for n in range(1, 600)) and len({bucket(n) for n in range(1, 513)}) < 20


def test_a_step_is_captured_the_second_time(monkeypatch):
    """The first run of a kind compiles its kernels, which a capture could not."""
    made = []

    def capture(self, step):
        made.append("captured")
        return lambda: made.append("replayed")
    monkeypatch.setattr(Graphs, "capture", capture)
    graphs = Graphs()
    for _ in range(3):
        graphs.run("kind", lambda: made.append("run"))
    assert made == ["run", "captured", "replayed", "replayed"]


# ---- memory --------------------------------------------------------------------------------------
MIB = 2**20
MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8192 kB\n"}  # 8 MiB are free


def group(limit, used, cache=0):
    return {"memory.max": str(limit), "memory.current": str(used),
            "memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 7\n"}


def under(folder, files):
    return {f"{folder}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize("files, want", [
    ({}, 8 * MIB),
    ({"proc/self/cgroup": "0::/job", **under("sys/fs/cgroup/job", group("max", MIB))}, 8 * MIB),
    ({"proc/self/cgroup": "0::/job", **under("sys/fs/cgroup/job", group(5 * MIB, 3 * MIB))}, 2 * MIB),
    ({"proc/self/cgroup": "0::/a/job", **under("sys/fs/cgroup/a", group(5 * MIB, 3 * MIB, MIB)),
      **under("sys/fs/cgroup/a/job", group("max", 1))}, 3 * MIB),  # its parent's; files in memory make way
    ({"proc/self/cgroup": "0::/../host/path", **under("sys/fs/cgroup", group(4 * MIB, 3 * MIB))}, MIB),
    ({"proc/self/cgroup": "0::/", **under("sys/fs/cgroup", group(MIB, 2 * MIB))}, 0),
    ({"proc/self/cgroup": "4:memory:/\n0::/job", **under("sys/fs/cgroup/job", group(5 * MIB, MIB))}, 4 * MIB),
], ids=["none", "no limit", "limit", "parent", "container", "over", "hybrid"])
def test_the_least_memory_counts(tmp_path, files, want):
    for name, content in {**MACHINE, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert host_memory(tmp_path) == want


def test_processes_of_a_host_share_its_memory(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(processes, "host_memory", lambda: 900)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert processes.free_memory(device) == 300
