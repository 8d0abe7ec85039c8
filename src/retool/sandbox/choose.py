"""The sandbox that a config means: here, or by a service."""

from __future__ import annotations

from retool.config import SandboxConfig
from retool.protocols import Sandbox
from retool.sandbox.client import RemoteSandbox
from retool.sandbox.pool import LocalSandbox


async def open_sandbox(config: SandboxConfig) -> Sandbox:
    """A sandbox that has started; who opened it closes it.

    Raises:
        SandboxRefused: this machine cannot give the tier that the config asks for.
        SandboxBroken: it did not come up, or the service at ``config.url`` cannot be reached.
    """
    sandbox: RemoteSandbox | LocalSandbox = RemoteSandbox(config) if config.url else LocalSandbox(config)
    try:
        await sandbox.start()
    except BaseException:
        await sandbox.close()
        raise
    return sandbox
