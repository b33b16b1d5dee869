#!/bin/sh
# Holds that the root rests on what the agent opened, or ends the boot.
#
# Runs as the hook pre-pivot/99 of an initramfs without systemd, sourced by dracut's init, after all that mounts; init
# ignores how its hooks end, so `root-check` does not come back otherwise, and one that is killed is started again.

# shellcheck disable=SC2154 # dracut exports NEWROOT
until /usr/lib/kagimori/boot/root-check "$NEWROOT"; do :; done
