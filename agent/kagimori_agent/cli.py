"""The agent's command line: ``unlock``, ``dry-run``, ``confirm``, ``doctor``, ``cap``, ``root-check``, ``enrol``, ``settings``, ``footprint``.

Import budget: argparse, json, the error tree and the console; each verb imports what it needs, so that ``cap`` works when
nothing else does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kagimori_agent import VERSION, console, enrol_cli
from kagimori_protocol.errors import KagimoriError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kagimori_agent.cap import Capped
    from kagimori_agent.config import Config
    from kagimori_agent.unlock import Unlocked

DEFAULT_CONFIG: Final = Path("/etc/kagimori/agent.toml")
INTERRUPTED: Final = 130

_EXIT_CODES: Final = """\
exit codes:
  0  done; for dry-run: this boot would get its keys; for doctor: nothing found
  1  the verifier refuses: its policy said no to authentic evidence, or it does not believe this VM;
     for doctor --host-doors: a door is open that its owner has not accepted
  2  usage
  3  operator: configuration, files
  4  image: a kernel option, driver, program, module or agent.toml is missing or wrong
  5  hardware: report door, TPM, firmware, event log
  6  network: no signed answer within the budget
  7  peer: an answer that the protocol does not allow
  8  disk: header, keyslot or cryptsetup
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KagimoriError as error:
        console.explain(error)
        if options.json:
            _print_json({"error": error.as_dict()})
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line: what its --help, its manual page and its completions say."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="agent.toml (default: %(default)s)",
    )
    shared.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout, and nothing else there"
    )
    parser = argparse.ArgumentParser(
        prog=console.NAME,
        description="Prove what this VM has booted and get the keys of its disks from its owner's verifier.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str, description: str) -> argparse.ArgumentParser:  # noqa: ANN401 - a function of this module
        added = verbs.add_parser(
            name,
            parents=[shared],
            help=summary,
            description=description,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    unlock = verb(
        "unlock",
        _unlock,
        "get the keys, open the volumes, cap this boot",
        "Get the keys, open every volume of agent.toml, and cap this boot: whatever the outcome, nothing that runs\n"
        "later in it can ask for a key again.",
    )
    unlock.add_argument(
        "--prove",
        action="store_true",
        help="try the keys on the volumes without mapping them, for kernels without device-mapper",
    )
    dry_run = verb(
        "dry-run",
        _dry_run,
        "ask what the verifier thinks of this boot, without a key",
        "Ask the verifier for its verdict on this boot as it is. No key travels and no PCR changes.",
    )
    dry_run.add_argument("--all", action="store_true", help="show the checks that hold, too")
    dry_run.add_argument(
        "--save", type=Path, metavar="DIR", help="keep what was sent and the verdict in a new directory"
    )
    doctor = verb(
        "doctor",
        _doctor,
        "look for what would stop an unlock, and say what to do",
        "Look at devices, kernel options, TPM, event log, name resolution and verifiers. Changes nothing.",
    )
    doctor.add_argument(
        "--host-doors",
        action="store_true",
        help="look instead for what lets the host into this system after its boot; exit code 1 if a door is open that\n"
        "/etc/kagimori/accepted-doors does not name (lines of an id and a reason)",
    )
    verb(
        "cap",
        _cap,
        "close this boot's chance to get a key",
        "Extend the cap PCR of every TPM and read it back. Power off if this fails: whoever gets into this boot could\n"
        "ask for the key again.",
    )
    root_check = verb(
        "root-check",
        _root_check,
        "hold that the root rests on what the agent opened",
        "Hold that the root, what is mounted below it, every swap and the resume device rest wholly on volumes that the\n"
        "agent opened in this boot. The scripts of an initramfs run it before the root becomes /, and power off if it fails.",
    )
    root_check.add_argument(
        "--root",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the root is mounted: /root of initramfs-tools, /sysroot of dracut",
    )
    verb(
        "confirm",
        _confirm,
        "tell the verifier what the boot could not: that the volumes are open",
        "Send the confirmation that the boot has left in /run, until the verifier has taken it. The booted system runs this.",
    )
    enrol_cli.declare(verb)
    verb(
        "settings",
        _settings,
        "print what the boot scripts must know, one NAME=VALUE a line",
        "Print what agent.toml and the kernel command line say to the scripts of the initramfs.",
    )
    footprint = verb(
        "footprint",
        _footprint,
        "list what an initramfs must carry for the agent, or put it there",
        "List files and kernel modules that the agent needs in an initramfs, one a line: `file PATH`, `module NAME`,\n"
        "`builtin NAME`, `absent NAME`. The hooks of initramfs-tools and dracut call it; a name that is not on this\n"
        "machine is an error.",
    )
    footprint.add_argument(
        "--kernel", metavar="RELEASE", help="the kernel of the initramfs (default: the running one)"
    )
    footprint.add_argument(
        "--into",
        type=Path,
        metavar="DIR",
        help="also copy the files there, with agent.toml and what starts the agent; kernel modules are the caller's",
    )
    footprint.add_argument(
        "--crypttab",
        type=Path,
        default=Path("/etc/crypttab"),
        metavar="FILE",
        help="whose device options go with it (default: %(default)s)",
    )
    return parser


def _unlock(options: argparse.Namespace) -> int:
    from kagimori_agent import signals

    with signals.in_order():
        try:
            unlocked = _get_unlocked(options)
        except BaseException:
            # Whatever it was, it may have come before the unlock's own cap, or into the middle of it.
            with signals.unheeded():
                _cap_all(options)
            raise
    if options.json:
        _print_json(
            {
                "verifier": unlocked.verifier,
                "session": unlocked.session,
                "volumes": [{"uuid": one.uuid, "name": one.name, "how": one.how} for one in unlocked.volumes],
                "capped": [one.tpm for one in unlocked.capped],
                "confirmed": unlocked.confirmed,
            }
        )
        return 0
    for one in unlocked.volumes:
        print(f"{one.name}: {one.how}")
    return 0


def _get_unlocked(options: argparse.Namespace) -> Unlocked:
    from kagimori_agent import memory
    from kagimori_agent.config import load
    from kagimori_agent.unlock import unlock

    memory.forbid_core_dumps()
    if not memory.lock_memory():
        console.say(
            "memory cannot be locked: keys could be swapped out, so use no swap before the root is open"
        )
    return unlock(load(options.config), console.say, prove=options.prove)


def _dry_run(options: argparse.Namespace) -> int:
    from kagimori_agent import saved
    from kagimori_agent.config import load
    from kagimori_agent.unlock import dry_run
    from kagimori_protocol.transcript import session_id

    if options.save is not None:
        saved.make_directory(options.save)
    verdict, answered = dry_run(load(options.config), console.say)
    session = session_id(answered.session)
    if options.save is not None:
        saved.save(options.save, verdict, answered)
    if options.json:
        checks = [
            {"id": check.id, "ok": check.ok, "expected": check.expected, "found": check.found}
            for check in verdict.checks
        ]
        _print_json(
            {
                "allowed": verdict.allowed,
                "session": session,
                "verifier": answered.endpoint.name,
                "checks": checks,
            }
        )
    else:
        # Whether it is capped counts for no dry-run, and who debugs a boot wants to know.
        console.show_checks(verdict.checks, every=options.all, always={"cap.off"})
        word = "would get its keys" if verdict.allowed else "would get no key"
        print(f"{answered.endpoint.name}: this boot {word} (session {session})")
    return 0 if verdict.allowed else 1


def _doctor(options: argparse.Namespace) -> int:
    if options.host_doors:
        return _host_doors(options)
    from kagimori_agent.doctor import examine

    findings = examine(options.config)
    if options.json:
        _print_json({"findings": [finding.as_dict() for finding in findings]})
    else:
        for finding in findings:
            print("\n".join(finding.lines()))
    return max((finding.exit_code for finding in findings), default=0)


def _host_doors(options: argparse.Namespace) -> int:
    from kagimori_agent.host_doors import examine

    doors = examine()
    if options.json:
        _print_json({"doors": [door.as_dict() for door in doors]})
    else:
        for door in doors:
            print("\n".join(door.lines()))
        if not doors:
            print("no door is open to the host that is known here")
    return 1 if any(door.accepted is None for door in doors) else 0


def _cap(options: argparse.Namespace) -> int:
    config, capped = _cap_all(options)
    if options.json:
        _print_json(
            {
                "capped": [
                    {"tpm": one.tpm, "before": one.before.hex(), "after": one.after.hex()} for one in capped
                ]
            }
        )
        return 0
    for one in capped:
        print(f"{one.tpm}: PCR {config.tpm.cap_pcr} {'was capped' if one.before == one.after else 'capped'}")
    return 0


def _root_check(options: argparse.Namespace) -> int:
    from kagimori_agent.config import load
    from kagimori_agent.root_check import check

    checked = check(load(options.config), options.root)
    if options.json:
        _print_json({"checked": list(checked.subjects), "mappings": list(checked.mappings)})
        return 0
    for subject in checked.subjects:
        print(f"{subject}: on {', '.join(checked.mappings)}")
    return 0


def _confirm(options: argparse.Namespace) -> int:
    from kagimori_agent import confirm

    name = confirm.resend(console.say, confirm.PATH)
    if options.json:
        _print_json({"confirmed": name is not None, "verifier": name})
    elif name is not None:
        print(f"{name}: has taken the confirmation")
    return 0


def _settings(options: argparse.Namespace) -> int:
    from kagimori_agent import cmdline
    from kagimori_agent.config import load
    from kagimori_agent.settings import boot_settings

    text = boot_settings(load(options.config), cmdline.read())
    if options.json:
        _print_json({"settings": [line.split("=", 1) for line in text.splitlines()]})
    else:
        print(text, end="")
    return 0


def _footprint(options: argparse.Namespace) -> int:
    try:
        from kagimori_agent.footprint import resolve
    except ModuleNotFoundError as error:
        raise UsageError(
            "This agent lives in an initramfs, and cannot build one.",
            code="footprint.here",
            expected="kagimori-agent as a package installs it",
            found=str(error),
            todo="Run it on the booted system.",
        ) from error

    found = resolve(options.kernel or os.uname().release)
    if options.into is not None:
        from kagimori_agent.config import load
        from kagimori_agent.footprint_install import install

        install(found, options.into, load(options.config), options.config, options.crypttab)
    if options.json:
        _print_json(found.as_dict())
    else:
        print("\n".join(found.lines()))
    return 0


def _cap_all(options: argparse.Namespace) -> tuple[Config, list[Capped]]:
    """Cap as agent.toml says; where it says nothing, cap every TPM as one without it would, and raise why.

    A cap that is there already stays as it is.
    """
    from kagimori_agent.cap import cap
    from kagimori_agent.config import load

    try:
        config = load(options.config)
    except BaseException:
        cap()
        raise
    driver = config.tpm.driver if config.kind == "svsm-vtpm" else None
    return config, cap(config.tpm.cap_pcr, driver=driver, tcti=config.tpm.tcti)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
