#!/bin/sh
# Takes the kernel's emergency keys away: one of them kills every process of a console, and the keyboard is the host's.
#
# Runs as the hook cmdline/00, sourced by dracut's init, or by dracut-cmdline.service, before anything of ours.

[ ! -e /proc/sys/kernel/sysrq ] || echo 0 >/proc/sys/kernel/sysrq
