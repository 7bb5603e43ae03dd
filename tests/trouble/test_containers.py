"""Issue G, number 16: what a container, a batch job or a service may take, wherever its limit stands."""

from pathlib import Path

import pytest

from kvarena.allocators.vmm.available import available_bytes
from kvarena.cgroups import cpu_quota, memory_left
from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.model import build
from kvarena.harness.model.config import ModelConfig
from kvarena.kernels import threads

GB = 2**30
V2 = "30 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "31 1 0:2 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 1 0:3 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)
V1_OF = "5:memory:{0}\n4:cpu,cpuacct:{0}\n1:name=systemd:/x\n"
HYBRID = V1 + "33 1 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
UNLIMITED = 2**63 - 4096  # what version 1 says of no limit


def machine(root: Path, groups: str, mounts: str, files: dict[str, object]) -> Path:
    """A tree of /proc and /sys as the process sees them."""
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts} | {
        f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in files.items()
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def v2(group: str, most: object, used: int, **stat: int) -> dict[str, object]:
    lines = "\n".join(f"{key} {value}" for key, value in {"anon": 1, "inactive_file_other": 5, **stat}.items())
    return {f"{group}memory.max": most, f"{group}memory.current": used, f"{group}memory.stat": lines}


def v1(group: str, most: object, used: int) -> dict[str, object]:
    return {f"memory/{group}memory.limit_in_bytes": most, f"memory/{group}memory.usage_in_bytes": used}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "left"),
    [
        ("0::/job/step\n", V2, v2("job/step/", 8 * GB, GB), 7 * GB),
        ("0::/job/step\n", V2, v2("job/step/", "max", GB) | v2("job/", 4 * GB, 3 * GB), GB),  # the parent's limit
        ("0::/job/step\n", V2, v2("job/step/", 2 * GB, GB) | v2("job/", 4 * GB, 2 * GB), GB),
        ("0::/job/step\n", V2, v2("job/step/", 4 * GB, GB) | v2("job/", 5 * GB, 5 * GB), 0),  # others have filled it
        ("0::/job\n", V2, v2("job/", GB, 2 * GB), 0),  # lowered below what is there
        ("0::/job\n", V2, v2("job/", 4 * GB, 3 * GB, inactive_file=GB), 2 * GB),
        ("0::/job\n", V2, v2("job/", "max", GB) | {"job/memory.high": 3 * GB}, 2 * GB),
        ("0::/job\n", V2, v2("job/", "max", GB), None),
        ("0::/\n", V2, v2("", 6 * GB, GB), 5 * GB),  # a namespace of its own: the root is the container
        ("0::/../other\n", V2, v2("", 6 * GB, GB), 5 * GB),  # moved out of its namespace
        ("0::/docker/id\n", V2.replace(" / ", " /docker/id "), v2("", 6 * GB, GB), 5 * GB),  # only its own is mounted
        ("0::/job\n", V2, {}, None),
        (V1_OF.format("/slurm/uid_5/job_7"), V1, v1("slurm/uid_5/job_7/", 3 * GB, GB), 2 * GB),
        (V1_OF.format("/slurm/uid_5/job_7"), V1,
         v1("slurm/uid_5/job_7/", UNLIMITED, GB) | v1("slurm/uid_5/", 2 * GB, GB), GB),
        (V1_OF.format("/a") + "0::/b\n", HYBRID, v1("a/", 3 * GB, GB), 2 * GB),
        (V1_OF.format("/a") + "0::/b\n", HYBRID,
         {f"unified/b/{key}": value for key, value in v2("", 2 * GB, GB).items()} | v1("a/", UNLIMITED, GB), GB),
        ("", "", {}, None),
        ("0::/job\n", "", v2("job/", GB, 0), None),
        ("0::/a b\n", V2.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/a\040b"), v2("a b/a b/", 3 * GB, GB), 2 * GB),
    ],
)  # fmt: skip
def test_the_smallest_limit_from_its_own_group_up_to_the_root(
    tmp_path: Path, groups: str, mounts: str, files: dict[str, object], left: int | None
) -> None:
    found = memory_left(machine(tmp_path, groups, mounts, files))
    assert found == left or (left is None and found is not None and found > 2**60)


def test_the_host_and_the_group_are_both_asked(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/job\n", V2, v2("job/", 8 * GB, GB))
    for mb, expected in ((3 * 1024, 3 * GB), (16 * 1024, 7 * GB)):
        (root / "proc/meminfo").write_text(f"MemFree: 5 kB\nMemAvailable:   {mb * 1024} kB\n")
        assert available_bytes(root) == expected


@pytest.mark.parametrize("meminfo", [None, "MemTotal: 5 kB\n"])
def test_a_proc_that_tells_little_leaves_free_pages(tmp_path: Path, meminfo: str | None) -> None:
    root = machine(tmp_path, "", "", {})
    if meminfo:
        (root / "proc/meminfo").write_text(meminfo)
    assert available_bytes(root) > 0


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "quota"),
    [
        ("0::/job/step\n", V2, {"job/step/cpu.max": "400000 100000"}, 4.0),
        ("0::/job/step\n", V2, {"job/step/cpu.max": "max 100000", "job/cpu.max": "150000 100000"}, 1.5),
        ("0::/job/step\n", V2, {"job/step/cpu.max": "300000 100000", "job/cpu.max": "800000 100000"}, 3.0),
        ("0::/job\n", V2, {"job/cpu.max": "max 100000"}, None),
        ("0::/job\n", V2, {}, None),
        (V1_OF.format("/a/b"), V1,
         {"cpu,cpuacct/a/b/cpu.cfs_quota_us": -1, "cpu,cpuacct/a/b/cpu.cfs_period_us": 100000,
          "cpu,cpuacct/a/cpu.cfs_quota_us": 50000, "cpu,cpuacct/a/cpu.cfs_period_us": 100000}, 0.5),
        ("", "", {}, None),
    ],
)  # fmt: skip
def test_threads_are_no_more_than_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, mounts: str, files: dict[str, object], quota: float
) -> None:
    root = machine(tmp_path, groups, mounts, files)
    assert cpu_quota(root) == quota
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(16)))
    assert threads.usable_cores(root) == (16 if quota is None else max(1, int(quota)))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 16),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"SLURM_CPUS_PER_TASK": "8"}, 8),
        ({"OMP_NUM_THREADS": "2", "SLURM_CPUS_PER_TASK": "8"}, 2),
        ({"OMP_NUM_THREADS": "", "SLURM_CPUS_PER_TASK": "many"}, 16),
        ({"OMP_NUM_THREADS": "0"}, 16),
    ],
)
def test_the_environment_says_how_many_threads(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int
) -> None:
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "usable_cores", lambda: 16)
    assert threads.default_threads() == expected


def test_a_model_larger_than_the_memory_left_is_refused_before_the_kernel_kills_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = typed(ModelConfig, load("model", "tiny-llama"), "model")
    monkeypatch.setattr(build, "available_bytes", lambda: config.weight_bytes - 1)
    with pytest.raises(UserError, match="model=tiny-llama: its weights take"):
        build.build_model(config)
    monkeypatch.setattr(build, "available_bytes", lambda: config.weight_bytes)
    build.build_model(config)
