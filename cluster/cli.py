"""The `moray` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from .. import __version__
from ..configs.deployment import EMBEDDED_MODEL, CpuInstructions, Deployment
from ..configs.errors import MorayError
from .admin_cli import add_admin_commands
from .bench.cli import add_bench
from .deployment_flags import deployment_with
from .doctor import add_doctor
from .fetch_cli import add_fetch
from .planning.cli import add_plan
from .simulation.cli import add_simulate
from .up import add_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the process's exit status: 0, 1 for an error that was explained, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        status: int = options.run(options)
    except MorayError as error:
        lines = (line.strip() for line in str(error).splitlines())
        print(f"moray: error: {' '.join(line for line in lines if line)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def run() -> NoReturn:
    """Run the command and end the process: what the `moray` script calls."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "ray" in sys.modules:
        # Everything has been ended in order. Where Ray could not be, its threads still wait for processes that are gone,
        # and crash an interpreter that takes itself apart around them.
        os._exit(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moray", description="Serve DeepSeek-R1 and its family, experts apart.")
    parser.add_argument("--version", action="version", version=f"moray {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_status(commands)
    _add_chat(commands)
    add_admin_commands(commands)
    add_plan(commands)
    add_simulate(commands)
    add_bench(commands)
    add_fetch(commands)
    add_up(commands)
    add_doctor(commands)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model until Ctrl-C",
        description="Start a model's expert hosts, routers and HTTP front. Flags override the file given by --config.",
    )
    serve.add_argument(
        "model", nargs="?", metavar="MODEL", help=f"checkpoint directory, URL to fetch it from, or {EMBEDDED_MODEL}"
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="deployment file (see configs/deployments)")
    serve.add_argument("--experts", type=int, metavar="N", help="expert hosts")
    serve.add_argument("--routers", type=int, metavar="N", help="routers")
    serve.add_argument("--link", choices=["auto", "shm", "gloo", "nccl"], help="links between routers and expert hosts")
    serve.add_argument("--name", help="the model's id in the API")
    serve.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to compute")
    serve.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], help="what to compute in")
    serve.add_argument(
        "--cpu-instructions",
        choices=get_args(CpuInstructions),
        help="what CPUs compute with (default: the best of each)",
    )
    serve.add_argument("--max-context", type=int, metavar="TOKENS", help="longest prompt plus answer")
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 8000; 0: any free one)")
    serve.add_argument("--api-key-file", metavar="FILE", help="let in only holders of these keys, one a line")
    where = serve.add_mutually_exclusive_group()
    where.add_argument(
        "--address", help="join this Ray cluster (`auto`: the one on this machine) instead of starting one"
    )
    where.add_argument("--local", action="store_true", help="run everything in this process, without Ray")
    serve.set_defaults(run=_serve)


def _add_status(commands: Any) -> None:
    status = commands.add_parser("status", help="show a running server's health and processes")
    _add_server_options(status)
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="talk to a running server")
    _add_server_options(chat)
    chat.add_argument("question", nargs="?", help="ask this and exit; without it, read questions from the terminal")
    chat.add_argument("--temperature", type=float, help="0 always takes the most likely token")
    chat.add_argument("--max-tokens", type=int, help="most tokens of an answer")
    chat.set_defaults(run=_chat)


def _add_server_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", help="the server (default: the one `moray serve` runs on this machine)")
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="file whose first key to use")


def deployment_from(options: argparse.Namespace) -> Deployment:
    """The deployment that flags and file describe together.

    Raises:
        ConfigError: they do not describe one.
    """
    flags = {
        "model": options.model,
        "name": options.name,
        "device": options.device,
        "dtype": options.dtype,
        "cpu_instructions": options.cpu_instructions,
        "link": options.link,
        "max_context": options.max_context,
        "experts.hosts": options.experts,
        "routers.replicas": options.routers,
        "front.host": options.host,
        "front.port": options.port,
        "front.api_key_file": options.api_key_file,
    }
    return deployment_with(options.config, flags, source="moray serve")


def _serve(options: argparse.Namespace) -> int:
    from .serving import serve

    return serve(deployment_from(options), address=options.address, local=options.local)


def _status(options: argparse.Namespace) -> int:
    from .client import status

    return status(options.url, options.api_key_file, as_json=options.json)


def _chat(options: argparse.Namespace) -> int:
    from .client import chat

    return chat(
        options.url,
        options.api_key_file,
        question=options.question,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
    )


if __name__ == "__main__":
    run()
