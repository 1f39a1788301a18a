"""The one list of what needs no key. Whatever is not on it needs one."""

from __future__ import annotations

PUBLIC = frozenset({"/health", "/ready", "/version"})  # paths of routes, under every prefix they have
