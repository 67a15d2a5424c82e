"""Training beside the server: samples, runs, and how they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onebase.errors import OnebaseError, TrainingError, UnknownNameError
from onebase.serve.training import SAMPLES, Training, TrainingRequest, Trainings


def training_routes(trainings: Trainings, admin: Callable[..., Any], use: Callable[..., Any], table_bytes: int) -> Any:
    """Return the routes of training.

    Args:
        trainings: the runs.
        admin: a FastAPI dependency that refuses whoever may not train.
        use: one that refuses whoever may not ask.
        table_bytes: of a table that is sent, at most.

    Returns:
        An APIRouter: GET /v1/samples; POST and GET /v1/training, GET and DELETE /v1/training/{key}.
    """
    from fastapi import APIRouter, Depends, HTTPException

    routes = APIRouter(tags=["training"])
    admins = [Depends(admin)]

    def told(action: Callable[[], Training]) -> dict[str, Any]:
        try:
            return action().plain()
        except OnebaseError as error:
            missing, busy = isinstance(error, UnknownNameError), isinstance(error, TrainingError)
            raise HTTPException(404 if missing else 409 if busy else 400, str(error)) from error

    def samples() -> dict[str, Any]:
        """List the data that come along."""
        return {"object": "list", "data": [{"id": name, **facts} for name, facts in SAMPLES.items()]}

    def begin(request: TrainingRequest) -> dict[str, Any]:
        """Train an adapter in a process of its own, and store it as the next version."""
        sent = len((request.csv or "").encode())
        if sent > table_bytes:
            raise HTTPException(413, f"csv has {sent} bytes; at most {table_bytes} are taken: train with the program")
        return told(lambda: trainings.start(request))

    def every() -> dict[str, Any]:
        """List the runs since the server started, the latest first."""
        return {"object": "list", "data": [run.plain() for run in reversed(list(trainings.runs.values()))]}

    def one(key: str) -> dict[str, Any]:
        """Return a run: state, losses by step, scores by epoch, result."""
        return told(lambda: trainings.get(key))

    def stop(key: str) -> dict[str, Any]:
        """End a run; nothing of it is stored."""
        return told(lambda: trainings.stop(key))

    routes.add_api_route("/v1/samples", samples, methods=["GET"], dependencies=[Depends(use)])
    routes.add_api_route("/v1/training", begin, methods=["POST"], status_code=202, dependencies=admins)
    routes.add_api_route("/v1/training", every, methods=["GET"], dependencies=admins)
    routes.add_api_route("/v1/training/{key}", one, methods=["GET"], dependencies=admins)
    routes.add_api_route("/v1/training/{key}", stop, methods=["DELETE"], dependencies=admins)
    return routes
