# Runs in the stock guest of test_ide.py, whichever driver has its disk. The first boot makes a file system, the others
# find it.

way_of() { # BLOCK: what leads to a disk
    case $(readlink -f "/sys/block/$1/device") in
    */ata[0-9]*) echo ata ;;
    */VMBUS*) echo vmbus ;;
    *) readlink -f "/sys/block/$1/device" ;;
    esac
}

sum_of() { # FILE
    sha256sum "$1" | cut -d' ' -f1
}

ata_troubles() {
    dmesg | grep -c -E 'ata[12].*(exception|error|timeout|failed|frozen)'
}

for block in /sys/block/sd* /sys/block/sr*; do
    result "disk_$(basename "$block")" "$(way_of "$(basename "$block")") $(cat "$block/size")"
done
result model "$(cat /sys/block/sda/device/model)"
result driver "$(basename "$(readlink /sys/bus/pci/devices/0000:00:07.1/driver)")"
for device in /sys/bus/pci/devices/*; do
    result "pci_${device##*:}" "$(cat "$device/vendor") $(cat "$device/device")"
done

mkdir -p /mnt
if mount -t ext4 /dev/sda /mnt 2>/dev/null; then
    result found "$(sum_of /mnt/data)"
    result found_notes "$(cat /mnt/note-* | tr '\n' ' ')"
else
    mkfs.ext4 -q -F /dev/sda
    mount -t ext4 /dev/sda /mnt
    dd if=/dev/urandom of=/mnt/data bs=1M count=8 2>/dev/null
    dd if=/dev/urandom of=/mnt/gone bs=1M count=8 2>/dev/null
    sync
    echo 3 >/proc/sys/vm/drop_caches
    result made "$(sum_of /mnt/data)"
    rm /mnt/gone
    sync
    fstrim -v /mnt | while read -r line; do result trimmed "$line"; done
fi
echo "$WAY" >"/mnt/note-$WAY"
umount /mnt

result cd "$(sum_of /dev/sr0)"
result ready change
# Each look locks the drive for a moment, and the host's change fails then.
for _ in $(seq 40); do
    sleep 1
    [ "$(blockdev --getsize64 /dev/sr0 2>/dev/null)" = 786432 ] && break
done
result other_cd "$(sum_of /dev/sr0)"
result ata_troubles "$(ata_troubles)"
result ata_log "$(dmesg | grep -E 'ata[12]|sr0' | tail -n 40 | tr '\n' '|')"
result end 1
