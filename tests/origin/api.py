"""The double's API: who may do what, as far as a cluster's coming up shows it."""

from __future__ import annotations

import base64
import binascii
import http.server
import json
import ssl
import threading
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from tests.origin import objects

MAX_BODY = 1 << 20
SECONDS = 10.0  # for one request
User = tuple[str, set[str]]
Answer = tuple[int, Any]  # an HTTP status, and a text or JSON
ANONYMOUS: User = ("system:anonymous", {"system:unauthenticated"})
ADMINS = {"system:masters", "system:cluster-admins"}


# ---------------------------------------------------------------- tokens of service accounts


def make_token(namespace: str, name: str, key: rsa.RSAPrivateKey) -> str:
    """A JSON web token as Kubernetes makes them (RS256)."""
    says = {
        "iss": "kubernetes/serviceaccount",
        "kubernetes.io/serviceaccount/namespace": namespace,
        "kubernetes.io/serviceaccount/service-account.name": name,
        "sub": f"system:serviceaccount:{namespace}:{name}",
    }
    parts = [_encode(json.dumps(p).encode()) for p in ({"alg": "RS256", "typ": "JWT"}, says)]
    text = ".".join(parts)
    return f"{text}.{_encode(key.sign(text.encode(), padding.PKCS1v15(), SHA256()))}"


def token_user(token: str, keys: Iterable[rsa.RSAPublicKey]) -> User | None:
    """Whose token this is; None if no key signed it."""
    text, _, signature = token.rpartition(".")
    for key in keys:
        try:
            key.verify(_decode(signature), text.encode(), padding.PKCS1v15(), SHA256())
            says = json.loads(_decode(text.partition(".")[2]))
            return says["sub"], {"system:serviceaccounts", "system:authenticated"}
        except (InvalidSignature, binascii.Error, ValueError, KeyError):
            continue
    return None


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)


# ---------------------------------------------------------------- what is asked


class Api:
    """Nodes and objects, in memory: nodes and controllers bring theirs again."""

    def __init__(self, keys: list[rsa.RSAPublicKey]) -> None:
        self.keys = keys
        self.ready = False
        self.nodes: dict[str, dict[str, Any]] = {}
        self.objects: objects.Store = {}
        self._lock = threading.Lock()

    def user(self, certificate: dict[str, Any] | None, bearer: str) -> User | None:
        """Who asks, by certificate or token; None if a token is no good."""
        if certificate:
            pairs = [pair for rdn in certificate.get("subject", ()) for pair in rdn]
            names = [value for key, value in pairs if key == "commonName"]
            groups = {value for key, value in pairs if key == "organizationName"}
            return names[0], groups | {"system:authenticated"}
        if not bearer:
            return ANONYMOUS
        held = [of for path, of in self.objects.items() if path.endswith("/secrets")]
        stored = [s["data"].get("token") for of in held for s in of.values()]
        if base64.b64encode(bearer.encode()).decode() not in stored:
            return None
        return token_user(bearer, self.keys)

    def answer(self, method: str, path: str, user: User | None, body: Any) -> Answer:
        """What one request gets."""
        with self._lock:
            match [method, *path.strip("/").split("/")]:
                case ["GET", "healthz", *_]:
                    return (200, "ok") if self.ready else (500, "etcd is not there yet")
                case _ if user is None:
                    return 401, {"kind": "Status", "message": "Unauthorized"}
                case ["GET", "apis", "user.openshift.io", "v1", "users", "~"]:
                    return self._whoami(user)
                case [_, "api", "v1", "nodes", *rest]:
                    return self._node(method, rest, user, body)
                case [_, *where] if objects.collection("/".join(where)):
                    return self._object(method, "/".join(where), user, body)
        return 404, {"kind": "Status", "message": f"there is no {path}"}

    def _whoami(self, user: User) -> Answer:
        if user == ANONYMOUS:
            return _forbidden(user, "users")
        return 200, {"kind": "User", "metadata": {"name": user[0]}, "groups": sorted(user[1])}

    def _node(self, method: str, rest: list[str], user: User, body: Any) -> Answer:
        """A node is registered, and says how it is, by itself only."""
        admin = bool(user[1] & ADMINS)
        if not rest and method == "GET" and admin:
            return 200, {"kind": "NodeList", "items": list(self.nodes.values())}
        name = rest[0] if rest else body["metadata"]["name"] if body else ""
        own = user[0] == f"system:node:{name}" and "system:nodes" in user[1]
        if not (own or (admin and method == "GET")):
            return _forbidden(user, f"node {name}")
        if method == "POST" and not rest:
            self.nodes.setdefault(name, body)
        elif name not in self.nodes:
            return 404, {"kind": "Status", "message": f'nodes "{name}" not found'}
        elif method == "PUT" and rest[1:] == ["status"]:
            self.nodes[name]["status"] = body["status"]
        return 200, self.nodes[name]

    def _object(self, method: str, path: str, user: User, body: Any) -> Answer:
        if not user[1] & ADMINS:
            return _forbidden(user, path)
        if method == "POST":
            try:
                made = objects.create(self.objects, path, body)
            except objects.Invalid as error:
                return 422, {"kind": "Status", "message": f"{body['metadata']['name']}: {error}"}
            name = body["metadata"]["name"]
            return (201, body) if made else (409, {"message": f"{name} already exists"})
        return 200, {"kind": "List", "items": list(self.objects.get(path, {}).values())}


def _forbidden(user: User, what: str) -> Answer:
    return 403, {"kind": "Status", "message": f'User "{user[0]}" may not have {what}'}


# ---------------------------------------------------------------- over TLS


def server(
    address: tuple[str, int], context: ssl.SSLContext, api: Api
) -> http.server.ThreadingHTTPServer:
    """Bound already; answers each connection in a thread of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = SECONDS

        def answer(self) -> None:
            length = min(int(self.headers.get("Content-Length") or 0), MAX_BODY)
            scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
            user = api.user(self.connection.getpeercert(), bearer if scheme == "Bearer" else "")
            try:
                body = json.loads(self.rfile.read(length)) if length else None
                code, said = api.answer(self.command, self.path.partition("?")[0], user, body)
            except (ValueError, KeyError, TypeError) as error:
                code, said = 400, {"kind": "Status", "message": repr(error)}
            # As Kubernetes writes it, without spaces: gates look for a part of it.
            text = said if isinstance(said, str) else json.dumps(said, separators=(",", ":"))
            self.send_response(code)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
            print(f"{user[0] if user else '?'} {self.command} {self.path} {code}", flush=True)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(address, Handler)
    # Shaking hands is for the connection's own thread: a silent peer must not stop the others.
    made.socket = context.wrap_socket(made.socket, server_side=True, do_handshake_on_connect=False)
    return made


def serve(address: tuple[str, int], context: ssl.SSLContext, api: Api) -> None:
    """Answer in the background, for as long as the process lives."""
    threading.Thread(target=server(address, context, api).serve_forever, daemon=True).start()
