"""The lab from the shell: ``python -m bench.wanlab up|run|exec|set|status|down``; see README.md."""

import argparse
import os
import sys
from pathlib import Path

from bench.wanlab.keeper import keep
from bench.wanlab.lab import Lab
from bench.wanlab.namespaces import find_labs, is_stale, teardown

__all__ = ["main"]


def main() -> int:
    """Do what the command line says; give the exit code."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[split + 1 :]
    parser = _parser()
    args = parser.parse_args(sys.argv[1:split])
    if args.action == "keep":
        keep(args.name, use_compiler=os.environ.get("WANLAB_CORE") != "python")
        return 0
    if args.action in ("up", "run"):
        return _start(args, command)
    if args.action == "down" and args.stale:
        for name in filter(is_stale, find_labs()):
            teardown(name)
        return 0
    names = [args.lab] if args.lab else find_labs()
    if args.action == "status":
        print("\n\n".join(f"{one}: stale" if is_stale(one) else Lab.attach(one).status() for one in names) or "no labs")
        return 0
    if len(names) != 1:
        parser.error(f"choose with --lab from: {', '.join(names) or '(no labs)'}")
    return _change(Lab.attach(names[0]), args, command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.wanlab", description="Emulate a wide-area network.")
    parser.add_argument("--lab", help="name of the lab, if there are several", default="")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    up = actions.add_parser("up", help="start a lab and leave it up")
    run = actions.add_parser("run", help="start a lab, run `-- CMD` in a host, end the lab")
    run.add_argument("--host", help="default: the first")
    for action in (up, run):
        action.add_argument("source", help="a TOML or JSON file, or a preset")
        action.add_argument("--count", type=int, help="size of the groups of hosts that have one")
    actions.add_parser("exec", help="run `-- CMD` in a host").add_argument("host")
    change = actions.add_parser("set", help="change a link: KEY=VALUE...")
    change.add_argument("host")
    change.add_argument("changes", nargs="+", metavar="KEY=VALUE")
    actions.add_parser("status", help="show the labs")
    down = actions.add_parser("down", help="end a lab")
    down.add_argument("--stale", action="store_true", help="remove the remains of dead labs")
    actions.add_parser("keep", help="what a lab runs to forward its packets").add_argument("name")
    return parser


def _start(args: argparse.Namespace, command: list[str]) -> int:
    if args.action == "run":
        with Lab.load(args.source, args.count, args.lab) as lab:
            code: int = lab.run(args.host or lab.hosts[0].name, command).returncode
        return code
    name = args.lab or Path(args.source).stem
    print(Lab.load(args.source, args.count, name).up(detached=True).status())
    return 0


def _change(lab: Lab, args: argparse.Namespace, command: list[str]) -> int:
    if args.action == "exec":
        os.execvp("ip", lab.command(args.host, command or ["bash"]))
    elif args.action == "set":
        changes = (change.partition("=") for change in args.changes)
        lab.link(args.host).set(**{name: float(value) for name, _, value in changes})
    else:
        lab.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
