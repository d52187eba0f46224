"""What holds for one command: its words, and the options that stand before its noun."""

from contextvars import ContextVar

# From the noun on, for the audit log.
command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())
profile_flag: ContextVar[str | None] = ContextVar("profile_flag", default=None)
confirm_flag: ContextVar[str | None] = ContextVar("confirm_flag", default=None)
log_format_flag: ContextVar[str | None] = ContextVar("log_format_flag", default=None)
debug_flag: ContextVar[bool] = ContextVar("debug_flag", default=False)
