"""Whose mistake it was: ours, the operator's, or a peer's."""


class FirstbootError(Exception):
    """Base of every error this project raises on purpose."""


class LocalError(FirstbootError):
    """This host cannot do what was asked of it: misuse, a full disk, a missing tool."""


class RemoteError(FirstbootError):
    """A peer sent something the protocol does not allow; drop the peer and count it."""


class UserError(LocalError):
    """A person's mistake: one sentence, where it was made, and the remedy.

    ``code`` is the process's exit code (sysexits.h): 64 for usage, 78 for configuration.
    """

    def __init__(self, message: str, *, where: str = "", hint: str = "", code: int = 78) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f"; {self.hint}" if self.hint else ""
        return f"{place}{self.message}{remedy}"
