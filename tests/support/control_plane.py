"""A real Kubernetes control plane for tests: etcd and kube-apiserver, built from their Go modules.

The two programs are built once into a cache, which takes minutes. Without Go, tests that need them
are skipped. `python -m tests.support.control_plane` builds them beforehand.
"""

import asyncio
import base64
import fcntl
import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

import pytest
import yaml
from aiohttp import ClientSession, TCPConnector
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.ports import free_ports

SOURCES = Path(__file__).parents[1] / "kubernetes" / "control_plane"
KUBERNETES: Final = "v1.35.4"
CRDS: Final = {
    "sigs.k8s.io/gateway-api-inference-extension@v1.5.0": ("config/crd/bases/*.yaml",),
    "sigs.k8s.io/gateway-api@v1.5.1": ("config/crd/standard/*.yaml",),
}
"""Go modules, and the CRDs in them that tests use."""
START_S = 120.0
FIELD_MANAGER = "tests"
Json = dict[str, Any]


class RefusedError(Exception):
    """The API server has refused a request; with status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


def cache_directory() -> Path:
    """Return the directory of programs built for tests."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "flowcontrol-tests"


def go(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run Go and return its output; skip the test if it cannot run."""
    program = shutil.which("go")
    if program is None:
        pytest.skip("Go is not installed: nothing is tested on a real Kubernetes API server")
    done = subprocess.run(
        ["nice", program, *arguments],
        cwd=cwd,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"go {arguments[0]} failed: {done.stderr[-500:]}")
    return done.stdout


def module_directory(module: str) -> Path:
    """Return the directory of an unpacked Go module, given as path@version."""
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    found = json.loads(go("mod", "download", "-json", module, cwd=directory))
    return Path(found["Dir"])


def build() -> Path:
    """Return the directory of both programs; build them if they are not in the cache."""
    sources = sorted(path for path in SOURCES.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    target = cache_directory() / f"control-plane-{digest}"
    target.mkdir(parents=True, exist_ok=True)
    with (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("etcd", "kube-apiserver"):
            if not (target / name).exists():
                linked = f"-s -w -X k8s.io/component-base/version.gitVersion={KUBERNETES}"
                made = target / f"{name}.new"
                go(
                    "build",
                    "-trimpath",
                    "-ldflags",
                    linked,
                    "-o",
                    str(made),
                    f"./{name}",
                    cwd=SOURCES,
                )
                made.rename(target / name)
    return target


def manifests(path: Path) -> Iterator[Json]:
    """Yield the documents of a file; read by libyaml, as Python's reader takes seconds for CRDs."""
    yield from filter(None, yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader))


def custom_resources() -> Iterator[Json]:
    """Yield the CRDs, and InferenceObjective also as that of llm-d.ai, which derives from it."""
    for module, patterns in CRDS.items():
        for pattern in patterns:
            for path in sorted(module_directory(module).glob(pattern)):
                for document in manifests(path):
                    if document["kind"] == "CustomResourceDefinition":
                        yield document
                        if document["spec"]["names"]["kind"] == "InferenceObjective":
                            yield _of_llm_d(document)


def _of_llm_d(document: Json) -> Json:
    text = yaml.safe_dump(document).replace("inference.networking.x-k8s.io", "llm-d.ai")
    made: Json = yaml.safe_load(text)
    made["metadata"].pop("annotations", None)
    return made


@final
class ControlPlane:
    """Running etcd and API server.

    Args:
        programs: directory of the programs.
        directory: directory for their files.
    """

    TOKEN = "admin-token"

    def __init__(self, programs: Path, directory: Path) -> None:
        self._programs = programs
        self.directory = directory
        etcd_port, peer_port, self._port = free_ports(3)
        self.etcd_url = f"http://127.0.0.1:{etcd_port}"
        self._peer_url = f"http://127.0.0.1:{peer_port}"
        self.url = f"https://127.0.0.1:{self._port}"
        self._etcd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def authority(self) -> Path:
        """The certificate that the API server has created for itself."""
        return self.directory / "certs" / "apiserver.crt"

    def start(self) -> None:
        """Start both; return when the API server is ready."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        (self.directory / "sa.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        (self.directory / "sa.pub").write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        (self.directory / "tokens.csv").write_text(f"{self.TOKEN},admin,1,system:masters\n")
        self._etcd = self._run(
            "etcd",
            "--name=k8s",
            f"--data-dir={self.directory / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={self.etcd_url}",
            f"--advertise-client-urls={self.etcd_url}",
            f"--listen-peer-urls={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            f"--initial-cluster=k8s={self._peer_url}",
        )
        self.start_server()

    def start_server(self, *more: str) -> None:
        """Start the API server, with further flags; return when it is ready."""
        self._server = self._run(
            "kube-apiserver",
            f"--etcd-servers={self.etcd_url}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--cert-dir={self.directory / 'certs'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.directory / 'sa.pub'}",
            f"--service-account-signing-key-file={self.directory / 'sa.key'}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--endpoint-reconciler-type=none",
            "--etcd-compaction-interval=0",
            *more,
        )
        until_s = time.monotonic() + START_S
        while not self._is_ready():
            assert self._server.poll() is None, self.log("kube-apiserver")
            assert time.monotonic() < until_s, self.log("kube-apiserver")
            time.sleep(0.1)

    def stop_server(self) -> None:
        """Kill the API server: every connection breaks."""
        _killed(self._server)

    def stop(self) -> None:
        """Kill both."""
        _killed(self._server)
        _killed(self._etcd)

    def compact(self) -> None:
        """Make etcd discard all old versions."""
        current = self._etcd_call("kv/range", {"key": "AA=="})["header"]["revision"]
        self._etcd_call("kv/compaction", {"revision": current, "physical": True})

    def delete_stored(self, key: str) -> None:
        """Delete an object without the API server, by its key below /registry."""
        encoded = base64.b64encode(f"/registry/{key}".encode()).decode()
        assert self._etcd_call("kv/deleterange", {"key": encoded})["deleted"] == "1", key

    def kubeconfig(self, directory: Path, user: Mapping[str, Any], namespace: str) -> Path:
        """Write a kubeconfig for this control plane."""
        path = directory / "kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self.authority)}
        context = {"cluster": "here", "user": "user", "namespace": namespace}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "user", "user": dict(user)}],
            "contexts": [{"name": "here", "context": context}],
        }
        path.write_text(yaml.safe_dump(document))
        return path

    def log(self, program: str) -> str:
        """Return the end of a program's log."""
        return (self.directory / f"{program}.log").read_text(errors="replace")[-4000:]

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *arguments],
                cwd=self.directory,
                stdout=log,
                stderr=log,
            )

    def _is_ready(self) -> bool:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        headers = {"Authorization": f"Bearer {self.TOKEN}"}
        request = urllib.request.Request(f"{self.url}/readyz", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5, context=context) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _etcd_call(self, path: str, body: Json) -> Json:
        request = urllib.request.Request(f"{self.etcd_url}/v3/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: Json = json.load(answer)
            return found


@contextmanager
def control_plane(directory: Path) -> Iterator[ControlPlane]:
    """A control plane with the CRDs of inference pools and objectives."""
    running = ControlPlane(build(), directory)
    try:
        running.start()
        asyncio.run(_install(running))
        yield running
    finally:
        running.stop()


async def _install(running: ControlPlane) -> None:
    async with Cluster(running) as cluster:
        await cluster.install(custom_resources())


@final
class Cluster:
    """The actions of a cluster administrator. Use as a context."""

    def __init__(self, running: ControlPlane) -> None:
        self._running = running
        self._resources: dict[tuple[str, str], tuple[str, bool]] = {}
        """Plural name, and whether it is namespaced, by apiVersion and kind."""

    async def __aenter__(self) -> "Cluster":
        self._session = ClientSession(connector=TCPConnector(ssl=False, limit=8))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        content_type: str = "application/json",
        token: str = ControlPlane.TOKEN,
        **query: str,
    ) -> Json:
        """Send a request and return the answer.

        Raises:
            RefusedError: status and message.
        """
        async with self._session.request(
            method,
            self._running.url + path,
            params=query,
            data=None if body is None else json.dumps(body),
            headers={"Authorization": f"Bearer {token}", "Content-Type": content_type},
        ) as answer:
            found: Json = await answer.json(content_type=None)
            if answer.status >= 400:
                raise RefusedError(answer.status, str(found.get("message")))
            return found

    async def path(self, document: Json, namespace: str) -> str:
        """Return the path of an object, which need not exist."""
        version, kind = document["apiVersion"], document["kind"]
        root = f"/api/{version}" if "/" not in version else f"/apis/{version}"
        if (version, kind) not in self._resources:
            for each in (await self.call("GET", root))["resources"]:
                if "/" not in each["name"]:
                    key = (version, each["kind"])
                    self._resources[key] = each["name"], each["namespaced"]
        plural, is_namespaced = self._resources[version, kind]
        where = f"/namespaces/{namespace}" if is_namespaced else ""
        return f"{root}{where}/{plural}/{document['metadata']['name']}"

    async def apply(self, document: Json, namespace: str, **query: str) -> Json:
        """Apply an object by server-side apply; an unknown field is an error."""
        return await self.call(
            "PATCH",
            await self.path(document, namespace),
            document,
            content_type="application/apply-patch+yaml",
            fieldManager=FIELD_MANAGER,
            fieldValidation="Strict",
            force="true",
            **query,
        )

    async def get(self, document: Json, namespace: str) -> Json:
        """Return the current object."""
        return await self.call("GET", await self.path(document, namespace))

    async def delete(self, document: Json, namespace: str) -> None:
        """Delete an object at once."""
        path = await self.path(document, namespace)
        await self.call("DELETE", path, {"gracePeriodSeconds": 0})

    async def set_status(self, document: Json, namespace: str, status: Json) -> None:
        """Merge into the status of an object."""
        path = await self.path(document, namespace)
        kind = "application/merge-patch+json"
        await self.call("PATCH", f"{path}/status", {"status": status}, content_type=kind)

    async def install(self, definitions: Iterator[Json] | Sequence[Json]) -> None:
        """Apply CRDs, and wait until the server serves them."""
        for definition in definitions:
            await self.apply(definition, "")
            while not _is_established(await self.get(definition, "")):  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.05)

    async def token(self, account: str, namespace: str, bound_to: Json | None = None) -> str:
        """Return a token of a service account; it expires with the object it is bound to."""
        spec: Json = {"expirationSeconds": 3600}
        if bound_to is not None:
            spec["boundObjectRef"] = bound_to
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str((await self.call("POST", path, body))["status"]["token"])


def _is_established(definition: Json) -> bool:
    conditions = definition["status"].get("conditions") or ()
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def _killed(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None and process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    try:
        said = str(build())
    except pytest.skip.Exception as why:
        said = str(why)
    sys.stdout.write(f"{said}\n")
