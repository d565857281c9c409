#!/bin/sh
# PID 1 of the stock guest: loads the stock drivers, runs /script on the console and switches the machine off.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run /tmp /mnt
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
export PATH=/sbin:/bin HOME=/
# Off Hyper-V hv_vmbus refuses to load, and so do the drivers above it; that is for the script to judge.
# As modprobe does, MODULE.PARAMETER=VALUE on the kernel's command line is for that module.
read -r cmdline </proc/cmdline
while read -r module; do
    name=${module##*/} parameters=
    for word in $cmdline; do
        case $word in "${name%.ko}".*) parameters="$parameters ${word#*.}" ;; esac
    done
    insmod "/modules/$module" $parameters
done </modules/order 2>/dev/null
# root=LABEL=NAME as any initramfs has it; disks have no fixed order. What /sbin/init does there is its own matter.
for word in $cmdline; do
    case $word in root=*)
        for _ in $(seq 100); do device=$(findfs "${word#root=}" 2>/dev/null) && break || sleep 0.1; done
        mkdir -p /root
        mount -t ext4 "$device" /root || { echo "init: no disk is ${word#root=}"; exec /sbin/poweroff; }
        for place in proc sys dev run; do mount -o move "/$place" "/root/$place"; done
        exec switch_root /root /sbin/init
        ;;
    esac
done
if [ -e /script ]; then
    sh /script
else
    echo 'No script was given; `exit` switches the machine off.'
    setsid cttyhack sh
fi
exec /sbin/poweroff
