"""The kernel command line says two things to the agent: tell more, and this address. Any other word refuses the boot."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_agent.cmdline import CommandLine, check_alone, check_names, parse, read
from kagimori_agent.config import Config, Network, load
from kagimori_agent.settings import boot_settings
from kagimori_protocol.errors import ImageError

UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
AGENT_TOML = f"""\
vm_id = "web1"
[[verifiers]]
name = "home"
urls = ["http://127.0.0.1:1"]
keys = ["11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="]
[[volumes]]
uuid = "{UUID}"
name = "cryptroot"
"""


@pytest.mark.parametrize(
    ("line", "debug"),
    [
        ("", False),
        ("root=/dev/mapper/cryptroot ro quiet", False),
        ("ro kagimori.debug", True),
        ("kagimori.debug kagimori.debug\n", True),
        ("kagimori.ip=10.0.0.2/24 kagimori.debug", True),
        ("notkagimori.x=1 foo=kagimori.x", False),
    ],
)
def test_the_command_line_may_ask_for_debugging(line: str, debug: bool) -> None:
    """Other programs' words are none of the agent's business."""
    assert parse(line).debug is debug


@pytest.mark.parametrize(
    ("word", "network"),
    [
        ("10.0.0.2/24", {"address": "10.0.0.2/24"}),
        ("10.0.0.2/32,gateway=10.0.0.1", {"address": "10.0.0.2/32", "gateway": "10.0.0.1"}),
        (
            "fd00::2/64,interface=ens3,dns=fd00::53,dns=10.0.0.3,gateway=fe80::1",
            {
                "address": "fd00::2/64",
                "gateway": "fe80::1",
                "interface": "ens3",
                "dns": ["fd00::53", "10.0.0.3"],
            },
        ),
    ],
)
def test_the_command_line_may_set_one_address(word: str, network: dict[str, object]) -> None:
    """A machine's address may be its boot loader's to say: it is measured, and decides nothing else."""
    assert parse(f"ro kagimori.ip={word}").network == Network(method="static", **network)  # type: ignore[arg-type]  # a table


@pytest.mark.parametrize(
    "word",
    [
        *(
            "",
            "dhcp",
            "10.0.0.2",
            "10.0.0.2/33",
            "10.0.0.2/24,",
            "10.0.0.2/24,10.0.0.1",
            "/24",
            ",gateway=10.0.0.1",
        ),
        *(
            "10.0.0.2/24,gateway=10.0.0.1/24",
            "10.0.0.2/24,gateway=x",
            "10.0.0.2/24,gateway=",
            "10.0.0.2/24,dns=",
        ),
        *("10.0.0.2/24,interface=../x", "10.0.0.2/24,interface=", "10.0.0.2/24,method=none", "$(id)/24"),
        *("10.0.0.2/24,gateway=10.0.0.1,gateway=10.0.0.3", "10.0.0.2/24" + ",dns=10.0.0.3" * 4),
        *("fd00::2/129", "10.0.0.2::10.0.0.1:255.255.255.0::eth0", "10.0.0.2/24,interface=a,interface=b"),
    ],
)
def test_an_address_that_is_none_refuses_the_boot(word: str) -> None:
    """It would reach a command of the initramfs's scripts otherwise, and a boot that hangs says less than one that ends."""
    with pytest.raises(ImageError) as caught:
        parse(f"kagimori.ip={word}")
    assert caught.value.code == "cmdline.ip"


@pytest.mark.parametrize(
    "word",
    [
        "kagimori.url=http://evil",
        "kagimori.",
        "kagimori.debug=1",
        "kagimori.debugger",
        "kagimori.ip",
        "kagimori.ipx=1",
        "Kagimori.config=/x",
        '"kagimori.config=/x"',
        '"kagimori.debug"',
        "kagimori.ca_file=/x",
        "kagimori.ip=10.0.0.2/24 kagimori.ip=10.0.0.2/24",
    ],
)
def test_any_other_word_of_ours_on_the_command_line_refuses_the_boot(word: str) -> None:
    """Whoever can edit the boot loader's menu must not move the agent's settings."""
    for line in (word, f"ro {word} quiet", f"kagimori.debug\t{word}", f"ro -- {word}", f"ro\xa0{word}"):
        with pytest.raises(ImageError) as caught:
            parse(line)
        assert caught.value.code == "cmdline.word"
        assert caught.value.found


def test_without_a_command_line_nothing_is_asked(tmp_path: Path) -> None:
    """What cannot be read might say anything."""
    with pytest.raises(ImageError) as caught:
        read(tmp_path / "cmdline")
    assert caught.value.code == "cmdline.read"


@given(
    st.lists(
        st.sampled_from(
            [
                *("quiet", "kagimori.debug", "kagimori.ip=10.0.0.2/24", "kagimori.ip=dhcp", "kagimori."),
                *('"kagimori.debug"', "KAGIMORI.x=1"),
            ]
        )
        | st.text(max_size=8)
        | st.text(alphabet="0123456789abf.:/,=gatewydnsi", max_size=40).map("kagimori.ip=".__add__),
        max_size=5,
    )
)
def test_the_command_line_sets_nothing_but_what_it_may(words: list[str]) -> None:
    """The host writes it: what is not refused asks for debugging by the one word, and for an address that is one."""
    text = " ".join(words)
    try:
        line = parse(text)
    except ImageError as error:
        refused = error
    else:
        _require_only_what_may_be(text, line)
        return
    assert refused.code in {"cmdline.word", "cmdline.ip"}
    assert str(refused).replace("\n", "").isascii()


def _require_only_what_may_be(text: str, line: CommandLine) -> None:
    ours = [word for word in text.split() if word.lstrip('"').casefold().startswith("kagimori.")]
    assert line.debug == ("kagimori.debug" in ours)
    assert {word for word in ours if not word.startswith("kagimori.ip=")} <= {"kagimori.debug"}
    assert (line.network is not None) == any(word.startswith("kagimori.ip=") for word in ours)


def _config(tmp_path: Path, more: str = "") -> Config:
    path = tmp_path / "agent.toml"
    path.write_text(AGENT_TOML + more)
    return load(path)


STATIC = '[network]\nmethod = "static"\naddress = "10.0.0.2/32"\ngateway = "10.0.0.1"\ninterface = "ens3"\n'


def test_settings_for_scripts_say_everything_about_a_static_network(tmp_path: Path) -> None:
    """Each value stands alone on its line, and agent.toml's bounds keep it harmless to a shell."""
    assert boot_settings(_config(tmp_path, STATIC + 'dns = ["10.0.0.3", "fd00::53"]\n')) == (
        "on_failure=poweroff\nnetwork=static\ninterface=ens3\naddress=10.0.0.2/32\ngateway=10.0.0.1\n"
        f"dns=10.0.0.3\ndns=fd00::53\nvolume=cryptroot\nuuid={UUID}\n"
    )


@pytest.mark.parametrize("more", ["", STATIC, '[network]\nmethod = "none"\n'])
def test_the_command_lines_address_comes_in_place_of_agent_tomls(tmp_path: Path, more: str) -> None:
    """All of it: a gateway of the one network beside an address of another leads nowhere."""
    line = parse("kagimori.ip=10.0.1.7/24,dns=10.0.1.1 kagimori.debug")
    interface = "interface=ens3\n" if "ens3" in more else ""
    assert boot_settings(_config(tmp_path, more), line) == (
        f"on_failure=poweroff\nnetwork=static\n{interface}address=10.0.1.7/24\ndns=10.0.1.1\n"
        f"volume=cryptroot\nuuid={UUID}\ndebug=yes\n"
    )


def test_a_card_that_the_command_line_names_is_the_one(tmp_path: Path) -> None:
    """Whoever sets the address by hand knows where it belongs."""
    line = parse("kagimori.ip=10.0.1.7/24,interface=ens4")
    assert "interface=ens4\n" in boot_settings(_config(tmp_path, STATIC), line)


@pytest.mark.parametrize(
    "word",
    [
        f"rd.luks.name={UUID}=root2",
        f"luks.name={UUID.upper()}=root2",
        f'rd.luks."name"={UUID}="root2"',
        f"rd.luks.name={UUID}",
    ],
)
def test_a_volume_of_agent_toml_has_one_name(word: str) -> None:
    """Under another, systemd-cryptsetup would not find it open, and would ask the host's console for its passphrase."""
    with pytest.raises(ImageError) as caught:
        check_names(parse(f"ro {word} quiet"), {UUID: "cryptroot"})
    assert caught.value.code == "cmdline.luks-name"
    assert f"rd.luks.name={UUID}=cryptroot" in str(caught.value.expected)


@pytest.mark.parametrize(
    "word", [f"rd.luks.name={UUID}=cryptroot", "rd.luks.name=other=root2", f"rd.luks.uuid={UUID}"]
)
def test_its_own_name_and_other_volumes_are_none_of_our_business(word: str) -> None:
    """What the command line says of them is for others to read."""
    check_names(parse(f"ro {word} quiet"), {UUID: "cryptroot"})


OPTIONS = "SystemdOptions-8cf2644b-4b0b-428f-9387-6d876050dc67"


def _guest(root: Path, *files: str, filesystems: str = "nodev\tefivarfs\n") -> Path:
    (root / "proc").mkdir()
    (root / "proc/filesystems").write_text(f"nodev\tsysfs\n{filesystems}")
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize("place", ["sys/firmware/efi/efivars", "run/systemd/efivars"])
def test_a_second_command_line_of_the_host_s_ends_the_boot(tmp_path: Path, place: str) -> None:
    """Systemd obeys it: it could run a program of the host's, or skip what Kagimori does. No PCR shows it."""
    with pytest.raises(ImageError) as caught:
        check_alone(_guest(tmp_path, f"{place}/{OPTIONS}", "sys/firmware/efi/efivars/BootOrder-1"))
    assert caught.value.code == "cmdline.efi-options"
    assert str(caught.value.found) == f"/{place}/{OPTIONS}"


def test_who_cannot_look_into_the_variables_does_not_boot(tmp_path: Path) -> None:
    """The module may be on the root's disk, from where systemd would load it."""
    guest = _guest(tmp_path, filesystems="")
    check_alone(guest)
    (guest / "sys/firmware/efi/efivars").mkdir(parents=True)
    with pytest.raises(ImageError) as caught:
        check_alone(guest)
    assert caught.value.code == "cmdline.efi-untold"
    (guest / "proc/filesystems").unlink()
    with pytest.raises(ImageError):
        check_alone(guest)


def test_other_variables_or_none_that_the_kernel_can_reach_are_no_reason(tmp_path: Path) -> None:
    """As with efi=noruntime, where the file system is known and cannot be mounted."""
    guest = _guest(tmp_path)
    (guest / "sys/firmware/efi/efivars").mkdir(parents=True)
    check_alone(guest)
    (guest / "sys/firmware/efi/efivars/HibernateLocation-1").touch()
    check_alone(guest)
