"""Run code that nobody trusts: ``LocalSandbox`` is the ``Sandbox`` of ``retool.protocols``."""

from retool.sandbox.pool import LocalSandbox
from retool.sandbox.tier import SandboxInfo, describe, tier

__all__ = ["LocalSandbox", "SandboxInfo", "describe", "tier"]
