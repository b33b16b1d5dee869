#!/bin/bash
# dracut module of test images only: what `device` needs to stand in for SNP hardware.
#
# Runs as /usr/lib/dracut/modules.d/49simulated-snp/module-setup.sh, sourced by dracut in the tests' chroot. What
# simulates is not in the initramfs, but on a disk of its own, as hardware is no part of an image either.

# called by dracut
installkernel() {
    hostonly='' instmods -c fuse ext4 virtio_blk virtio_pci
}

# called by dracut
install() {
    inst_multiple chroot mkdir modprobe mount sleep
    # shellcheck disable=SC2154 # dracut sets moddir, systemdsystemunitdir and SYSTEMCTL
    inst_simple "$moddir/device" /usr/bin/simulated-snp
    if dracut_module_included systemd; then
        # shellcheck disable=SC2154 # as above
        inst_simple "$moddir/simulated-snp.service" "$systemdsystemunitdir/simulated-snp.service"
        # shellcheck disable=SC2154 # as above
        $SYSTEMCTL -q --root "${initdir:?}" enable simulated-snp.service
    else
        inst_hook initqueue/settled 00 "$moddir/simulated-snp.sh"
    fi
}
