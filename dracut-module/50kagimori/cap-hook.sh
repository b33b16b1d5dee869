#!/bin/sh
# Caps the boot, or ends it: before a shell, and before the root becomes /.
#
# Runs as the hooks emergency/00 and pre-pivot/00 of an initramfs without systemd, sourced by dracut's init, which ignores
# how its hooks end: so `cap` does not come back without a cap, and one that is killed is started again.

until /usr/lib/kagimori/boot/cap; do :; done
