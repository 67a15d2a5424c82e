"""Every setting of a server, with its unit and default."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from onebase.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What a server takes, keeps and allows.

    Attributes:
        batch_tokens: most tokens of one forward of rows; a longer row goes alone.
        batch_rows: most rows of one forward.
        answering: threads that answer rows at the same time; None: as many as pay, see `devices.answering_threads`.
        waiting_rows: rows that may be in the server at once, all adapters together.
        waiting_rows_each: the same, of one adapter.
        waiting_prompts: prompts that may be in the server at once.
        group_prompts: most prompts that are written at once; of one group, where they are written in groups.
        device_bytes: bytes of adapters attached to the base.
        memory_bytes: bytes of adapters kept off the device.
        body_bytes: of a request.
        table_bytes: of a table that is sent to be trained on. Such a request may have twice as many, as JSON escapes
            quotes and the ends of lines.
        request_rows: rows, documents or prompts of one request.
        text_length: characters of one text.
        new_tokens: most new tokens of one prompt.
        timeout: seconds of one request.
        body_timeout: seconds in which a body must arrive.
        drain: seconds that a shutdown waits for running requests.
    """

    batch_tokens: int = 8192
    batch_rows: int = 64
    answering: int | None = None
    waiting_rows: int = 8192
    waiting_rows_each: int = 2048
    waiting_prompts: int = 512
    group_prompts: int = 16
    device_bytes: int = 2048 * MIB
    memory_bytes: int = 4096 * MIB
    body_bytes: int = 4 * MIB
    table_bytes: int = 8 * MIB
    request_rows: int = 1024
    text_length: int = 100_000
    new_tokens: int = 1024
    timeout: float = 120.0
    body_timeout: float = 30.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        given = asdict(self).items()
        wrong = [f"{name} = {value!r}" for name, value in given if value is not None and not value > 0]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: expected more than 0")

    def body_limit(self, path: str) -> int:
        """Return the bytes that a request to this path may have."""
        return 2 * self.table_bytes if path == "/v1/training" else self.body_bytes
