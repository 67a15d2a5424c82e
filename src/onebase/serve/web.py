"""The page at `/`: its files, with headers that let nothing foreign in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # scripts, styles and answers come from this server alone
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_files() -> dict[str, Path]:
    """Return path in the address -> file: every file of the page, and ``/`` for its index."""
    files = {f"/page/{file.relative_to(PAGE).as_posix()}": file for file in PAGE.rglob("*") if file.suffix in KINDS}
    return {"/": PAGE / "index.html", **files}


def add_page(app: Any) -> None:
    """Serve the page's files on a FastAPI application, outside its schema.

    Args:
        app: the application. Only the files that are there now are served: no path reaches any other.
    """
    from fastapi import Response

    def route(file: Path) -> Any:
        def answer() -> Response:
            return Response(file.read_bytes(), media_type=KINDS[file.suffix], headers=HEADERS)

        return answer

    for path, file in page_files().items():
        app.add_api_route(path, route(file), methods=["GET"], include_in_schema=False)
