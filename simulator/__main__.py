"""Starts the simulator: ``graph-simulator --port 0 --dir DIR``."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from . import certificates
from .server import GraphServer
from .world import World

#: Calls that are open at the end get this long, in seconds.
GRACE = 0.2


def main() -> None:
    asyncio.run(_serve(_arguments()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="graph-simulator", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--hostname", default="localhost", help="a name by which other machines reach it")
    parser.add_argument("--dir", type=Path, required=True, help="for certificates, attachments and simulator.json")
    parser.add_argument("--client-id", default="mailfleet-demo")
    parser.add_argument("--client-secret", default="demo-secret")
    parser.add_argument("--tenant", default="simulated", help="the tenant named in simulator.json; any is served")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end together with whoever holds stdin")
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    server = GraphServer(World(folder, arguments.client_id, arguments.client_secret))
    runner = web.ServerRunner(
        web.Server(server, access_log=None, keepalive_timeout=600.0, lingering_time=1.0), shutdown_timeout=GRACE
    )
    await runner.setup()
    context = certificates.server_context(folder, arguments.hostname)
    await web.TCPSite(runner, arguments.host, arguments.port, ssl_context=context).start()
    ending = _ending(watch_stdin=arguments.until_stdin_closes)
    _announce(folder, runner.addresses[0][1], arguments)
    await ending.wait()
    await runner.cleanup()


def _ending(*, watch_stdin: bool) -> asyncio.Event:
    """An event that is set when the process is asked to end."""
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    if watch_stdin:
        loop.add_reader(sys.stdin.fileno(), ending.set)
    return ending


def _announce(folder: Path, port: int, arguments: argparse.Namespace) -> None:
    base_url = f"https://{arguments.hostname}:{port}"
    _replace(
        folder / "simulator.json",
        {
            "port": port,
            "base_url": base_url,
            "graph_base_url": f"{base_url}/v1.0",
            "authority": base_url,
            "tenant_id": arguments.tenant,
            "client_id": arguments.client_id,
            "ca": str(folder / "ca.pem"),
            "control": f"{base_url}/control/",
        },
    )
    print(f"Graph simulator at {base_url}", flush=True)


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write the file so that a reader sees all of it or nothing."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(path)


if __name__ == "__main__":
    main()
