"""A model hub on this machine: real huggingface_hub clients talk to it as to the real one.

It answers as the hub does, as far as fetching a model asks: found, not found, gated, an error.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import ThreadingHTTPServer
from types import MappingProxyType

from tests.standin import Answers

MODEL, COMMIT = "owner/model", "c0ffee" * 6 + "c0de"


@contextlib.contextmanager
def hub(
    files: dict[str, bytes], errors: Mapping[str, tuple[int, str]] = MappingProxyType({})
) -> Iterator[str]:
    """Serve ``files`` as ``owner/model``; refuse ``owner/gated``; know no other. Yields the address.

    ``errors`` are other models with the status and the message that each is answered with.
    """

    class Handler(Answers):
        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].removeprefix("/api/models/").strip("/")
            if path.startswith("owner/gated"):
                return self.answer(
                    403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted"
                )
            for name, (status, message) in errors.items():
                if path.startswith(name):
                    return self.answer(status, b"{}", X_Error_Message=message)
            if not path.startswith(MODEL):
                return self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Not found")
            rest = path.removeprefix(MODEL).strip("/")
            if rest.startswith("revision/") and rest.partition("/")[2] not in ("main", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Not found")
            if rest.startswith("tree/"):
                listed = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in files.items()]
                return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
            if rest.startswith("resolve/"):
                name = rest.split("/", 2)[2]
                etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
                return self.answer(200, files[name], ETag=etag, X_Repo_Commit=COMMIT)
            info = {
                "id": MODEL,
                "modelId": MODEL,
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in files],
            }
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
