#!/bin/sh
# Starts what stands in for SNP hardware, in test images of dracut without systemd.
#
# Runs as a hook initqueue/settled/00, sourced by dracut's init.

if [ ! -e /run/simulated-snp ] && [ -e /dev/disk/by-id/virtio-snp ]; then
    : >/run/simulated-snp
    /usr/bin/simulated-snp
fi
