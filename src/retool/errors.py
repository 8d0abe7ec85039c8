"""The tree of exceptions.

ReToolError
├── UserError            the user can mend it: one line, no traceback, exit code 2
│   ├── ConfigError      a recipe or an override is wrong (field, value, mend)
│   ├── DataError        a data file is missing, unreadable or malformed
│   └── SandboxRefused   this machine cannot give the isolation that was asked for
├── InfraError           the machine failed, not the model and not the user: retried, then counted
│   └── SandboxBroken    the sandbox could not run anything at all
├── HealthError          a run ended itself: an alarm that the recipe takes for the end, or nothing finite to learn from
└── InvariantError       a promise of the program is broken: a bug, shown with its traceback
"""


class ReToolError(Exception):
    """Everything that this package raises on purpose."""


class UserError(ReToolError):
    """A mistake that the user can mend. The message is one line: field, value, mend."""


class ConfigError(UserError):
    """A recipe or an override is wrong."""


class DataError(UserError):
    """A data file is missing, unreadable or malformed."""


class SandboxRefused(UserError):
    """This machine cannot give the isolation that was asked for."""


class InfraError(ReToolError):
    """The machine failed, not the model and not the user."""


class SandboxBroken(InfraError):
    """The sandbox could not run anything at all."""


class HealthError(ReToolError):
    """A run ended itself because of an alarm; its last checkpoint is whole."""


class InvariantError(ReToolError):
    """A promise of the program is broken: a bug."""
