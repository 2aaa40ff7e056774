"""The fix of flash-attn-4's window bounds, against a stand-in with the real one's reading."""

import importlib.metadata
import sys
import types

import pytest

from megatron_long.errors import ConfigError
from megatron_long.model import flash_attention


def resolve_as_4_0_0b36(causal, left, right, mask_mod=None):
    """The rule of that release: only two negative bounds together are unlimited."""
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    if left is None and right == 0:
        return True, False, None, None
    return False, left is not None or right is not None, left, right


@pytest.fixture
def interface(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("flash_attn.cute.interface")
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(flash_attention, "installed_versions", lambda: {"flash-attn-4": "9"})
    return module


def test_unlimited_left_bound_stays_causal(interface):
    interface._resolve_causal_local_window = resolve_as_4_0_0b36
    assert interface._resolve_causal_local_window(True, -1, 0) == (False, True, -1, 0)  # the defect
    for _ in range(2):  # scoring after training fixes again
        flash_attention.fix_windows()
    resolve = interface._resolve_causal_local_window
    assert resolve(True, -1, 0) == (True, False, None, None)
    assert resolve(False, -1, -1) == (False, False, None, None)
    assert resolve(False, 128, 0) == (False, True, 128, 0)
    assert resolve.__wrapped__ is resolve_as_4_0_0b36


def test_unknown_release_is_refused(interface):
    with pytest.raises(ConfigError, match=r"flash-attn-4 9 .*4\.0\.0b36"):
        flash_attention.fix_windows()


def test_versions_are_those_of_installed_distributions(monkeypatch):
    def version(name):
        if name == "flash-attn-3":
            return "3.0.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert flash_attention.installed_versions() == {"flash-attn-3": "3.0.0"}
    flash_attention.fix_windows()  # nothing to fix without flash-attn-4
