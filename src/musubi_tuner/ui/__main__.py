"""The page: python -m musubi_tuner.ui [--port 7860]

Prints an address with a token in it and serves the page there, for this machine alone. With --host it can be reached from others: then
whoever knows the address can start runs as you, so use a tunnel where you can.
"""

import argparse
import errno
import json
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from musubi_tuner.config.command_line import Parser
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.run_record import user_state_folder
from musubi_tuner.ui.security import Guard

PORT = 7860
LOCAL = ("127.0.0.1", "::1", "localhost")
EVERY = ("0.0.0.0", "::")
TRIES = 20
LAST_PORT = 65_535


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m musubi_tuner.ui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port (default {PORT}, or the next free one)")
    parser.add_argument(
        "--project", metavar="FOLDER", default=".", help="folder with toml/ and data/ (default: this one)"
    )
    parser.add_argument(
        "--root", metavar="FOLDER", action="append", default=[], help="another folder whose files may be chosen"
    )
    parser.add_argument(
        "--types", action="store_true", help="print the types of requests and answers, as OpenAPI, and end"
    )
    parser.add_argument("--token_file", metavar="FILE", help="file that holds the token; made if it is not there")
    options = parser.parse_args(arguments)
    try:
        import uvicorn

        from musubi_tuner.ui.server import STATIC, make_app
    except ImportError as missing:
        raise ConfigError(f'the page needs more packages ({missing.name}): pip install -e ".[ui]"') from missing
    if not (STATIC / "index.html").is_file():
        raise ConfigError(f"{STATIC}: the built page is not there; see CONTRIBUTING.md")
    project = Path(options.project).absolute()
    if not project.is_dir():
        raise ConfigError(f"--project {project}: no such folder")
    roots = tuple(Path(root).absolute() for root in options.root)
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"--root {root}: no such folder")
    if options.types:
        described = make_app(Guard("", frozenset(), ""), project).openapi()
        print(json.dumps({**described, "paths": {}}, indent=1, sort_keys=True))
        return EXIT_OK
    os.chdir(project)  # from which relative paths of run files are meant
    port = free_port(options.host, options.port)
    if port != options.port:
        print(f"note: port {options.port} is taken; using {port}")
    token = read_token(Path(options.token_file) if options.token_file else user_state_folder() / "ui-token")
    guard = Guard(token, hosts_of(options.host, port), f"musubi_ui_{port}")
    shown = f"[{options.host}]" if ":" in options.host else options.host
    if options.host not in LOCAL:
        print(
            "note: whoever knows the address below can start runs as you; it is not encrypted, so use a tunnel where you can"
        )

    class Server(uvicorn.Server):
        """Says where it is once it listens."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"open http://{shown}:{port}/#token={token}", flush=True)

    Server(
        uvicorn.Config(
            make_app(guard, project, roots),
            host=options.host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
        )
    ).run()
    return EXIT_OK


def hosts_of(host: str, port: int) -> frozenset[str]:
    """Host headers of requests to a server that listens at an address: its own, or all of this machine where it listens at all."""
    names = {host.lower()}
    if host in LOCAL or host in EVERY:
        names |= set(LOCAL)
    if host in EVERY:
        own = socket.gethostname()
        names |= {own.lower(), socket.getfqdn().lower()}
        with suppress(OSError):
            names |= {str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(own, None)}
    shown = {f"[{name}]" if ":" in name else name for name in names}
    return frozenset({f"{name}:{port}" for name in shown} | (shown if port == 80 else set()))


def free_port(host: str, wanted: int) -> int:
    """The port, or the next one that nobody listens at.

    Raises:
        ConfigError: if none is free, or the address is not one of this machine.
    """
    if not 0 < wanted <= LAST_PORT - TRIES:
        raise ConfigError(f"--port {wanted}: expected 1 to {LAST_PORT - TRIES}")
    for port in range(wanted, wanted + TRIES):
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as problem:
                if problem.errno == errno.EADDRINUSE:
                    continue
                raise ConfigError(
                    f"--host {host} --port {port}: cannot be listened at ({problem.strerror})"
                ) from problem
            return port
    raise ConfigError(f"--port {wanted}: it and the {TRIES - 1} after it are taken at {host}")


def read_token(path: Path) -> str:
    """The token of a file that only its owner can read; made if it is not there."""
    if path.is_file():
        found = path.read_text(encoding="utf-8").strip()
        if len(found) >= 16:
            return found
    token = secrets.token_urlsafe(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(token + "\n", encoding="utf-8")
    return token


if __name__ == "__main__":
    sys.exit(main())
