# Runs in the demo's Debian guest: tells what its kernel found, writes a letter to the VMBus disk and reads it back.
result step 'Linux is up'
result kernel "$(uname -r)"
result clocksource "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
dmesg | grep -iE 'hyper-?v|hv_|vmbus' | grep -v 'registering driver' | {
    number=0
    while IFS= read -r line; do result "dmesg_$((number += 1))" "$line"; done
}
for device in /sys/bus/vmbus/devices/*; do
    driver=$(readlink "$device/driver")
    result "channel_$(basename "$device")" \
        "$(tr -d '{}' <"$device/class_id") $(ls "$device/channels" | wc -l) ${driver##*/}"
done

result step 'the guest writes to its disk'
vendor=$(cat /sys/block/sda/device/vendor) model=$(cat /sys/block/sda/device/model)
result disk "/dev/sda, '$(echo $vendor $model)', $(($(cat /sys/block/sda/size) / 2048)) MiB"
mkfs.ext4 -q -F /dev/sda && mount -t ext4 /dev/sda /mnt
{
    echo "Dear host, this is Linux $(uname -r) with $(grep -c ^processor /proc/cpuinfo) processors,"
    echo "writing at $(date -u '+%H:%M:%S UTC on %e %B %Y') through hv_storvsc to a disk on VMBus."
} >/mnt/letter
# Read back from the disk and not from the page cache.
umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 -o ro /dev/sda /mnt && {
    number=0
    while IFS= read -r line; do result "letter_$((number += 1))" "$line"; done </mnt/letter
    result sum "$(sha256sum /mnt/letter | cut -d' ' -f1)"
    umount /mnt
}
result ready shutdown
# The kernel powers off under this script when the shutdown integration service is asked to.
sleep 60
