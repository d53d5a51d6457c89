"""TODO engine/storage/fingerprints.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(value: object) -> str:
    """Sixteen hexadecimal digits that stand for any JSON-like value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words how two mappings differ, such as ``settings (clip_s 3.0, not 10.0)``; empty where they do not."""
    told = []
    for name in wanted:
        before, now = found.get(name), wanted[name]
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
            told.append(f"{name} ({', '.join(f'{key} {_change(before.get(key), now.get(key))}' for key in keys)})")
        else:
            told.append(f"{name} ({_change(before, now)})")
    return " and ".join(told)


def _change(before: object, now: object) -> str:
    return f"{_short(before)}, not {_short(now)}"


def _short(value: object) -> str:
    words = json.dumps(value, default=str)
    return words if len(words) <= 60 else f"{words[:57]}..."
