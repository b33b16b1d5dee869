#!/bin/sh
# Opens the volumes that Kagimori governs, before anything else in an initramfs without systemd could.
#
# Runs as a hook initqueue/settled/01, sourced by dracut's init: each time that udev has nothing to do, and before
# cryptroot-ask, which waits in the same queue. It comes back only when all volumes are open: init would go on.

if [ ! -e /run/kagimori/opened ]; then
    /usr/lib/kagimori/boot/unlock
    case $? in
    0) : >/run/kagimori/opened ;;
    10)
        # agent.toml wants a shell; the hook "emergency" caps before it opens. Leaving it powers off.
        emergency_shell -n kagimori 'kagimori: the volumes are not open. Leaving this shell powers off.'
        ;;
    *) ;;
    esac
    # It was killed, or the shell was left; `cap end` comes back only if it is killed.
    until [ -e /run/kagimori/opened ]; do /usr/lib/kagimori/boot/cap end; done
fi
