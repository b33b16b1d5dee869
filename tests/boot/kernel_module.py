"""The provider of reports for a real kernel's configfs-tsm, simulator/kernel, compiled in a Debian with that kernel's headers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.boot import images
from tests.boot.archive import archive
from tests.boot.cache import Cache
from tests.boot.images import Images
from tests.boot.variants import ROOT

SOURCE: Final = ROOT / "simulator/kernel"
_PACKAGES: Final = ("linux-headers-cloud-amd64", "gcc", "libc6-dev", "make")
_MAKE: Final = """\
mount --bind "$1" "$0/mnt"
exec chroot "$0" make -C "/lib/modules/$2/build" M=/mnt KCFLAGS=-Werror modules
"""


def build(cache: Cache, built: Images) -> Path:
    """Compile it for the kernel of these images, or find it in the cache; gives the file."""
    variant = replace(built.variant, name=f"{built.variant.suite}-headers", packages=_PACKAGES)
    source = archive(variant.suite, cache.root)
    headers = cache.get(
        f"{variant.name}.debian",
        [variant.suite, *variant.packages, *source.state()],
        lambda to: images._build_debian(to, variant, source),
    )
    release = built.kernel.name.removeprefix("vmlinuz-")

    def make(to: Path) -> None:
        for path in SOURCE.iterdir():
            shutil.copy(path, to)
        place = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _MAKE]
        images.run([*place, str(headers / "root"), str(to), release])

    return cache.get("kernel-module", [headers.name, release, SOURCE], make) / "kagimori_tsm.ko"
