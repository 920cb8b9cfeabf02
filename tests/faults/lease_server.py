"""An API server that knows Leases, as a process of its own, for gates that elect by them.

    python -m tests.faults.lease_server DIRECTORY

DIRECTORY gets a kubeconfig that leads to it. Versions and conflicts are as the API conventions have
them; it is no Kubernetes.
"""

import asyncio
import sys
from pathlib import Path
from typing import Final

from tests.support.kubernetes_api import api_server

LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces/models/leases"


async def main(directory: Path) -> None:
    """Serve until killed."""
    async with api_server(directory) as (api, _kubeconfig):
        api.serve(LEASES)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
