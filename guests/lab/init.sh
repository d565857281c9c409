#!/bin/sh
# First stage of the lab, in the initramfs: builds the root out of the host's and hands over to session.sh.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
	case $module in
	kvm.ko*)
		# KVM reckons with the TSC's first frequency, to the end, though Linux may correct it in its first seconds.
		for _ in 1 2 3 4 5 6 7 8 9 10; do
			read -r clock </sys/devices/system/clocksource/clocksource0/current_clocksource
			[ "$clock" = tsc ] && break
			sleep 0.5
		done
		;;
	esac
	insmod "/modules/$module"
done </modules/order

mkdir -p /lower /upper /newroot
mount -t tmpfs tmpfs /upper
mkdir /upper/files /upper/work
# Nothing changes the host's files while the lab is up, so all may be cached; results are shared both ways, so nothing may.
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /lower
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /newroot || exec poweroff -f
mount -t proc proc /newroot/proc
mount -t sysfs sysfs /newroot/sys
mount -t devtmpfs devtmpfs /newroot/dev
mkdir -p /newroot/dev/pts /newroot/dev/shm
mount -t devpts -o ptmxmode=666 devpts /newroot/dev/pts
mount -t tmpfs tmpfs /newroot/dev/shm
mount -t tmpfs tmpfs /newroot/run

settings=/sys/firmware/qemu_fw_cfg/by_name/opt/org.pyvmm
results=$(cat $settings/results/raw)
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=mmap results "/newroot$results"
modules=$(cat $settings/modules/raw)
mkdir -p "/newroot/lib/modules/$(uname -r)"
mount --bind "/newroot$modules" "/newroot/lib/modules/$(uname -r)"

mkdir /newroot/run/lab
cp /bin/busybox /session.sh /newroot/run/lab/
cat $settings/job/raw >/newroot/run/lab/job.sh
exec switch_root /newroot /run/lab/busybox sh /run/lab/session.sh
