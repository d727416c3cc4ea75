# SPDX-License-Identifier: Apache-2.0
"""OpenAI's endpoints for files and batches."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, cast

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from fastserve.server.batches import Batches
from fastserve.server.errors import ApiError
from fastserve.server.middleware import UPLOAD_PATH
from fastserve.server.protocol import Body


class BatchRequest(Body):
    """The body of POST /v1/batches."""

    input_file_id: str = Field(max_length=100)
    endpoint: str = Field(max_length=100)
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=16)


class FileObject(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str


class Deleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


def _page(all_of_them: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A list as the API gives it: `limit` entries that follow the one with the id `after`."""
    ids = [one["id"] for one in all_of_them]
    if after is not None and after not in ids:
        raise ApiError(400, f"after is {after[:100]!r}; there is no such id", param="after")
    begin = 0 if after is None else ids.index(after) + 1
    page = all_of_them[begin : begin + limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = begin + limit < len(ids)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more}


def add_batch_endpoints(app: FastAPI, batches: Batches | None) -> None:
    """`batches` None: every one of them says how to get them."""

    def kept() -> Batches:
        if batches is None:
            raise ApiError(404, "this server keeps no files; start it with --batch-dir FOLDER for files and batches")
        return batches

    @app.post(UPLOAD_PATH, response_model=FileObject, openapi_extra=UPLOAD)
    async def upload(request: Request) -> Any:
        """Keep a file of requests, one JSON object a line, for a batch."""
        files = kept().files
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "a file is uploaded as multipart/form-data, with the fields file and purpose")
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                given, purpose = form.get("file"), form.get("purpose")
                if not isinstance(given, UploadFile):
                    raise ApiError(400, "the form needs a file", param="file")
                if purpose != "batch":
                    raise ApiError(400, "purpose must be batch", param="purpose")
                return await asyncio.to_thread(files.add, given.file, given.filename or "upload.jsonl", "batch")
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    @app.get(UPLOAD_PATH)
    async def list_files(
        after: str | None = Query(None, max_length=100),
        limit: int = Query(10_000, ge=1, le=10_000),
        purpose: str | None = Query(None, max_length=100),
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        """The files that are kept."""
        found = await asyncio.to_thread(kept().files.all)
        found = [one for one in found if purpose is None or one["purpose"] == purpose]
        return _page(found if order == "desc" else found[::-1], after, limit)

    @app.get("/v1/files/{file_id}", response_model=FileObject)
    async def file(file_id: str) -> Any:
        return await asyncio.to_thread(kept().files.about, file_id)

    @app.delete("/v1/files/{file_id}", response_model=Deleted)
    async def delete_file(file_id: str) -> Any:
        await asyncio.to_thread(kept().files.delete, file_id)
        return {"id": file_id}

    @app.get("/v1/files/{file_id}/content", response_class=Response)
    async def content(file_id: str) -> Response:
        """The bytes of a file."""
        path = await asyncio.to_thread(kept().files.path, file_id)
        headers = {"X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    @app.post("/v1/batches")
    async def create(body: BatchRequest) -> Any:
        """Answer all requests of a file, beside those of clients."""
        return kept().create(body.input_file_id, body.endpoint, body.metadata).body()

    @app.get("/v1/batches")
    async def list_batches(
        after: str | None = Query(None, max_length=100), limit: int = Query(20, ge=1, le=100)
    ) -> Any:
        """All batches, the newest first."""
        return _page([one.body() for one in kept().all()], after, limit)

    @app.get("/v1/batches/{batch_id}")
    async def batch(batch_id: str) -> Any:
        return cast(Any, kept().get(batch_id).body())

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Any:
        """Let a batch end with the answers it has."""
        return kept().cancel(batch_id).body()
