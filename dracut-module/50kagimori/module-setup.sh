#!/bin/bash
# dracut module: puts the agent into an initramfs, with systemd or without, and keeps other unlockers off its volumes.
#
# Runs as /usr/lib/dracut/modules.d/50kagimori/module-setup.sh, sourced by dracut, which calls its functions for each
# kernel whose initramfs is made. Without /etc/kagimori/agent.toml the module is left out. Whatever is missing ends
# dracut: the old initramfs stays.

# Where things lie on the machine, and where the same things lie in the initramfs.
kagimori_config=/etc/kagimori/agent.toml
kagimori_common=/usr/lib/kagimori/boot
kagimori_tools=/usr/lib/kagimori/bin
# What the scripts of $kagimori_common call: an initramfs's own programs differ from release to release.
kagimori_applets='cat chmod grep ip mkdir mount poweroff readlink reboot rm sed sleep sync udhcpc'

# Ends dracut. $1: what is wrong; $2: what to do. A module's status alone would not: dracut goes on without the module.
kagimori_stop() {
    dfatal "kagimori: $1"
    dfatal "kagimori: $2"
    exit 1
}

# called by dracut
check() {
    if [[ ! -e $kagimori_config ]]; then
        dinfo "kagimori: there is no $kagimori_config, so this initramfs gets no agent"
        return 1
    fi
    return 0
}

# called by dracut
depends() {
    # Its udev rules make a mapping known to systemd, and give it its name in /dev/mapper.
    echo dm
}

# called by dracut, after install: adds the kernel modules that the footprint names, with what they depend on.
installkernel() {
    local list word name rest
    # shellcheck disable=SC2154 # dracut sets kernel
    list=$(kagimori-agent footprint --kernel "$kernel" --config "$kagimori_config") ||
        kagimori_stop 'the kernel modules cannot be found, see above' 'no initramfs is made without them'
    while read -r word name rest; do
        case $word in
        module)
            # -c: what is not found fails. hostonly: dracut would leave out what this machine does not use now.
            hostonly='' instmods -c "$name" ||
                kagimori_stop "the kernel module $name cannot be added" "see modprobe --set-version=$kernel -D $name"
            ;;
        absent) dwarn "kagimori: Linux $kernel comes without $name ${rest#* }; an unlock that needs it will fail" ;;
        *) ;;
        esac
    done <<<"$list"
}

# called by dracut: copies the agent with all that it loads, its settings, and what runs it.
install() {
    local script
    # shellcheck disable=SC2154 # dracut sets dracutsysrootdir, kernel and initdir
    [[ -z $dracutsysrootdir ]] || kagimori_stop 'no initramfs can be made for another root' 'run dracut in it'
    kagimori-agent footprint --kernel "$kernel" --config "$kagimori_config" --into "${initdir:?}" >/dev/null ||
        kagimori_stop 'the agent cannot be put into the initramfs, see above' 'no initramfs is made without it'
    kagimori_leave_out resume kdump kdumpbase
    for script in lease cap root-check unlock no-passphrase; do
        kagimori_copy "$kagimori_common/$script" "$kagimori_common/$script"
    done
    kagimori_install_tools
    kagimori_install_network
    inst_hook cmdline 00 "${moddir:?}/sysrq-hook.sh"
    if dracut_module_included systemd; then
        kagimori_install_units
    else
        kagimori_install_hooks
    fi
}

# Copies the file $1 to $2, or ends dracut.
kagimori_copy() {
    inst_simple "$1" "$2" || kagimori_stop "$1 cannot be put into the initramfs" 'install Kagimori again'
}

# Ends dracut if one of these modules is in the initramfs: they read a disk of the host's before, or in place of, what was
# attested.
kagimori_leave_out() {
    local module
    for module in "$@"; do
        ! dracut_module_included "$module" ||
            kagimori_stop "the dracut module $module is in this initramfs" "omit_dracutmodules+=\" $module \" in /etc/dracut.conf.d"
    done
}

# Copies busybox, under the name of each program that our scripts call.
kagimori_install_tools() {
    local busybox list applet
    busybox=$(command -v busybox) || kagimori_stop 'busybox is missing' 'apt-get install busybox'
    inst_binary "$busybox" "$kagimori_tools/busybox" || kagimori_stop "$busybox cannot be copied" 'see above'
    # No pipe into grep -q: dracut has pipefail on, and busybox dies of a closed pipe.
    list=$("$busybox" --list)
    for applet in $kagimori_applets; do
        [[ $'\n'$list$'\n' == *$'\n'"$applet"$'\n'* ]] ||
            kagimori_stop "this busybox has no $applet" 'install the package busybox in place of a smaller one'
        ln -sf busybox "${initdir:?}$kagimori_tools/$applet"
    done
}

# Gives all values of the setting $1 in agent.toml, one a line.
kagimori_setting() { sed -n "s/^$1=//p" "${initdir:?}/etc/kagimori/boot.conf"; }

# Chooses what brings the network up: systemd-networkd, where there is systemd and networkd, else our own script.
kagimori_install_network() {
    local link
    # agent.toml names a card as the booted system does; dracut brings udev's rules for that, but not the policy.
    for link in /usr/lib/systemd/network/*.link /etc/systemd/network/*.link; do
        [[ ! -e $link ]] || kagimori_copy "$link" "$link"
    done
    # shellcheck disable=SC2154 # dracut sets moddir and the systemd directories
    local networkd=$systemdutildir/systemd-networkd units=$systemdsystemunitdir
    if ! dracut_module_included systemd || [[ ! -x $networkd || $(kagimori_setting network) == none ]]; then
        kagimori_copy "$kagimori_common/network" "$kagimori_common/network"
        return 0
    fi
    kagimori_copy "${moddir:?}/networkd" "$kagimori_common/network"
    kagimori_copy "$kagimori_common/network" "$kagimori_common/links"
    inst_multiple "$networkd" "$units/systemd-networkd.service" "$units/systemd-networkd.socket" ||
        kagimori_stop 'systemd-networkd cannot be put into the initramfs' 'see above'
    kagimori_copy_user systemd-network
}

# Copies a user and its group, unless they are there.
kagimori_copy_user() {
    local file
    for file in passwd group; do
        grep -qs "^$1:" "${initdir:?}/etc/$file" || grep "^$1:" "/etc/$file" >>"$initdir/etc/$file" ||
            kagimori_stop "there is no $1 in /etc/$file" 'install systemd again'
    done
}

# Installs the units, caps before each unit that gives a shell, and takes governed volumes from systemd-cryptsetup.
kagimori_install_units() {
    local unit name drop_ins=${initdir:?}/etc/systemd/system
    for script in attached given-up; do kagimori_copy "${moddir:?}/$script" "$kagimori_common/$script"; done
    for unit in kagimori-unlock.service kagimori-cap.service kagimori-root-check.service; do
        kagimori_copy "$moddir/$unit" "$systemdsystemunitdir/$unit"
        # shellcheck disable=SC2154 # dracut sets SYSTEMCTL
        $SYSTEMCTL -q --root "$initdir" enable "$unit" || kagimori_stop "$unit cannot be enabled" 'see above'
    done
    for unit in emergency rescue dracut-emergency debug-shell breakpoint-pre-udev breakpoint-pre-basic \
        breakpoint-pre-mount breakpoint-pre-switch-root; do
        kagimori_copy "$moddir/shell.conf" "${drop_ins#"$initdir"}/$unit.service.d/50-kagimori.conf"
    done
    for name in $(kagimori_setting volume) $(kagimori_setting uuid | sed 's/^/luks-/'); do
        unit=$(systemd-escape --template=systemd-cryptsetup@.service "$name") ||
            kagimori_stop "the unit of the volume $name has no name" 'see above'
        kagimori_copy "$moddir/cryptsetup.conf" "${drop_ins#"$initdir"}/$unit.d/50-kagimori.conf"
    done
    # They look for roots, /usr and images of hibernated systems on disks that the host may plant.
    mkdir -p "$drop_ins-generators"
    for name in systemd-gpt-auto-generator systemd-hibernate-resume-generator; do
        ln -sf /dev/null "$drop_ins-generators/$name"
    done
    inst_hook initqueue/settled 99 "$moddir/patience-hook.sh"
    kagimori_copy "$moddir/modprobe.conf" /etc/modprobe.d/kagimori.conf
}

# Installs the hooks, and puts our cryptroot-ask before dracut's.
kagimori_install_hooks() {
    inst_hook initqueue/settled 01 "${moddir:?}/unlock-hook.sh"
    inst_hook emergency 00 "$moddir/cap-hook.sh"
    inst_hook pre-pivot 00 "$moddir/cap-hook.sh"
    inst_hook pre-pivot 99 "$moddir/root-check-hook.sh"
    # dracut leaves a file alone that is there.
    if dracut_module_included crypt; then
        kagimori_copy "$moddir/cryptroot-ask" /sbin/cryptroot-ask
        kagimori_copy "$(dracut_module_path crypt)/cryptroot-ask.sh" /sbin/cryptroot-ask.dracut
    fi
    dracut_need_initqueue
}
