"""How many cores a process may use."""

import os

from cvjax import cores


def test_cores_by_the_affinity_mask_or_without_one(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert cores.affinity() == [3, 5] and cores.core_count() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert cores.affinity() == [] and cores.core_count() == 16
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.core_count() == 1


def test_the_quota_of_a_container_is_read(tmp_path):
    assert cores.cpu_limit(tmp_path) == 0
    for text, limit in (("150000 100000", 2), ("max 100000", 0), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert cores.cpu_limit(tmp_path) == limit
