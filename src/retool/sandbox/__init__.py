"""Run code that nobody trusts: ``LocalSandbox`` here, ``RemoteSandbox`` by a service's HTTP API. Both are a ``Sandbox``
of ``retool.protocols``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retool.sandbox.pool import LocalSandbox
from retool.sandbox.tier import SandboxInfo

if TYPE_CHECKING:
    from retool.sandbox.client import RemoteSandbox

__all__ = ["LocalSandbox", "RemoteSandbox", "SandboxInfo"]


def __getattr__(name: str) -> Any:
    if name == "RemoteSandbox":  # its HTTP library is imported by those who use it
        from retool.sandbox.client import RemoteSandbox

        return RemoteSandbox
    raise AttributeError(name)
