"""``GET /v1/models/NAME``, which OpenAI's clients know and vLLM 0.32 lacks: answered from its list of models.

The server loads it by ``--middleware helpers.serve.models.retrieve``. vLLM's own check of the key comes after
it, and still sees each request.
"""

from __future__ import annotations

import json


async def retrieve(request, call_next):
    """Answer with one model of the list, or 404 in OpenAI's shape; pass on what asks for something else."""
    from starlette.responses import JSONResponse

    _, found, name = request.scope["path"].partition("/v1/models/")
    if not (found and name) or request.method != "GET":
        return await call_next(request)
    request.scope["path"], request.scope["raw_path"] = "/v1/models", b"/v1/models"
    reply = await call_next(request)
    if reply.status_code != 200:
        return reply
    models = json.loads(b"".join([part async for part in reply.body_iterator]))["data"]
    if known := [model for model in models if model["id"] == name]:
        return JSONResponse(known[0])
    error = {"message": f"The model `{name}` does not exist.", "type": "NotFoundError", "param": "model"}
    return JSONResponse({"error": error | {"code": 404}}, 404)
